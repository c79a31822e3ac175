// GPU kernels of lora_linear: what the host entry hands to the launchers of launch.h.
// No torch headers; plain data, copied into the kernels' argument space.
//
// Formulas: lora_kernels/ops/lora_linear/reference.py. Matrices are row-major with unit column
// stride; `ld*` are row strides in elements and at least the number of columns. T is the dtype of
// x, W, Y, dY and dX: bfloat16 or float16 (float32 is refused: check() says so, library GEMMs
// serve it). Every pointer is a device pointer of the current device.
//
// Any pointer that is aligned to its element and any ld is accepted. 16-byte accesses are used
// where pointer and ld * sizeof(T) are multiples of 16 (aligned16), a slower path elsewhere; so a
// host entry should pass its own workspaces aligned and let launch_pad copy small odd operands.
//
// Order of one forward:      [launch_pad A, B]  launch_shrink  launch_gemm
//   with a given S:           launch_pad [B], scaling * S  launch_gemm
// Order of one backward:     [launch_pad A, B, S]  launch_dy_pass  launch_da  launch_gemm
//   with a given dS:          [launch_pad A, S, dS]  [launch_dy_pass for dB]  launch_da  launch_gemm
// Nothing allocates or synchronises; everything runs on the given stream and can be captured.
#pragma once

#include <cstdint>

#include "../../common/dtype.h"
#include "../../common/host_device.h"

namespace lora_kernels::lora_linear::cuda {

constexpr int kMaxGroup = 8;   // members that share x
constexpr int kMaxRank = 256;  // of one member
constexpr int kRankAlign = 8;  // elements: 16 bytes of T
constexpr int kMaxPadJobs = 3 * kMaxGroup;

// Columns of a member in the padded buffers scaled_s and ds: rank rounded up, so that each member
// starts at a multiple of 16 bytes. Padding columns are written as zeros.
LK_HOST_DEVICE constexpr int64_t padded_rank(int64_t rank) {
  return (rank + kRankAlign - 1) / kRankAlign * kRankAlign;
}

LK_HOST_DEVICE inline bool aligned16(const void* data, int64_t ld) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && ld % 8 == 0;
}

// Counter-based dropout, lora_kernels/ops/_philox.py. Member g of a group is stream g.
struct Dropout {
  uint32_t threshold;   // round(p * 65536); keep <=> draw >= threshold; 0: no dropout
  uint32_t key[2];      // seed & 0xffffffff, seed >> 32; read when `seed` is null
  const int64_t* seed;  // device memory, read by the kernels (no synchronisation), or null
};

// ---- launch_pad: dst[i, j] = T(scale * src[i, j]) for j < cols, 0 for cols <= j < dst_cols ----
// For adapters in another dtype and for small operands with odd strides (A, B, S, dS).
struct PadJob {
  const void* src;  // [rows, cols]
  Dtype src_dtype;  // any of the three
  int64_t ld_src;
  int64_t col_stride;  // of src, elements; 1 for rows with unit column stride
  int64_t rows, cols;
  void* dst;  // [rows, dst_cols] of T
  int64_t ld_dst;
  int64_t dst_cols;  // >= cols
  float scale;
};

struct PadParams {
  Dtype dtype;  // T
  int jobs;
  PadJob job[kMaxPadJobs];
};

// ---- launch_shrink: S_g = drop_g(X) A_g^T / P(keep), X read once for the group ----------------
struct ShrinkMember {
  const void* a;  // [rank, K] of T
  int64_t lda;
  int64_t rank;           // 1..256
  int64_t s_column;       // first column of this member in S
  int64_t padded_column;  // first column in scaled_s: the sum of padded_rank of those before
  float scaling;
};

struct ShrinkParams {
  Dtype dtype;
  const void* x;  // [M, K]
  int64_t ldx;
  int64_t m, k;
  int members;
  ShrinkMember member[kMaxGroup];
  void* s;  // [M, sum of ranks] of T, unscaled: what backward needs; null: not wanted
  int64_t lds;
  void* scaled_s;  // [M, sum of padded ranks] of T, scaling * S of T: operand of the GEMM; or null
  int64_t ld_scaled;
  float keep_scale;  // 1 / P(keep); 1 without dropout, 0 when nothing is kept
  Dropout dropout;
  int sm_count;     // multiprocessors of the device; decides the split, hence the bits of S
  int splits;       // over K; 0: chosen from sm_count
  void* workspace;  // shrink_workspace(p) bytes, 16-byte aligned; may be null when that is 0
};

// ---- launch_dy_pass: one pass over each dY_g ------------------------------------------------
//   dS_g = scaling / P(keep) * dY_g B_g    [M, rank]      dB_g = scaling * dY_g^T S_g   [N, rank]
struct DyMember {
  const void* dy;  // [M, N]
  int64_t lddy;
  const void* b;  // [N, rank] of T; read for dS only
  int64_t ldb;
  const void* s;  // [M, rank] of T, this member's columns of S; read for dB only
  int64_t lds;
  int64_t n;
  int64_t rank;
  int64_t padded_column;  // first column in ds
  float scaling;
  void* db;  // [N, rank] of db_dtype, from fp32 sums; null: not wanted
  int64_t lddb;
  Dtype db_dtype;  // any of the three
};

struct DyPassParams {
  Dtype dtype;
  int64_t m;
  int members;
  DyMember member[kMaxGroup];
  void* ds;  // [M, sum of padded ranks] of T; null: not wanted
  int64_t ldds;
  float keep_scale;
  int sm_count;
  int splits;       // over M; 0: chosen from sm_count
  void* workspace;  // dy_pass_workspace(p) bytes, 16-byte aligned
};

// ---- launch_da: dA_g = dS_g^T drop_g(X), X read once for the group ----------------------------
// dS carries 1 / P(keep) already.
struct DaMember {
  int64_t rank;
  int64_t padded_column;  // first column in ds
  void* da;               // [rank, K] of da_dtype, from fp32 sums; null: not wanted
  int64_t ldda;
  Dtype da_dtype;  // any of the three
};

struct DaParams {
  Dtype dtype;
  const void* x;  // [M, K]
  int64_t ldx;
  const void* ds;  // [M, sum of padded ranks] of T
  int64_t ldds;
  int64_t m, k;
  int members;
  DaMember member[kMaxGroup];
  Dropout dropout;
  int sm_count;
  int splits;       // over M; 0: chosen from sm_count
  void* workspace;  // da_workspace(p) bytes, 16-byte aligned
};

// ---- launch_gemm_sm80 (and the sm_90a one): K-extended GEMM -----------------------------------
//   C_i [M, N_i] = sum over the terms of problem i of A_t B_t' (* keep mask) + bias
// with the whole sum in one fp32 accumulator. Forward, one problem per member:
//   Y_g = [scaled_s_g | X] [B_g | W_g]^T + bias      kNK: B_t is [N, k] (B_g, W_g)
// Backward, one problem for the group:
//   dX  = sum_g [dS_g | dY_g] [A_g ; W_g]            kKN: B_t is [k, N] (A_g, W_g; N = in_features)
enum class OperandLayout : int { kNK = 0, kKN = 1 };

constexpr int kMaxTerms = 2 * kMaxGroup;

struct GemmTerm {
  const void* a;  // [M, k] of T
  int64_t lda;
  const void* b;  // [N, k] or [k, N] of T
  int64_t ldb;
  int64_t k;
  int stream;  // >= 0: the product is multiplied by the keep mask of this stream (rows and columns
               // of C; dropout.threshold decides whether there is one); -1: never masked
};

struct GemmProblem {
  int64_t n;
  void* c;  // [M, n] of T
  int64_t ldc;
  const void* bias;  // [n] or null
  Dtype bias_dtype;  // any of the three
  int first_term;
  int terms;  // masked ones first, so that LoRA terms come before base terms
};

struct GemmParams {
  Dtype dtype;
  OperandLayout layout;
  int64_t m;
  int problems;  // 1..kMaxGroup, each with terms of its own
  GemmProblem problem[kMaxGroup];
  GemmTerm term[kMaxTerms];
  Dropout dropout;
  int sm_count;
};

}  // namespace lora_kernels::lora_linear::cuda
