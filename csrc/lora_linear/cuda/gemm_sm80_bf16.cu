#include "gemm_sm80_run.cuh"

namespace lora_kernels::lora_linear::cuda {

cudaError_t run_gemm_sm80_bf16(const GemmParams& p, GemmTile tile, cudaStream_t stream) {
  return run_gemm<bf16>(p, tile, stream);
}

}  // namespace lora_kernels::lora_linear::cuda
