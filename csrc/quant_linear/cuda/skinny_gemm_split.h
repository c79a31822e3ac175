// How the kernels for few rows share a sum between blocks, and the extents they work on. Host code.
#pragma once

#include "../../lora_linear/cuda/split.h"
#include "launch.h"

namespace lora_kernels::quant_linear::cuda {

using lora_linear::cuda::ceil_div;

constexpr int64_t kFewRows = 16;      // rows of the variants with tiles of 16 rows
constexpr int64_t kSkinnyStep = 128;  // of the sum: what the shares are counted in
constexpr int64_t kRankTile = 16;     // ranks of a block that makes U
constexpr int64_t kDgradColumns = 256;

inline int64_t skinny_p(const SkinnyParams& p) { return p.dgrad ? p.w.k : p.w.n; }
inline int64_t skinny_q(const SkinnyParams& p) { return p.dgrad ? p.w.n : p.w.k; }

constexpr int skinny_columns(int64_t rows) { return rows <= kFewRows ? 64 : 128; }

inline int64_t skinny_tiles(const SkinnyParams& p) {
  return ceil_div(skinny_p(p), p.dgrad ? kDgradColumns : skinny_columns(p.m));
}

// Of P, Q, the rank and the device alone, so that the bits of a row do not depend on the others.
// Few rows: four blocks per multiprocessor, whose copies under way fill the memory's latency. More:
// one, since partial sums of 64 rows weigh as much as the codes.
inline lora_linear::cuda::Split skinny_split(const SkinnyParams& p) {
  const int64_t steps = ceil_div(skinny_q(p), kSkinnyStep);
  const int64_t blocks = skinny_tiles(p) + ceil_div(p.rank, kRankTile);
  return lora_linear::cuda::choose_split(steps, blocks,
                                         p.m <= kFewRows ? 4 * p.sm_count : p.sm_count,
                                         p.dgrad ? 2 : 4, p.splits);
}

cudaError_t run_skinny_bf16(const SkinnyParams&, cudaStream_t);
cudaError_t run_skinny_fp16(const SkinnyParams&, cudaStream_t);

}  // namespace lora_kernels::quant_linear::cuda
