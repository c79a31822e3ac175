// The tile variants of project_sm80.cuh for one element type: a large one, a small one, and one for
// operands without 16-byte rows.
#pragma once

#include "../../lora_linear/cuda/gemm_sm80_tiles.h"
#include "project_sm80.cuh"

namespace lora_kernels::lora_qkv::cuda {

using Large = lora::GemmShape<128, 128, 64, 64, 4, 2>;
using Small = lora::GemmShape<64, 64, 32, 32, 4, 4>;
static_assert(Large::kShared <= lora::kSharedMemoryNeeded);

template <class T, class S, bool kAligned>
cudaError_t launch(const ProjectionParams& p, cudaStream_t stream) {
  using lora::ceil_div;
  const int64_t tiles_m = ceil_div(p.gemm.m, S::BM);
  ProjectArgs args{{p.gemm, {}, static_cast<int>(tiles_m)}, p.rotation, p.head_dim, {}};
  int64_t tiles = 0;
  for (int i = 0; i < p.gemm.problems; ++i) {
    args.rotated[i] = p.rotated[i];
    args.gemm.first_tile[i] = static_cast<int>(tiles);
    tiles += tiles_m * ceil_div(p.gemm.problem[i].n, S::BN);
  }
  if (tiles > INT32_MAX) return cudaErrorInvalidValue;
  return launch_kernel(project_sm80_kernel<T, S, kAligned>, dim3(static_cast<unsigned>(tiles)),
                       S::kThreads, S::kShared, stream, args);
}

template <class T>
cudaError_t run_project(const ProjectionParams& p, cudaStream_t stream) {
  if (!lora::gemm_aligned(p.gemm)) return launch<T, Small, false>(p, stream);
  const auto time = [&](lora::GemmTile tile) {
    const lora::GemmTileExtent e = lora::extent_of(tile);
    const int64_t slots = (p.gemm.sm_count > 0 ? p.gemm.sm_count : 1) * int64_t{e.blocks_per_sm};
    const int64_t waves = lora::ceil_div(lora::count_tiles(p.gemm, tile), slots);
    return static_cast<double>(waves) * e.blocks_per_sm * e.rows * e.columns / e.efficiency;
  };
  return time(lora::GemmTile::k64x64) < time(lora::GemmTile::k128x128)
             ? launch<T, Small, true>(p, stream)
             : launch<T, Large, true>(p, stream);
}

}  // namespace lora_kernels::lora_qkv::cuda
