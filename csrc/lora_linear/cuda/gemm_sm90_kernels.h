// Entry points of gemm_sm90.cuh, one translation unit per dtype; null where there is no such
// kernel.
#pragma once

#include "params.h"

namespace lora_kernels::lora_linear::cuda {

// Masked terms per problem that a kernel is made for.
enum Sm90Masks : int { kNoMask = 0, kOneMask = 1, kSeveralMasks = 2 };

const void* gemm_sm90_bf16(OperandLayout, int block_n, Sm90Masks);
const void* gemm_sm90_fp16(OperandLayout, int block_n, Sm90Masks);

}  // namespace lora_kernels::lora_linear::cuda
