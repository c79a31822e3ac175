// Argument of attention_forward_sm90_kernel: tensor maps and the problem.
#pragma once

#include "../../common/tensor_map.h"
#include "launch.h"

namespace lora_kernels::attention::cuda {

struct Sm90ForwardParams {
  TensorMap q, k, v;  // [batch, rows or keys, heads, D], boxes of 64 columns and 128 rows
  ForwardParams f;
};

// The kernels, one translation unit per dtype.
cudaError_t run_forward_sm90_bf16(const Sm90ForwardParams&, cudaStream_t);
cudaError_t run_forward_sm90_fp16(const Sm90ForwardParams&, cudaStream_t);

}  // namespace lora_kernels::attention::cuda
