// A projection as the epilogue of project_sm90.cuh sees it. Plain data.
#pragma once

#include "../../common/dtype.h"

namespace lora_kernels::lora_qkv::cuda {

struct HeadsOfProblem {
  const void* bias;  // [n] or null
  Dtype bias_dtype;
  int n;
  int rotated;  // heads, from the first on
};

}  // namespace lora_kernels::lora_qkv::cuda
