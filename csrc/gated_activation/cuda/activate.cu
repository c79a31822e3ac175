// Launchers of activate.cuh.
#include "../../lora_linear/cuda/params.h"
#include "../../lora_linear/cuda/split.h"
#include "activate.cuh"
#include "launch.h"

namespace lora_kernels::gated_activation::cuda {

using lora_linear::cuda::aligned16;
using lora_linear::cuda::ceil_div;
using lora_linear::cuda::choose_split;
using lora_linear::cuda::Split;

namespace {

static_assert(activate_shared<kMaxShrinkColumns>() <= kDefaultShared);

bool operands_aligned(const ActivateParams& p) {
  bool aligned = p.n % kElements == 0 && aligned16(p.gate, p.ldg) && aligned16(p.h, p.n) &&
                 (p.up == nullptr || aligned16(p.up, p.ldu));
  for (int j = 0; j < p.members; ++j) {
    aligned = aligned && aligned16(p.member[j].a, p.member[j].lda);
  }
  return aligned;
}

// About four blocks per multiprocessor: one alone waits for memory in every step.
Split split_of(const ActivateParams& p) {
  return choose_split(ceil_div(p.n, ActivateShape::kBlock), ceil_div(p.m, ActivateShape::kRows),
                      4 * p.sm_count, 8, p.splits);
}

template <class T, int RN, bool kAligned>
cudaError_t launch_columns(const ActivateArgs& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(args.p.m, ActivateShape::kRows)),
                  static_cast<unsigned>(args.p.splits));
  return launch_kernel(activate_shrink_kernel<T, RN, kAligned>, grid, ActivateShape::kThreads,
                       activate_shared<RN>(), stream, args);
}

template <class T, bool kAligned>
cudaError_t launch(const ActivateParams& p, cudaStream_t stream) {
  if (p.members == 0) {
    const int64_t chunks = p.m * ceil_div(p.n, kElements);
    return launch_kernel(activate_kernel<T, kAligned>,
                         dim3(static_cast<unsigned>(ceil_div(chunks, kPlainThreads))),
                         kPlainThreads, 0, stream, p);
  }
  const Split split = split_of(p);
  ActivateArgs args{p, split.per_part * ActivateShape::kBlock,
                    split.parts == 1 ? nullptr : static_cast<float*>(p.workspace)};
  args.p.splits = split.parts;
  const cudaError_t error =
      p.columns <= 16 ? launch_columns<T, 16, kAligned>(args, stream)
      : p.columns <= 32 ? launch_columns<T, 32, kAligned>(args, stream)
                        : launch_columns<T, 64, kAligned>(args, stream);
  if (error != cudaSuccess || split.parts == 1) return error;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.m * p.columns, kPlainThreads)));
  return launch_kernel(activate_sum_kernel<T>, grid, kPlainThreads, 0, stream, args);
}

}  // namespace

size_t activate_workspace(const ActivateParams& p) {
  if (p.members == 0 || p.m == 0) return 0;
  const Split split = split_of(p);
  return split.parts == 1 ? 0 : sizeof(float) * split.parts * p.m * p.columns;
}

cudaError_t launch_activate(const ActivateParams& p, cudaStream_t stream) {
  if (check(p) != nullptr) return cudaErrorInvalidValue;
  if (p.m == 0) return cudaSuccess;
  const bool aligned = operands_aligned(p);
  if (p.dtype == Dtype::kBFloat16) {
    return aligned ? launch<bf16, true>(p, stream) : launch<bf16, false>(p, stream);
  }
  return aligned ? launch<fp16, true>(p, stream) : launch<fp16, false>(p, stream);
}

}  // namespace lora_kernels::gated_activation::cuda
