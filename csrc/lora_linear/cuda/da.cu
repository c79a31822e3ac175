// Launcher of da.cuh.
#include "da.cuh"
#include "launch.h"

namespace lora_kernels::lora_linear::cuda {
namespace {

static_assert(DaShape<64>::shared(true) <= kSharedMemoryNeeded);

struct Plan {
  DaArgs args;
  int ranks;  // RN
  bool aligned;
};

Plan make_plan(const DaParams& p) {
  Plan plan{};
  DaArgs& a = plan.args;
  a.p = p;
  for (int g = 0; g < p.members; ++g) {
    const DaMember& w = p.member[g];
    const int64_t end = w.padded_column + padded_rank(w.rank);
    if (end > a.columns) a.columns = static_cast<int>(end);
    if (w.da != nullptr) a.elements += w.rank * p.k;
  }
  plan.aligned = aligned16(p.x, p.ldx) && aligned16(p.ds, p.ldds);
  plan.ranks = !plan.aligned ? 64 : a.columns <= 16 ? 16 : a.columns <= 32 ? 32 : 64;
  const int64_t blocks = ceil_div(p.k, DaShape<16>::kColumns) * ceil_div(a.columns, plan.ranks);
  const Split split =
      choose_split(ceil_div(p.m, DaShape<16>::kRows), blocks, p.sm_count, 8, p.splits);
  a.splits = split.parts;
  a.rows_per_split = split.per_part * DaShape<16>::kRows;
  a.partials = static_cast<float*>(p.workspace);
  return plan;
}

template <class T, int RN, bool kAligned>
cudaError_t launch(const Plan& plan, cudaStream_t stream) {
  using Shape = DaShape<RN>;
  const dim3 grid(static_cast<unsigned>(ceil_div(plan.args.p.k, Shape::kColumns)),
                  static_cast<unsigned>(ceil_div(plan.args.columns, RN)),
                  static_cast<unsigned>(plan.args.splits));
  return launch_kernel(da_kernel<T, RN, kAligned>, grid, Shape::kThreads,
                       Shape::shared(plan.args.p.dropout.threshold != 0), stream, plan.args);
}

template <class T>
cudaError_t launch_dtype(const Plan& plan, cudaStream_t stream) {
  return !plan.aligned      ? launch<T, 64, false>(plan, stream)
         : plan.ranks == 16 ? launch<T, 16, true>(plan, stream)
         : plan.ranks == 32 ? launch<T, 32, true>(plan, stream)
                            : launch<T, 64, true>(plan, stream);
}

}  // namespace

size_t da_workspace(const DaParams& p) {
  const Plan plan = make_plan(p);
  return plan.args.elements == 0 ? 0 : sizeof(float) * plan.args.splits * plan.args.columns * p.k;
}

cudaError_t launch_da(const DaParams& p, cudaStream_t stream) {
  if (check(p) != nullptr) return cudaErrorInvalidValue;
  const Plan plan = make_plan(p);
  if (plan.args.elements == 0) return cudaSuccess;
  const cudaError_t error = p.dtype == Dtype::kBFloat16 ? launch_dtype<bf16>(plan, stream)
                                                        : launch_dtype<fp16>(plan, stream);
  if (error != cudaSuccess) return error;
  return launch_kernel(da_sum_kernel,
                       dim3(static_cast<unsigned>(ceil_div(plan.args.elements, 256))), 256, 0,
                       stream, plan.args);
}

}  // namespace lora_kernels::lora_linear::cuda
