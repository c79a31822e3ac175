// Launcher of dequantize.cuh.
#include "dequantize.cuh"

#include "../../lora_linear/cuda/split.h"
#include "launch.h"

namespace lora_kernels::quant_linear::cuda {

using lora_linear::cuda::ceil_div;

cudaError_t launch_dequantize(const DequantizeParams& p, cudaStream_t stream) {
  if (check(p) != nullptr) return cudaErrorInvalidValue;
  if (p.numel == 0) return cudaSuccess;
  const auto blocks = [&](int64_t elements) {
    return dim3(static_cast<unsigned>(ceil_div(p.numel, elements)));
  };
  switch (p.w.layout) {
    case Layout::kFlat:
      return launch_kernel(dequantize_flat_kernel, blocks(FlatShape::kElements), kDequantizeThreads,
                           FlatShape::kShared, stream, p);
    case Layout::kInt8:
      return launch_kernel(dequantize_bytes_kernel<Layout::kInt8>, blocks(16 * kDequantizeThreads),
                           kDequantizeThreads, 0, stream, p);
    case Layout::kFp8:
      return launch_kernel(dequantize_bytes_kernel<Layout::kFp8>, blocks(16 * kDequantizeThreads),
                           kDequantizeThreads, 0, stream, p);
    default:
      const dim3 grid(static_cast<unsigned>(ceil_div(p.w.k, Int4Shape::kDepth)),
                      static_cast<unsigned>(ceil_div(p.w.n, Int4Shape::kColumns)));
      return launch_kernel(dequantize_int4_kernel, grid, kDequantizeThreads,
                           Int4Shape::kWords * sizeof(uint32_t), stream, p);
  }
}

}  // namespace lora_kernels::quant_linear::cuda
