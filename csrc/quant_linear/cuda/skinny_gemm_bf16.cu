#include "skinny_gemm_run.cuh"

namespace lora_kernels::quant_linear::cuda {

cudaError_t run_skinny_gemm_bf16(const SkinnyGemmParams& p, cudaStream_t stream) {
  return run_skinny_gemm<bf16>(p, stream);
}

}  // namespace lora_kernels::quant_linear::cuda
