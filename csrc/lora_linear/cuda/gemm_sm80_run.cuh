// The tile variants of gemm_sm80.cuh for one element type.
#pragma once

#include "gemm_sm80.cuh"
#include "gemm_sm80_tiles.h"

namespace lora_kernels::lora_linear::cuda {

using Gemm128x256 = GemmShape<128, 256, 64, 64, 4, 1>;
using Gemm128x128 = GemmShape<128, 128, 64, 64, 4, 2>;
using Gemm64x64 = GemmShape<64, 64, 32, 32, 4, 4>;
static_assert(Gemm128x256::kShared <= kSharedMemoryNeeded);

template <class T, OperandLayout kLayout, class S, bool kAligned, bool kMasked>
cudaError_t launch_gemm(const GemmParams& p, cudaStream_t stream) {
  GemmArgs args{p, {}, static_cast<int>(ceil_div(p.m, S::BM))};
  int64_t tiles = 0;
  for (int i = 0; i < p.problems; ++i) {
    args.first_tile[i] = static_cast<int>(tiles);
    tiles += args.tiles_m * ceil_div(p.problem[i].n, S::BN);
  }
  if (tiles > INT32_MAX) return cudaErrorInvalidValue;
  return launch_kernel(gemm_sm80_kernel<T, kLayout, S, kAligned, kMasked>,
                       dim3(static_cast<unsigned>(tiles)), S::kThreads, S::kShared, stream, args);
}

template <class T, OperandLayout kLayout, bool kMasked>
cudaError_t run_gemm_layout(const GemmParams& p, GemmTile tile, cudaStream_t stream) {
  switch (tile) {
    case GemmTile::k128x256:
      return launch_gemm<T, kLayout, Gemm128x256, true, kMasked>(p, stream);
    case GemmTile::k128x128:
      return launch_gemm<T, kLayout, Gemm128x128, true, kMasked>(p, stream);
    case GemmTile::k64x64:
      return launch_gemm<T, kLayout, Gemm64x64, true, kMasked>(p, stream);
    default:
      return launch_gemm<T, kLayout, Gemm64x64, false, kMasked>(p, stream);
  }
}

template <class T>
cudaError_t run_gemm(const GemmParams& p, GemmTile tile, cudaStream_t stream) {
  constexpr OperandLayout kNK = OperandLayout::kNK, kKN = OperandLayout::kKN;
  if (p.layout == kNK) return run_gemm_layout<T, kNK, false>(p, tile, stream);
  return p.dropout.threshold == 0 ? run_gemm_layout<T, kKN, false>(p, tile, stream)
                                  : run_gemm_layout<T, kKN, true>(p, tile, stream);
}

}  // namespace lora_kernels::lora_linear::cuda
