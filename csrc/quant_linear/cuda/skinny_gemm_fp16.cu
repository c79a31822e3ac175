#include "skinny_gemm_run.cuh"

namespace lora_kernels::quant_linear::cuda {

cudaError_t run_skinny_fp16(const SkinnyParams& p, cudaStream_t stream) {
  return run_skinny<fp16>(p, stream);
}

}  // namespace lora_kernels::quant_linear::cuda
