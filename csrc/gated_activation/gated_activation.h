// gated_activation on the CPU: one pass over rows, forward or backward. No torch headers. Formulas:
// lora_kernels/ops/gated_activation/reference.py.
//
// Bytes moved: every operand read once, every result written once. fp32 arithmetic, one rounding at
// each store. Elements are independent, so h, dgate and dup do not depend on the threads.
//
// Products with the adapters around it (S = h A^T; dS = d B, dB = d^T S) are taken of the rounded
// results while a block of kBlockRows x kStrip of them is in L2 (blocks.h). S and dS are summed over
// the panels of a row in fp32 and rounded once. dB is summed per slot of rows in fp32; the host adds
// the slots in order, so its bits depend on the number of slots alone.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace lora_kernels::gated_activation {

enum class Kind : int { kSilu, kGelu, kGeluTanh, kRelu, kReluSquared };

struct RowsParams {
  int64_t columns;
  const void *dh, *gate, *up;  // dh null: forward; up null: not gated
  int64_t lddh, ldgate, ldup;
  void *h, *dgate, *dup;       // contiguous rows; h in the forward, the others in the backward
};

using RowsKernel = void (*)(const RowsParams&, int64_t begin, int64_t end);

constexpr int64_t kBlockRows = 64, kStrip = 1024, kPanel = 128, kRankTile = 16, kMaxMembers = 2;

inline int64_t padded_rank(int64_t r) { return (r + kRankTile - 1) / kRankTile * kRankTile; }
inline int64_t padded_columns(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

// One adapter: of h in the forward, of dgate (0) and dup (1) in the backward.
struct Member {
  int64_t rank;
  const void* packed;  // [padded columns, padded rank] as Blocks::pack leaves it
  float scaling;
  const void* s;       // [rows, lds], in the dtype of the rows; null: no dB
  int64_t lds;
  void* out;           // S or dS: [rows, ldout], in the dtype of the rows
  int64_t ldout;
};

struct BlocksParams {
  RowsParams rows;
  int64_t members;
  Member member[kMaxMembers];
};

// Sizes in floats of what one slot needs: sums of dB first, member after member, then scratch.
inline int64_t sums_size(const BlocksParams& p, int64_t m) {
  const Member& of = p.member[m];
  return of.s == nullptr ? 0 : padded_columns(p.rows.columns) * padded_rank(of.rank);
}
inline int64_t scratch_size(const BlocksParams& p) {
  int64_t size = 0;
  for (int64_t m = 0; m < p.members; ++m) {
    size += 2 * kBlockRows * padded_rank(p.member[m].rank) + sums_size(p, m);
  }
  return size;
}

struct Blocks {
  // operand (n, r) is src[n * stride_n + r * stride_r], in the dtype of the rows; dst has room for
  // padded columns x padded rank floats.
  void (*pack)(const void* src, int64_t stride_n, int64_t stride_r, int64_t columns, int64_t rank,
               void* dst);
  // Rows [begin, end); workspace: the sums, then the scratch, aligned to 64 bytes.
  void (*run)(const BlocksParams&, int64_t begin, int64_t end, float* workspace);
  // dst[n * rank + r] for n in [begin, end), begin a multiple of 16, from the sums of `slots` that
  // lie `stride` floats apart.
  void (*finish)(const float* sums, int64_t slots, int64_t stride, int64_t columns, int64_t rank,
                 float scaling, int64_t begin, int64_t end, float* dst);
};

// Null where this instruction set has nothing better for the dtype than the next lower one.
RowsKernel rows_amx(Dtype, Kind);
RowsKernel rows_avx512(Dtype, Kind);
RowsKernel rows_avx2(Dtype, Kind);
RowsKernel rows_baseline(Dtype, Kind);
const Blocks* blocks_amx(Dtype, Kind);
const Blocks* blocks_avx512(Dtype, Kind);
const Blocks* blocks_avx2(Dtype, Kind);
const Blocks* blocks_baseline(Dtype, Kind);

}  // namespace lora_kernels::gated_activation
