// The variants of skinny_gemm.cuh for one element type.
#pragma once

#include "../../lora_linear/cuda/launch.h"
#include "../../lora_linear/cuda/split.h"
#include "skinny_gemm.cuh"
#include "skinny_gemm_split.h"

namespace lora_kernels::quant_linear::cuda {

template <class T, class S>
cudaError_t launch_skinny_shape(const SkinnyGemmParams& p, cudaStream_t stream) {
  static_assert(S::kShared <= lora_linear::cuda::kSharedMemoryNeeded);
  static_assert(S::kColumns == skinny_columns(S::kRows));
  const lora_linear::cuda::Split split = skinny_split(p);
  SkinnyArgs args{p, static_cast<int>(ceil_div(p.w.k, kTileK)), static_cast<int>(split.per_part),
                  split.parts == 1 ? nullptr : static_cast<float*>(p.workspace), split.parts};
  const dim3 grid(static_cast<unsigned>(ceil_div(p.w.n, S::kColumns)),
                  static_cast<unsigned>(ceil_div(p.m, S::kRows)),
                  static_cast<unsigned>(split.parts));
  const cudaError_t error =
      launch_kernel(skinny_gemm_kernel<T, S>, grid, S::kThreads, S::kShared, stream, args);
  if (error != cudaSuccess || split.parts == 1) return error;
  const dim3 elements(static_cast<unsigned>(ceil_div(p.m * p.w.n, 256)));
  return launch_kernel(skinny_sum_kernel<T>, elements, 256, 0, stream, args);
}

template <class T, class Reader>
cudaError_t launch_skinny_reader(const SkinnyGemmParams& p, cudaStream_t stream) {
  if (p.m <= kFewRows) return launch_skinny_shape<T, SkinnyShape<Reader, 2, 1, 4>>(p, stream);
  return launch_skinny_shape<T, SkinnyShape<Reader, 8, 2, 3>>(p, stream);
}

template <class T>
cudaError_t run_skinny_gemm(const SkinnyGemmParams& p, cudaStream_t stream) {
  switch (p.w.layout) {
    case Layout::kFlat:
      return launch_skinny_reader<T, FlatReader>(p, stream);
    case Layout::kInt8:
      return launch_skinny_reader<T, ByteReader<Layout::kInt8>>(p, stream);
    case Layout::kFp8:
      return launch_skinny_reader<T, ByteReader<Layout::kFp8>>(p, stream);
    case Layout::kGptq:
      return launch_skinny_reader<T, GptqReader>(p, stream);
    default:
      return launch_skinny_reader<T, AwqReader>(p, stream);
  }
}

}  // namespace lora_kernels::quant_linear::cuda
