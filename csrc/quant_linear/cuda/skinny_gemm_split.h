// How skinny_gemm.cuh shares K between blocks. Host code.
#pragma once

#include "../../lora_linear/cuda/split.h"
#include "launch.h"

namespace lora_kernels::quant_linear::cuda {

using lora_linear::cuda::ceil_div;

constexpr int64_t kFewRows = 16;  // rows of the variant with tiles of 16 rows

constexpr int skinny_columns(int64_t rows) { return rows <= kFewRows ? 64 : 128; }

// Of N, K and the device alone, so that the bits of a row do not depend on the others. Few rows:
// four blocks per multiprocessor, whose copies under way fill the memory's latency. More: one,
// since partial sums of 64 rows weigh as much as the codes.
inline lora_linear::cuda::Split skinny_split(const SkinnyGemmParams& p) {
  const bool few = p.m <= kFewRows;
  const int64_t steps = ceil_div(p.w.k, 128);
  const int64_t blocks = ceil_div(p.w.n, skinny_columns(p.m));
  return lora_linear::cuda::choose_split(steps, blocks, few ? 4 * p.sm_count : p.sm_count, 4,
                                         p.splits);
}

cudaError_t run_skinny_gemm_bf16(const SkinnyGemmParams&, cudaStream_t);
cudaError_t run_skinny_gemm_fp16(const SkinnyGemmParams&, cudaStream_t);

}  // namespace lora_kernels::quant_linear::cuda
