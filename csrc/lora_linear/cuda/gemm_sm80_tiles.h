// Tile variants of gemm_sm80.cuh and the rule that picks one. Host code.
#pragma once

#include <initializer_list>

#include "launch.h"
#include "split.h"

namespace lora_kernels::lora_linear::cuda {

enum class GemmTile : int { k128x256 = 0, k128x128 = 1, k64x64 = 2, kUnaligned = 3 };

struct GemmTileExtent {
  int rows, columns, blocks_per_sm;
  double efficiency;  // of the main loop against the largest tile, by operand bytes per product
};

inline GemmTileExtent extent_of(GemmTile tile) {
  switch (tile) {
    case GemmTile::k128x256:
      return {128, 256, 1, 1.0};
    case GemmTile::k128x128:
      return {128, 128, 2, 0.95};
    default:
      return {64, 64, 4, 0.7};
  }
}

inline int64_t count_tiles(const GemmParams& p, GemmTile tile) {
  const GemmTileExtent e = extent_of(tile);
  int64_t tiles = 0;
  for (int i = 0; i < p.problems; ++i) {
    tiles += ceil_div(p.m, e.rows) * ceil_div(p.problem[i].n, e.columns);
  }
  return tiles;
}

inline bool gemm_aligned(const GemmParams& p) {
  for (int i = 0; i < p.problems; ++i) {
    for (int t = p.problem[i].first_term; t < p.problem[i].first_term + p.problem[i].terms; ++t) {
      if (!aligned16(p.term[t].a, p.term[t].lda) || !aligned16(p.term[t].b, p.term[t].ldb)) {
        return false;
      }
    }
  }
  return true;
}

// The variant whose waves of tiles take the least time.
inline GemmTile choose_tile(const GemmParams& p) {
  if (!gemm_aligned(p)) return GemmTile::kUnaligned;
  GemmTile best = GemmTile::k128x256;
  double least = 0.0;
  for (GemmTile tile : {GemmTile::k128x256, GemmTile::k128x128, GemmTile::k64x64}) {
    const GemmTileExtent e = extent_of(tile);
    const int64_t slots = static_cast<int64_t>(p.sm_count > 0 ? p.sm_count : 1) * e.blocks_per_sm;
    const double waves = static_cast<double>(ceil_div(count_tiles(p, tile), slots));
    const double time = waves * e.blocks_per_sm * e.rows * e.columns / e.efficiency;
    if (tile == GemmTile::k128x256 || time < least) {
      least = time;
      best = tile;
    }
  }
  return best;
}

// One variant by name, for tuners and tests: cudaErrorInvalidValue where operands without 16-byte
// rows meet another variant than kUnaligned.
cudaError_t launch_gemm_sm80_tile(const GemmParams&, GemmTile, cudaStream_t);

// gemm_sm80_{bf16,fp16}.cu
cudaError_t run_gemm_sm80_bf16(const GemmParams&, GemmTile, cudaStream_t);
cudaError_t run_gemm_sm80_fp16(const GemmParams&, GemmTile, cudaStream_t);

}  // namespace lora_kernels::lora_linear::cuda
