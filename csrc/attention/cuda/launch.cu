// Checks of the arguments, and the translation unit of the dtype.
#include "launch.h"

namespace lora_kernels::attention::cuda {

cudaError_t launch_forward_sm80(const ForwardParams& p, cudaStream_t stream) {
  if (check(p) != nullptr) return cudaErrorInvalidValue;
  if (p.a.batch == 0 || p.a.rows == 0) return cudaSuccess;
  return p.a.dtype == Dtype::kBFloat16 ? run_forward_sm80_bf16(p, stream)
                                       : run_forward_sm80_fp16(p, stream);
}

cudaError_t launch_key_gradients_sm80(const BackwardParams& p, cudaStream_t stream) {
  if (check(p) != nullptr || p.dk.data == nullptr) return cudaErrorInvalidValue;
  if (p.a.batch == 0 || p.a.keys == 0) return cudaSuccess;
  return p.a.dtype == Dtype::kBFloat16 ? run_key_gradients_sm80_bf16(p, stream)
                                       : run_key_gradients_sm80_fp16(p, stream);
}

cudaError_t launch_query_gradients_sm80(const BackwardParams& p, cudaStream_t stream) {
  if (check(p) != nullptr || p.dq.data == nullptr) return cudaErrorInvalidValue;
  if (p.a.batch == 0 || p.a.rows == 0) return cudaSuccess;
  return p.a.dtype == Dtype::kBFloat16 ? run_query_gradients_sm80_bf16(p, stream)
                                       : run_query_gradients_sm80_fp16(p, stream);
}

}  // namespace lora_kernels::attention::cuda
