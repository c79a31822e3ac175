// Launcher of shrink.cuh.
#include "launch.h"
#include "shrink.cuh"

namespace lora_kernels::lora_linear::cuda {
namespace {

static_assert(ShrinkShape<64>::kShared <= kSharedMemoryNeeded);

int padded_columns(const ShrinkParams& p) {
  int64_t columns = 0;
  for (int g = 0; g < p.members; ++g) {
    const int64_t end = p.member[g].padded_column + padded_rank(p.member[g].rank);
    if (end > columns) columns = end;
  }
  return static_cast<int>(columns);
}

constexpr int kUnalignedColumns = 64;  // one variant serves operands without 16-byte rows

int block_columns(int columns, bool aligned) {
  if (!aligned) return kUnalignedColumns;
  const bool wide = shared_memory_limit() >= ShrinkShape<128>::kShared;
  return columns <= 16 ? 16 : columns <= 32 ? 32 : columns <= 64 || !wide ? 64 : 128;
}

bool operands_aligned(const ShrinkParams& p) {
  bool aligned = aligned16(p.x, p.ldx);
  for (int g = 0; g < p.members; ++g) {
    aligned = aligned && aligned16(p.member[g].a, p.member[g].lda);
  }
  return aligned;
}

Split shrink_split(const ShrinkParams& p) {
  const int columns = padded_columns(p);
  const int64_t blocks = ceil_div(p.m, ShrinkShape<16>::kRows) *
                         ceil_div(columns, block_columns(columns, operands_aligned(p)));
  return choose_split(ceil_div(p.k, ShrinkShape<16>::kBlockK), blocks, p.sm_count, 4, p.splits);
}

template <class T, int RN, bool kAligned>
cudaError_t launch(const ShrinkArgs& args, int splits, cudaStream_t stream) {
  using Shape = ShrinkShape<RN>;
  const dim3 grid(static_cast<unsigned>(ceil_div(args.p.m, Shape::kRows)),
                  static_cast<unsigned>(ceil_div(args.columns, RN)), static_cast<unsigned>(splits));
  return launch_kernel(shrink_kernel<T, RN, kAligned>, grid, Shape::kThreads, Shape::kShared,
                       stream, args);
}

template <class T>
cudaError_t launch_dtype(const ShrinkArgs& args, bool aligned, int splits, cudaStream_t stream) {
  if (!aligned) return launch<T, kUnalignedColumns, false>(args, splits, stream);
  switch (block_columns(args.columns, aligned)) {
    case 16:
      return launch<T, 16, true>(args, splits, stream);
    case 32:
      return launch<T, 32, true>(args, splits, stream);
    case 64:
      return launch<T, 64, true>(args, splits, stream);
    default:
      return launch<T, 128, true>(args, splits, stream);
  }
}

}  // namespace

size_t shrink_workspace(const ShrinkParams& p) {
  const Split split = shrink_split(p);
  return split.parts == 1 ? 0 : sizeof(float) * split.parts * p.m * padded_columns(p);
}

cudaError_t launch_shrink(const ShrinkParams& p, cudaStream_t stream) {
  if (check(p) != nullptr) return cudaErrorInvalidValue;
  if (p.m == 0) return cudaSuccess;
  const Split split = shrink_split(p);
  ShrinkArgs args{p, padded_columns(p), static_cast<int>(split.per_part * ShrinkShape<16>::kBlockK),
                  split.parts == 1 ? nullptr : static_cast<float*>(p.workspace)};
  args.p.splits = split.parts;
  const bool aligned = operands_aligned(p);
  const bool is_bf16 = p.dtype == Dtype::kBFloat16;
  const cudaError_t error =
      (is_bf16 ? launch_dtype<bf16> : launch_dtype<fp16>)(args, aligned, split.parts, stream);
  if (error != cudaSuccess || split.parts == 1) return error;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.m * args.columns, 256)));
  return launch_kernel(is_bf16 ? shrink_sum_kernel<bf16> : shrink_sum_kernel<fp16>, grid, 256, 0,
                       stream, args);
}

}  // namespace lora_kernels::lora_linear::cuda
