#include "backward_sm90.cuh"

namespace lora_kernels::attention::cuda {

cudaError_t run_gradients_sm90_fp16(const Sm90BackwardParams& p, bool of_keys, cudaStream_t stream) {
  return run_gradients_sm90<fp16>(p, of_keys, stream);
}

}  // namespace lora_kernels::attention::cuda
