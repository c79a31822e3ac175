// Launchers of quantize.cuh.
#include "../../lora_linear/cuda/split.h"
#include "launch.h"
#include "quantize.cuh"

namespace lora_kernels::quant_linear::cuda {

using lora_linear::cuda::ceil_div;

namespace {
dim3 warps(int64_t count) {
  return dim3(static_cast<unsigned>(ceil_div(count, kQuantizeThreads / 32)));
}
}  // namespace

cudaError_t launch_quantize_flat(const QuantizeFlatParams& p, cudaStream_t stream) {
  if (check(p) != nullptr) return cudaErrorInvalidValue;
  return launch_kernel(quantize_flat_kernel, warps(ceil_div(p.numel, int64_t{1} << p.block_shift)),
                       kQuantizeThreads, 0, stream, p);
}

cudaError_t launch_quantize_nested(const QuantizeNestedParams& p, cudaStream_t stream) {
  if (check(p) != nullptr) return cudaErrorInvalidValue;
  return launch_kernel(quantize_nested_kernel,
                       warps(ceil_div(p.blocks, int64_t{1} << p.nested_shift)), kQuantizeThreads,
                       256 * sizeof(float), stream, p);
}

cudaError_t launch_quantize_rows(const QuantizeRowsParams& p, cudaStream_t stream) {
  if (check(p) != nullptr) return cudaErrorInvalidValue;
  return launch_kernel(quantize_rows_kernel, dim3(static_cast<unsigned>(p.n)), kQuantizeThreads,
                       kQuantizeThreads / 32 * sizeof(float), stream, p);
}

}  // namespace lora_kernels::quant_linear::cuda
