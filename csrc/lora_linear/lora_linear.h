// CPU kernels of lora_linear: what the host entry hands to the per-ISA objects. No torch headers.
//
// Formulas: lora_kernels/ops/lora_linear/reference.py. Every matrix is row-major with unit column
// stride; `ld*` are row strides in elements. "Packed" operands are in the layout of the engine
// that made them (engine_amx.h, engine_fma.h) and mean nothing to another engine.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/philox.h"

namespace lora_kernels::lora_linear {

constexpr int kMaxGroup = 8;

// One member of a group in the forward: Y = X W^T + bias + scaling * S B^T, S = drop(X) A^T.
struct FwdMember {
  const void* w_packed;  // k = K, n = N
  const void* a_packed;  // k = K, n = rank; not read where S is given
  const void* b_packed;  // k = rank, n = N
  const float* bias;     // [N] or null
  void* y;               // [M, N]
  int64_t ldy;
  int64_t n;
  int64_t rank;
  int64_t s_column;  // first column of this member in S
  float scaling;
};

struct FwdParams {
  const void* x;  // [M, K]
  int64_t ldx;
  const void* given_s;  // [M, sum of ranks]; null: S is computed and written to `s`
  void* s;              // [M, sum of ranks]; null where S is given
  int64_t lds;          // of either
  int64_t m;
  int64_t k;
  int members;
  FwdMember member[kMaxGroup];
  float keep_scale;  // 1 / P(keep)
  DropoutParams dropout;
};

// One member in the backward: dS = scaling * keep_scale * dY B.
struct BwdMember {
  const void* w_packed;   // k = N, n = K
  const void* a_packed;   // k = rank, n = K
  const void* bt_packed;  // k = N, n = rank; not read where dS is given
  const void* dy;         // [M, N]
  int64_t lddy;
  int64_t n;
  int64_t rank;
  int64_t s_column;
  float scaling;
  float* da;  // partial dA of each thread, [threads, rank_padded, K_padded]; null: not needed
  float* db;  // partial (dB)^T of each thread, [threads, rank_padded, N_padded]; null: not needed
};

struct BwdParams {
  const void* x;  // [M, K]; read for dA only
  int64_t ldx;
  const void* s;  // [M, sum of ranks]; read for dB only
  int64_t lds;
  const void* given_ds;  // [M, sum of ranks], without dropout; null: dS is computed
  int64_t ldds;
  void* dx;  // [M, K]; null: not needed
  int64_t lddx;
  int64_t m;
  int64_t k;
  int members;
  BwdMember member[kMaxGroup];
  float keep_scale;
  DropoutParams dropout;
};

// Thread t of (threads_m x threads_n) owns a range of rows and a range of output columns.
struct Grid {
  int threads_m;
  int threads_n;
};

// One engine compiled for one instruction set. All functions are safe to call concurrently.
struct Engine {
  const char* name;  // "amx", "avx512", "avx2", "baseline"
  int mr;            // rows of a strip
  int nr;            // columns of a full strip
  int kr;            // k is padded to a multiple of this
  int nv;            // the last strip's width is padded to a multiple of this
  int element_size;  // bytes of a packed B element

  // B operand of a [k, n] product; `threads`-way split by strips, this call packs part `part`.
  // src is [n, k] (pack_b_cols) or [k, n] (pack_b_rows).
  void (*pack_b_cols)(Dtype src_dtype, const void* src, int64_t ld, int64_t k, int64_t n, void* dst,
                      int part, int parts);
  void (*pack_b_rows)(Dtype src_dtype, const void* src, int64_t ld, int64_t k, int64_t n, void* dst,
                      int part, int parts);
  int64_t (*fwd_workspace)(const FwdParams&, Grid);  // bytes per thread
  int64_t (*bwd_workspace)(const BwdParams&, Grid);
  void (*fwd)(const FwdParams&, Grid, int thread, void* workspace);
  void (*bwd)(const BwdParams&, Grid, int thread, void* workspace);
};

// Padded extents: of n in packed B operands and gradient partials, of k, of a strip of rows.
inline int64_t round_up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }
inline int64_t packed_b_bytes(const Engine& e, int64_t k, int64_t n) {
  return round_up(k, e.kr) * round_up(n, e.nv) * e.element_size;
}

// Null where the compiler or the element type rules the engine out.
const Engine* engine_amx(Dtype);
const Engine* engine_avx512(Dtype);
const Engine* engine_avx2(Dtype);
const Engine* engine_baseline(Dtype);

}  // namespace lora_kernels::lora_linear
