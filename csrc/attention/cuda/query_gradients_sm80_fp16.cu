#include "query_gradients_sm80.cuh"

namespace lora_kernels::attention::cuda {

cudaError_t run_query_gradients_sm80_fp16(const BackwardParams& p, cudaStream_t stream) {
  return run_query_gradients<fp16>(p, stream);
}

}  // namespace lora_kernels::attention::cuda
