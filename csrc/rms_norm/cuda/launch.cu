// Launchers of norm.cuh, and what they accept.
#include "launch.h"

#include "../../common/refusals.h"
#include "../../lora_linear/cuda/params.h"
#include "../../lora_linear/cuda/split.h"
#include "norm.cuh"

namespace lora_kernels::rms_norm::cuda {

using lora_linear::cuda::aligned16;
using lora_linear::cuda::ceil_div;

namespace {

static_assert(NormalizeShape<kMaxShrinkColumns>::kShared <= (98 << 10));

template <class Params>
const char* check_common(const Params& p) {
  if (const char* why = check_half(p.dtype)) return why;
  if (p.m < 0 || p.k < 1 || p.m > kMaxExtent || p.k > kMaxExtent) return kExtent;
  if (p.ldx < p.k) return kStride;
  return p.m > 0 && (p.x == nullptr || p.rstd == nullptr) ? kNull : nullptr;
}

template <class T, int RN>
cudaError_t launch_columns(const NormalizeParams& p, bool aligned, cudaStream_t stream) {
  using Shape = NormalizeShape<RN>;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.m, Shape::kRows)));
  return launch_kernel(aligned ? normalize_kernel<T, RN, true> : normalize_kernel<T, RN, false>,
                       grid, kThreads, Shape::kShared, stream, p);
}

template <class T>
cudaError_t launch_dtype(const NormalizeParams& p, bool aligned, cudaStream_t stream) {
  return p.columns == 0    ? launch_columns<T, 0>(p, aligned, stream)
         : p.columns <= 16 ? launch_columns<T, 16>(p, aligned, stream)
         : p.columns <= 32 ? launch_columns<T, 32>(p, aligned, stream)
                           : launch_columns<T, kMaxShrinkColumns>(p, aligned, stream);
}

// Two blocks per multiprocessor: more have more shares of dweight to add.
GradientArgs make_args(const GradientParams& p) {
  const int64_t rows = ceil_div(p.m, 2 * static_cast<int64_t>(p.sm_count < 1 ? 1 : p.sm_count));
  GradientArgs args{p, rows < 1 ? 1 : rows, 0, static_cast<float*>(p.workspace)};
  args.blocks = static_cast<int>(ceil_div(p.m, args.rows_per_block));
  return args;
}

}  // namespace

const char* check(const NormalizeParams& p) {
  if (const char* why = check_common(p)) return why;
  if (p.m > 0 && p.y == nullptr) return kNull;
  if (p.members < 0 || p.members > kMaxMembers) return "more than 8 members";
  int columns = 0;
  for (int j = 0; j < p.members; ++j) {
    const ShrinkMember& w = p.member[j];
    if (w.rank < 1 || w.column != columns) return "a rank is not positive or a column is wrong";
    if (w.lda < p.k) return kStride;
    if (w.a == nullptr) return kNull;
    columns += w.rank;
  }
  if (columns != p.columns || columns > kMaxShrinkColumns) return "S has more than 64 columns";
  return p.members > 0 && p.m > 0 && p.s == nullptr ? kNull : nullptr;
}

const char* check(const GradientParams& p) {
  if (const char* why = check_common(p)) return why;
  if (p.k > kMaxGradientColumns) return "K is larger than 24000";
  if (p.lddy < p.k) return kStride;
  if (p.m > 0 && (p.dy == nullptr || p.dx == nullptr)) return kNull;
  if (p.dw != nullptr && p.weight == nullptr) return kNull;
  return p.workspace == nullptr && gradients_workspace(p) > 0 ? kNull : nullptr;
}

size_t gradients_workspace(const GradientParams& p) {
  return p.dw == nullptr ? 0 : sizeof(float) * make_args(p).blocks * p.k;
}

cudaError_t launch_normalize(const NormalizeParams& p, cudaStream_t stream) {
  if (check(p) != nullptr) return cudaErrorInvalidValue;
  bool aligned = p.k % kElements == 0 && aligned16(p.x, p.ldx) && aligned16(p.y, p.k);
  for (int j = 0; j < p.members; ++j) {
    aligned = aligned && aligned16(p.member[j].a, p.member[j].lda);
  }
  return p.dtype == Dtype::kBFloat16 ? launch_dtype<bf16>(p, aligned, stream)
                                     : launch_dtype<fp16>(p, aligned, stream);
}

cudaError_t launch_gradients(const GradientParams& p, cudaStream_t stream) {
  if (check(p) != nullptr) return cudaErrorInvalidValue;
  const GradientArgs args = make_args(p);
  const bool aligned = p.k % kElements == 0 && aligned16(p.x, p.ldx) && aligned16(p.dy, p.lddy) &&
                       aligned16(p.dx, p.k);
  const size_t held = p.dw == nullptr ? 0 : ceil_div(p.k, kElements) * kElements;
  const size_t shared = sizeof(float) * (2 * kWarps + held);
  const dim3 grid(static_cast<unsigned>(args.blocks));
  const bool is_bf16 = p.dtype == Dtype::kBFloat16;
  const auto kernel = aligned ? (is_bf16 ? norm_gradients_kernel<bf16, true>
                                         : norm_gradients_kernel<fp16, true>)
                              : (is_bf16 ? norm_gradients_kernel<bf16, false>
                                         : norm_gradients_kernel<fp16, false>);
  const cudaError_t error = launch_kernel(kernel, grid, kThreads, shared, stream, args);
  if (error != cudaSuccess || p.dw == nullptr) return error;
  return launch_kernel(norm_sum_kernel, dim3(static_cast<unsigned>(ceil_div(p.k, 32))), kThreads,
                       kThreads * sizeof(float), stream, args);
}

}  // namespace lora_kernels::rms_norm::cuda
