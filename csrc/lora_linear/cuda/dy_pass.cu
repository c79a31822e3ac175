// Launcher of dy_pass.cuh.
#include "dy_pass.cuh"
#include "launch.h"

namespace lora_kernels::lora_linear::cuda {
namespace {

using DySmall = DyShape<16, true>;
using DyNarrow = DyShape<16, false>;
using DyMiddle = DyShape<32, false>;
using DyWide = DyShape<64, false>;
static_assert(DySmall::kShared <= kSharedMemoryNeeded);

struct Plan {
  DyPassArgs args;
  int ranks;   // RN
  int blocks;  // in x
  bool aligned, small;
  int64_t floats;
};

Plan make_plan(const DyPassParams& p) {
  Plan plan{};
  DyPassArgs& a = plan.args;
  a.p = p;
  int64_t widest = 0, columns = 0;
  for (int g = 0; g < p.members; ++g) {
    const int64_t end = p.member[g].padded_column + padded_rank(p.member[g].rank);
    if (p.member[g].rank > widest) widest = p.member[g].rank;
    if (end > columns) columns = end;
  }
  plan.aligned = true;
  for (int g = 0; g < p.members; ++g) {
    const DyMember& w = p.member[g];
    plan.aligned = plan.aligned && aligned16(w.dy, w.lddy) &&
                   (p.ds == nullptr || aligned16(w.b, w.ldb)) &&
                   (w.db == nullptr || aligned16(w.s, w.lds));
  }
  plan.small = !plan.aligned || shared_memory_limit() < DyWide::kShared;
  plan.ranks = plan.small || widest <= 16 ? 16 : widest <= 32 ? 32 : 64;
  for (int g = 0; g < p.members; ++g) {
    const DyMember& w = p.member[g];
    DyPlan& d = a.plan[g];
    d.first_block = plan.blocks;
    d.column_blocks = static_cast<int>(ceil_div(w.n, DyNarrow::kColumns));
    d.rank_chunks = static_cast<int>(ceil_div(w.rank, plan.ranks));
    plan.blocks += d.column_blocks * d.rank_chunks;
    d.ds_partials = plan.floats;
    if (p.ds != nullptr) plan.floats += d.column_blocks * p.m * padded_rank(w.rank);
  }
  const Split split =
      choose_split(ceil_div(p.m, DyNarrow::kRows), plan.blocks, p.sm_count, 4, p.splits);
  a.splits = split.parts;
  a.rows_per_split = split.per_part * DyNarrow::kRows;
  for (int g = 0; g < p.members; ++g) {
    const DyMember& w = p.member[g];
    a.plan[g].db_partials = plan.floats;
    a.plan[g].db_elements = a.db_elements;
    if (w.db == nullptr) continue;
    plan.floats += static_cast<int64_t>(a.splits) * w.n * padded_rank(w.rank);
    a.db_elements += w.n * w.rank;
  }
  a.ds_elements = p.ds == nullptr ? 0 : p.m * columns;
  a.partials = static_cast<float*>(p.workspace);
  return plan;
}

template <class T, class Shape, bool kAligned>
cudaError_t launch(const Plan& plan, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.args.splits));
  return launch_kernel(dy_pass_kernel<T, Shape, kAligned>, grid, Shape::kThreads, Shape::kShared,
                       stream, plan.args);
}

template <class T>
cudaError_t launch_dtype(const Plan& plan, cudaStream_t stream) {
  cudaError_t error = !plan.aligned      ? launch<T, DySmall, false>(plan, stream)
                      : plan.small       ? launch<T, DySmall, true>(plan, stream)
                      : plan.ranks == 16 ? launch<T, DyNarrow, true>(plan, stream)
                      : plan.ranks == 32 ? launch<T, DyMiddle, true>(plan, stream)
                                         : launch<T, DyWide, true>(plan, stream);
  if (error != cudaSuccess) return error;
  const int64_t elements = plan.args.ds_elements + plan.args.db_elements;
  return launch_kernel(dy_sum_kernel<T>, dim3(static_cast<unsigned>(ceil_div(elements, 256))), 256,
                       0, stream, plan.args);
}

}  // namespace

size_t dy_pass_workspace(const DyPassParams& p) { return sizeof(float) * make_plan(p).floats; }

cudaError_t launch_dy_pass(const DyPassParams& p, cudaStream_t stream) {
  if (check(p) != nullptr) return cudaErrorInvalidValue;
  const Plan plan = make_plan(p);
  return p.dtype == Dtype::kBFloat16 ? launch_dtype<bf16>(plan, stream)
                                     : launch_dtype<fp16>(plan, stream);
}

}  // namespace lora_kernels::lora_linear::cuda
