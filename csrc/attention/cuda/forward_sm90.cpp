// Host side of forward_sm90.h: what it accepts, tensor maps, launch.
#include "forward_sm90.h"

#include <cstring>

#include "forward_sm90_params.h"
#include "operands_sm90.h"

namespace lora_kernels::attention::cuda {

const char* check_forward_sm90(const ForwardParams& f) {
  const char* why = check(f);
  return why != nullptr ? why : check_sm90(f.a);
}

cudaError_t launch_forward_sm90(const ForwardParams& f, cudaStream_t stream) {
  if (check_forward_sm90(f) != nullptr) return cudaErrorInvalidValue;
  const AttentionParams& p = f.a;
  static_assert(kSm90Rows == kSm90Keys);
  Sm90ForwardParams q;
  std::memset(static_cast<void*>(&q), 0, sizeof q);
  q.f = f;
  cudaError_t error = encode_operand(&q.q, p, p.q, query_extents(p), kSm90Rows);
  if (error == cudaSuccess) error = encode_operand(&q.k, p, p.k, key_extents(p), kSm90Keys);
  if (error == cudaSuccess) error = encode_operand(&q.v, p, p.v, key_extents(p), kSm90Keys);
  if (error != cudaSuccess) return error;
  return p.dtype == Dtype::kBFloat16 ? run_forward_sm90_bf16(q, stream)
                                     : run_forward_sm90_fp16(q, stream);
}

}  // namespace lora_kernels::attention::cuda
