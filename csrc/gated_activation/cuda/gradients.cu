// Launchers of gradients.cuh.
#include "../../lora_linear/cuda/params.h"
#include "../../lora_linear/cuda/split.h"
#include "gradients.cuh"
#include "launch.h"

namespace lora_kernels::gated_activation::cuda {

using lora_linear::cuda::aligned16;
using lora_linear::cuda::ceil_div;
using lora_linear::cuda::choose_split;
using lora_linear::cuda::Split;

namespace {

using Narrow = GradientShape<16>;
using Wide = GradientShape<kMaxGradientRank>;
static_assert(Wide::kShared <= (98 << 10));  // what the smallest device has

bool operands_aligned(const GradientParams& p) {
  bool aligned = p.n % kElements == 0 && aligned16(p.dh, p.ldh) && aligned16(p.gate, p.ldg) &&
                 aligned16(p.dgate, p.n) &&
                 (p.up == nullptr || (aligned16(p.up, p.ldu) && aligned16(p.dup, p.n)));
  for (int j = 0; j < p.members; ++j) {
    const GradientMember& w = p.member[j];
    aligned =
        aligned && aligned16(w.b, w.ldb) && (w.s == nullptr || aligned16(w.s, w.lds));
  }
  return aligned;
}

GradientArgs make_args(const GradientParams& p) {
  GradientArgs args{};
  args.p = p;
  args.column_blocks = static_cast<int>(ceil_div(p.n, Narrow::kColumns));
  // About two blocks per multiprocessor: one alone waits for memory in every step.
  const Split split = choose_split(ceil_div(p.m, Narrow::kRows), args.column_blocks,
                                   2 * p.sm_count, 4, p.splits);
  args.splits = split.parts;
  args.rows_per_split = split.per_part * Narrow::kRows;
  float* next = static_cast<float*>(p.workspace);
  args.ds_partials = next;
  next += args.column_blocks * p.m * p.columns;
  for (int j = 0; j < p.members; ++j) {
    args.db_partials[j] = next;
    if (p.member[j].s != nullptr) next += static_cast<int64_t>(args.splits) * p.n * p.member[j].rank;
  }
  return args;
}

template <class T, class Shape, bool kAligned>
cudaError_t launch_shape(const GradientArgs& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.column_blocks), static_cast<unsigned>(args.splits));
  return launch_kernel(gradients_adapter_kernel<T, Shape, kAligned>, grid, Shape::kThreads,
                       Shape::kShared, stream, args);
}

template <class T, bool kAligned>
cudaError_t launch(const GradientParams& p, cudaStream_t stream) {
  if (p.members == 0) {
    const int64_t chunks = p.m * ceil_div(p.n, kElements);
    return launch_kernel(gradients_kernel<T, kAligned>,
                         dim3(static_cast<unsigned>(ceil_div(chunks, kSumThreads))), kSumThreads,
                         0, stream, p);
  }
  const GradientArgs args = make_args(p);
  const bool narrow = p.member[0].rank <= 16 && (p.members == 1 || p.member[1].rank <= 16);
  const cudaError_t error = narrow ? launch_shape<T, Narrow, kAligned>(args, stream)
                                   : launch_shape<T, Wide, kAligned>(args, stream);
  if (error != cudaSuccess) return error;
  int64_t elements = p.m * p.columns;
  for (int j = 0; j < p.members; ++j) {
    if (p.member[j].s != nullptr) elements += p.n * p.member[j].rank;
  }
  return launch_kernel(gradients_sum_kernel<T>,
                       dim3(static_cast<unsigned>(ceil_div(elements, kSumThreads))), kSumThreads,
                       0, stream, args);
}

}  // namespace

size_t gradients_workspace(const GradientParams& p) {
  if (p.members == 0 || p.m == 0) return 0;
  GradientParams without = p;
  without.workspace = nullptr;
  const GradientArgs args = make_args(without);
  int64_t floats = args.column_blocks * p.m * p.columns;
  for (int j = 0; j < p.members; ++j) {
    if (p.member[j].s != nullptr) floats += static_cast<int64_t>(args.splits) * p.n * p.member[j].rank;
  }
  return sizeof(float) * floats;
}

cudaError_t launch_gradients(const GradientParams& p, cudaStream_t stream) {
  if (check(p) != nullptr) return cudaErrorInvalidValue;
  if (p.m == 0) return cudaSuccess;
  const bool aligned = operands_aligned(p);
  if (p.dtype == Dtype::kBFloat16) {
    return aligned ? launch<bf16, true>(p, stream) : launch<bf16, false>(p, stream);
  }
  return aligned ? launch<fp16, true>(p, stream) : launch<fp16, false>(p, stream);
}

}  // namespace lora_kernels::gated_activation::cuda
