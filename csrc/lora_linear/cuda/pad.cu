// launch_pad: adapters and other small matrices into the dtype and the alignment of the kernels.
//
// Grid      x: 256 elements of dst, y: job. Bytes: each element once.
#include "../../common/convert.cuh"
#include "launch.h"
#include "split.h"

namespace lora_kernels::lora_linear::cuda {
namespace {

constexpr int kThreads = 256;

}  // namespace

template <class T>
__global__ void __launch_bounds__(kThreads) pad_kernel(const __grid_constant__ PadParams p) {
  const PadJob& j = p.job[blockIdx.y];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= j.rows * j.dst_cols) return;
  const int64_t row = i / j.dst_cols, col = i % j.dst_cols;
  const float value =
      col < j.cols ? load_as_float(j.src, row * j.ld_src + col * j.col_stride, j.src_dtype) : 0.0f;
  narrow(j.scale * value, static_cast<T*>(j.dst)[row * j.ld_dst + col]);
}

cudaError_t launch_pad(const PadParams& p, cudaStream_t stream) {
  if (check(p) != nullptr) return cudaErrorInvalidValue;
  int64_t most = 0;
  for (int i = 0; i < p.jobs; ++i) {
    const int64_t count = p.job[i].rows * p.job[i].dst_cols;
    if (count > most) most = count;
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(most, kThreads)), static_cast<unsigned>(p.jobs));
  return launch_kernel(p.dtype == Dtype::kBFloat16 ? pad_kernel<bf16> : pad_kernel<fp16>, grid,
                       kThreads, 0, stream, p);
}

}  // namespace lora_kernels::lora_linear::cuda
