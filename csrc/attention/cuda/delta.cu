// What every gradient of a score is less of, and the gradient of the sinks.
//
// Math      delta_i = sum_d dO_id O_id - dlse_i        dt_h = -sum over b, i of e^(t_h - lse_i) delta_i
// Shapes    dO, O [B, S, H, D]; delta, lse, dlse [B, H, S]; dt [H] (packed: params.h).
// Grid      delta: a warp per row and head, heads fastest. dt: a block per head, its threads stride
//           over the rows, their sums are added in a fixed order.
// Bytes     O and dO once, delta once; dt reads delta and lse once.
// Numerics  fp32 sums.
#include "../../common/convert.cuh"
#include "../../common/mma.cuh"
#include "launch.h"
#include "scores.cuh"

namespace lora_kernels::attention::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;

template <class T>
__global__ void __launch_bounds__(kThreads)
    attention_delta_kernel(const __grid_constant__ BackwardParams params) {
  const AttentionParams& p = params.a;
  const int lane = threadIdx.x % 32;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int head = static_cast<int>(index % p.heads);
  const int64_t place = index / p.heads;  // row of the batch, or of the packed tensor
  const int sequences = p.cu_rows == nullptr ? p.batch : 1;
  if (place >= static_cast<int64_t>(sequences) * p.rows) return;
  const int b = static_cast<int>(place / p.rows), i = static_cast<int>(place % p.rows);
  const T* out = at<T>(params.out, b, 0, i, head);
  const T* dout = at<T>(params.dout, b, 0, i, head);
  float sum = 0.0f;
  for (int d = 2 * lane; d < p.head_dim; d += 64) {
    sum += widen(out[d]) * widen(dout[d]) + widen(out[d + 1]) * widen(dout[d + 1]);
  }
  sum = warp_sum(sum);
  const int64_t at_row = (static_cast<int64_t>(b) * p.heads + head) * p.rows + i;
  if (lane == 0) {
    params.delta[at_row] = params.dlse == nullptr ? sum : sum - params.dlse[at_row];
  }
}

__global__ void __launch_bounds__(kThreads)
    attention_sinks_kernel(const __grid_constant__ BackwardParams params) {
  const AttentionParams& p = params.a;
  LK_DYNAMIC_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);
  const int head = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int sequences = p.cu_rows == nullptr ? p.batch : 1;
  const float sink = p.sinks[head];
  float sum = 0.0f;
  for (int b = 0; b < sequences; ++b) {
    const int64_t first = (static_cast<int64_t>(b) * p.heads + head) * p.rows;
    for (int i = thread; i < p.rows; i += kThreads) {
      const float lse = params.lse[first + i];
      if (lse == -kInfinity) continue;  // then the sink has no weight either
      sum -= exp2_of((sink - lse) * kLog2E) * params.delta[first + i];
    }
  }
  sum = warp_sum(sum);
  if (thread % 32 == 0) sums[thread / 32] = sum;
  __syncthreads();
  if (thread != 0) return;
  float total = 0.0f;
  for (int w = 0; w < kWarps; ++w) total += sums[w];
  params.dsinks[head] = total;
}

}  // namespace

cudaError_t launch_delta(const BackwardParams& p, cudaStream_t stream) {
  if (check(p) != nullptr) return cudaErrorInvalidValue;
  const int64_t rows = static_cast<int64_t>(p.a.cu_rows == nullptr ? p.a.batch : 1) * p.a.rows;
  const int64_t blocks = ceil_div(rows * p.a.heads, kWarps);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(blocks));
  const cudaError_t error =
      p.a.dtype == Dtype::kBFloat16
          ? launch_kernel(attention_delta_kernel<bf16>, grid, kThreads, 0, stream, p)
          : launch_kernel(attention_delta_kernel<fp16>, grid, kThreads, 0, stream, p);
  if (error != cudaSuccess || p.dsinks == nullptr) return error;
  return launch_kernel(attention_sinks_kernel, dim3(static_cast<unsigned>(p.a.heads)), kThreads,
                       4 * kWarps, stream, p);
}

}  // namespace lora_kernels::attention::cuda
