// The instantiations of gemm_sm90_kernel for one dtype.
#pragma once

#include "gemm_sm90.cuh"
#include "gemm_sm90_kernels.h"

namespace lora_kernels::lora_linear::cuda {

template <typename T>
const void* gemm_sm90_table(OperandLayout layout, int block_n, bool masked) {
  const bool transposed = layout == OperandLayout::kKN;
  if (masked) {
    return transposed && block_n == 128
               ? reinterpret_cast<const void*>(&gemm_sm90_kernel<T, 128, true, true>)
               : nullptr;
  }
  if (block_n == 256) {
    return transposed ? reinterpret_cast<const void*>(&gemm_sm90_kernel<T, 256, true, false>)
                      : reinterpret_cast<const void*>(&gemm_sm90_kernel<T, 256, false, false>);
  }
  if (block_n == 128) {
    return transposed ? reinterpret_cast<const void*>(&gemm_sm90_kernel<T, 128, true, false>)
                      : reinterpret_cast<const void*>(&gemm_sm90_kernel<T, 128, false, false>);
  }
  return nullptr;
}

}  // namespace lora_kernels::lora_linear::cuda
