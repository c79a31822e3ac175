// Argument of attention_gradients_sm90_kernel: tensor maps and the problem.
#pragma once

#include "../../common/tensor_map.h"
#include "launch.h"

namespace lora_kernels::attention::cuda {

struct Sm90BackwardParams {
  TensorMap q, k, v, dout;  // [batch, rows or keys, heads, D], boxes of 64 columns and 64 rows
  BackwardParams f;
};

// The kernels, one translation unit per dtype. of_keys: dk and dv, else dq.
cudaError_t run_gradients_sm90_bf16(const Sm90BackwardParams&, bool of_keys, cudaStream_t);
cudaError_t run_gradients_sm90_fp16(const Sm90BackwardParams&, bool of_keys, cudaStream_t);

}  // namespace lora_kernels::attention::cuda
