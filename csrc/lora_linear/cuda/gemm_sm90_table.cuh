// The instantiations of gemm_sm90_kernel for one dtype.
#pragma once

#include "gemm_sm90.cuh"
#include "gemm_sm90_kernels.h"

namespace lora_kernels::lora_linear::cuda {

template <typename T>
const void* gemm_sm90_table(OperandLayout layout, int block_n, Sm90Masks masks) {
  const bool transposed = layout == OperandLayout::kKN;
  const void* wide = nullptr;
  const void* narrow = nullptr;
  if (masks == kNoMask) {
    wide = transposed ? reinterpret_cast<const void*>(&gemm_sm90_kernel<T, 256, true, kNoMask>)
                      : reinterpret_cast<const void*>(&gemm_sm90_kernel<T, 256, false, kNoMask>);
    narrow = transposed ? reinterpret_cast<const void*>(&gemm_sm90_kernel<T, 128, true, kNoMask>)
                        : reinterpret_cast<const void*>(&gemm_sm90_kernel<T, 128, false, kNoMask>);
  } else if (transposed) {
    if (masks == kOneMask) {
      wide = reinterpret_cast<const void*>(&gemm_sm90_kernel<T, 256, true, kOneMask>);
    }
    narrow = reinterpret_cast<const void*>(&gemm_sm90_kernel<T, 128, true, kSeveralMasks>);
  }
  return block_n == 256 ? wide : block_n == 128 ? narrow : nullptr;
}

}  // namespace lora_kernels::lora_linear::cuda
