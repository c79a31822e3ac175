// Entry points of gemm_sm90.cuh, one translation unit per dtype; null where there is no such
// kernel.
#pragma once

#include "params.h"

namespace lora_kernels::lora_linear::cuda {

const void* gemm_sm90_bf16(OperandLayout, int block_n, bool masked);
const void* gemm_sm90_fp16(OperandLayout, int block_n, bool masked);

}  // namespace lora_kernels::lora_linear::cuda
