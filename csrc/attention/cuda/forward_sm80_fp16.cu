#include "forward_sm80.cuh"

namespace lora_kernels::attention::cuda {

cudaError_t run_forward_sm80_fp16(const ForwardParams& p, cudaStream_t stream) {
  return run_forward<fp16>(p, stream);
}

}  // namespace lora_kernels::attention::cuda
