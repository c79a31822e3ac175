// Host side of backward_sm90.h: what it accepts, tensor maps, launch.
#include "backward_sm90.h"

#include <cstring>

#include "backward_sm90_params.h"
#include "backward_sm90_schedule.h"
#include "operands_sm90.h"

namespace lora_kernels::attention::cuda {
namespace {

cudaError_t launch(const BackwardParams& f, bool of_keys, cudaStream_t stream) {
  if (check_backward_sm90(f) != nullptr) return cudaErrorInvalidValue;
  const AttentionParams& p = f.a;
  Sm90BackwardParams q;
  std::memset(static_cast<void*>(&q), 0, sizeof q);
  q.f = f;
  const Extents rows = query_extents(p), keys = key_extents(p);
  cudaError_t error = encode_operand(&q.q, p, p.q, rows, kSm90Stream);
  if (error == cudaSuccess) error = encode_operand(&q.k, p, p.k, keys, kSm90Stream);
  if (error == cudaSuccess) error = encode_operand(&q.v, p, p.v, keys, kSm90Stream);
  if (error == cudaSuccess) error = encode_operand(&q.dout, p, f.dout, rows, kSm90Stream);
  if (error != cudaSuccess) return error;
  return p.dtype == Dtype::kBFloat16 ? run_gradients_sm90_bf16(q, of_keys, stream)
                                     : run_gradients_sm90_fp16(q, of_keys, stream);
}

}  // namespace

const char* check_backward_sm90(const BackwardParams& f) {
  if (const char* why = check(f)) return why;
  if (const char* why = check_sm90(f.a)) return why;
  return describable(f.dout, query_extents(f.a)) ? nullptr
                                                 : "the gradient of the output is expanded";
}

cudaError_t launch_key_gradients_sm90(const BackwardParams& p, cudaStream_t stream) {
  return p.dk.data == nullptr ? cudaErrorInvalidValue : launch(p, true, stream);
}

cudaError_t launch_query_gradients_sm90(const BackwardParams& p, cudaStream_t stream) {
  return p.dq.data == nullptr ? cudaErrorInvalidValue : launch(p, false, stream);
}

}  // namespace lora_kernels::attention::cuda
