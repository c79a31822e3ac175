// The variants of skinny_gemm.cuh and skinny_dgrad.cuh for one element type.
#pragma once

#include "../../lora_linear/cuda/launch.h"
#include "skinny_dgrad.cuh"
#include "skinny_gemm.cuh"
#include "skinny_gemm_split.h"

namespace lora_kernels::quant_linear::cuda {

template <class S>
using SkinnyKernel = void (*)(SkinnyArgs);

template <class T, class S>
cudaError_t launch_skinny_shape(const SkinnyParams& p, SkinnyKernel<S> kernel,
                                cudaStream_t stream) {
  constexpr size_t kLowRank = LowRankShape<S::MT>::kShared;
  static_assert(S::kShared <= lora_linear::cuda::kSharedMemoryNeeded);
  static_assert(kLowRank <= lora_linear::cuda::kSharedMemoryNeeded);
  static_assert(kTileK == kSkinnyStep && LowRankShape<S::MT>::kRanks == kRankTile);
  const lora_linear::cuda::Split split = skinny_split(p);
  SkinnyArgs args{};
  args.p = p;
  args.extent = skinny_p(p);
  args.sum = skinny_q(p);
  args.steps = static_cast<int>(ceil_div(args.sum, kSkinnyStep));
  args.steps_per_part = static_cast<int>(split.per_part);
  args.tiles = static_cast<int>(skinny_tiles(p));
  args.parts = split.parts;
  args.partials = skinny_workspace(p) == 0 ? nullptr : static_cast<float*>(p.workspace);
  const dim3 grid(static_cast<unsigned>(args.tiles + ceil_div(p.rank, kRankTile)),
                  static_cast<unsigned>(ceil_div(p.m, S::kRows)),
                  static_cast<unsigned>(split.parts));
  const size_t shared = p.rank > 0 && kLowRank > S::kShared ? kLowRank : S::kShared;
  const cudaError_t error = launch_kernel(kernel, grid, S::kThreads, shared, stream, args);
  if (error != cudaSuccess || args.partials == nullptr) return error;
  const dim3 tiles(static_cast<unsigned>(ceil_div(args.extent, FinishShape::kColumns)),
                   static_cast<unsigned>(ceil_div(p.m, FinishShape::kRows)));
  return launch_kernel(skinny_finish_kernel<T>, tiles, FinishShape::kThreads,
                       p.rank > 0 ? FinishShape::kShared : 0, stream, args);
}

template <class T, class Rows, class Columns>
cudaError_t launch_skinny_layout(const SkinnyParams& p, cudaStream_t stream) {
  if (p.dgrad) {
    using Few = DgradShape<Columns, 2>;
    using More = DgradShape<Columns, 8>;
    if (p.m <= kFewRows) {
      return launch_skinny_shape<T, Few>(p, skinny_dgrad_kernel<T, Few>, stream);
    }
    return launch_skinny_shape<T, More>(p, skinny_dgrad_kernel<T, More>, stream);
  }
  using Few = SkinnyShape<Rows, 2, 1, 4>;
  using More = SkinnyShape<Rows, 8, 2, 3>;
  static_assert(Few::kColumns == skinny_columns(Few::kRows));
  static_assert(More::kColumns == skinny_columns(More::kRows));
  if (p.m <= kFewRows) {
    return launch_skinny_shape<T, Few>(p, skinny_gemm_kernel<T, Few>, stream);
  }
  return launch_skinny_shape<T, More>(p, skinny_gemm_kernel<T, More>, stream);
}

template <class T>
cudaError_t run_skinny(const SkinnyParams& p, cudaStream_t stream) {
  switch (p.w.layout) {
    case Layout::kFlat:
      return launch_skinny_layout<T, FlatReader, FlatColumns>(p, stream);
    case Layout::kInt8:
      return launch_skinny_layout<T, ByteReader<Layout::kInt8>, ByteColumns<Layout::kInt8>>(p,
                                                                                         stream);
    case Layout::kFp8:
      return launch_skinny_layout<T, ByteReader<Layout::kFp8>, ByteColumns<Layout::kFp8>>(p,
                                                                                       stream);
    case Layout::kGptq:
      return launch_skinny_layout<T, GptqReader, GptqColumns>(p, stream);
    default:
      return launch_skinny_layout<T, AwqReader, AwqColumns>(p, stream);
  }
}

}  // namespace lora_kernels::quant_linear::cuda
