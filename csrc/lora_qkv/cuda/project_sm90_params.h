// Argument of project_sm90_kernel.
#pragma once

#include "../../lora_linear/cuda/gemm_sm90_params.h"
#include "heads.h"
#include "launch.h"

namespace lora_kernels::lora_qkv::cuda {

struct ProjectSm90Args {
  lora::Sm90Params gemm;  // without biases
  rope::cuda::Rotation rotation;
  int head_dim;
  HeadsOfProblem heads[kMaxGroup];
};

static_assert(sizeof(ProjectSm90Args) <= 32764, "larger than a kernel's arguments can be");

}  // namespace lora_kernels::lora_qkv::cuda
