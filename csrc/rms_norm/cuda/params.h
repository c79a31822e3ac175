// Arguments of the GPU kernels of rms_norm. POD, torch-free. T is the 16-bit dtype of x, y, dy, dx.
#pragma once

#include <cstdint>

#include "../../common/dtype.h"

namespace lora_kernels::rms_norm::cuda {

constexpr int kMaxMembers = 8;
constexpr int kMaxShrinkColumns = 64;  // sum of ranks that the norm makes S of
constexpr int kMaxGradientColumns = 24000;  // K: the share of dweight lies in shared memory

struct ShrinkMember {
  const void* a;  // [rank, K] of T
  int64_t lda;
  int rank, column;  // first column in S
};

struct NormalizeParams {
  Dtype dtype;
  int64_t m, k;
  const void* x;  // [M, K]
  int64_t ldx;
  const void* weight;  // [K] of weight_dtype, or null
  Dtype weight_dtype;
  float eps, offset;
  void* y;      // [M, K] contiguous
  float* rstd;  // [M]
  int members;  // 0: no S
  ShrinkMember member[kMaxMembers];
  void* s;      // [M, columns] contiguous
  int columns;  // sum of ranks
};

struct GradientParams {
  Dtype dtype;
  int64_t m, k;
  const void *dy, *x;  // [M, K]
  int64_t lddy, ldx;
  const void* weight;
  Dtype weight_dtype;
  const float* rstd;
  float offset;
  void* dx;  // [M, K] contiguous
  void* dw;  // [K] of weight_dtype, or null
  int sm_count;
  void* workspace;  // gradients_workspace(p) bytes
};

}  // namespace lora_kernels::rms_norm::cuda
