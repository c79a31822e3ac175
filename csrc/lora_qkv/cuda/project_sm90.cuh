// LoRA projections whose heads leave the accumulators rotated, for Hopper: the persistent wgmma
// GEMM of lora_linear/cuda/gemm_sm90.cuh with bias and rotation before the rounding.
//
// Math      as project_sm80.cuh, half-rotated: z1 = y1 cos1 - y2 sin1,  z2 = y2 cos2 + y1 sin2
// Shapes    as there; D in {64, 128, 256} and R = D. Row m is position m % S of sequence m / S.
// Tile      128 x 256, whole heads: a thread of a consumer holds both channels of a pair
//           (rotate_accumulators.cuh), so nothing is exchanged and columns stay in order.
// Bytes     those of the GEMM, plus cos and sin of 128 rows for a tile: each thread reads 2 rows x
//           D / 2 entries, once for the tile's heads, while the producer fills the next stages.
// Numerics  as the tensor core accumulates; bias and rotation in fp32, one rounding. A position
//           outside of the cache gives NaN.
// Limits    those of gemm_sm90.h; other heads, partial rotation and interleaved pairs are the sm_80
//           kernel's.
#pragma once

#include "../../lora_linear/cuda/gemm_sm90.cuh"
#include "project_sm90_params.h"
#include "rotate_accumulators.cuh"

namespace lora_kernels::lora_qkv::cuda {

constexpr int kSm90Columns = 256;

template <typename T>
__global__ void __launch_bounds__(lora::kSm90Threads, 1)
    project_sm90_kernel(const __grid_constant__ ProjectSm90Args args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  lora::gemm_sm90_tiles<T, kSm90Columns, false, lora::kNoMask>(
      args.gemm,
      [&](const lora::Sm90Work& work, int consumer, float (&d)[kSm90Columns / 2]) {
        const HeadsOfProblem& heads = args.heads[work.problem];
        const TileCorner tile{work.m + 64 * consumer, work.n, args.gemm.m};
        const int thread = threadIdx.x % 128;
        switch (args.head_dim) {
          case 64:
            return rotate_accumulators<64>(args.rotation, heads, tile, thread, d);
          case 128:
            return rotate_accumulators<128>(args.rotation, heads, tile, thread, d);
          default:
            return rotate_accumulators<256>(args.rotation, heads, tile, thread, d);
        }
      });
#endif
}

}  // namespace lora_kernels::lora_qkv::cuda
