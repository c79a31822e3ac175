// Launcher of gemm_sm80.cuh.
#include "gemm_sm80_tiles.h"

namespace lora_kernels::lora_linear::cuda {

cudaError_t launch_gemm_sm80(const GemmParams& p, cudaStream_t stream) {
  return launch_gemm_sm80_tile(p, choose_tile(p), stream);
}

cudaError_t launch_gemm_sm80_tile(const GemmParams& p, GemmTile tile, cudaStream_t stream) {
  if (check(p) != nullptr) return cudaErrorInvalidValue;
  if (tile != GemmTile::kUnaligned && !gemm_aligned(p)) return cudaErrorInvalidValue;
  if (count_tiles(p, tile) == 0) return cudaSuccess;
  return p.dtype == Dtype::kBFloat16 ? run_gemm_sm80_bf16(p, tile, stream)
                                     : run_gemm_sm80_fp16(p, tile, stream);
}

}  // namespace lora_kernels::lora_linear::cuda
