#include "forward_sm90.cuh"

namespace lora_kernels::attention::cuda {

cudaError_t run_forward_sm90_bf16(const Sm90ForwardParams& p, cudaStream_t stream) {
  return run_forward_sm90<bf16>(p, stream);
}

}  // namespace lora_kernels::attention::cuda
