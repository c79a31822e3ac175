#include "skinny_gemm_run.cuh"

namespace lora_kernels::quant_linear::cuda {

cudaError_t run_skinny_bf16(const SkinnyParams& p, cudaStream_t stream) {
  return run_skinny<bf16>(p, stream);
}

}  // namespace lora_kernels::quant_linear::cuda
