// Argument of gemm_sm90_kernel: tensor maps and extents, copied into the argument space.
#pragma once

#include <cuda.h>

#include "params.h"

namespace lora_kernels::lora_linear::cuda {

struct Sm90Problem {
  const void* bias;
  Dtype bias_dtype;
  int n;
  int n_blocks;
  int first_tile;
  int first_term;
  int terms;
};

struct Sm90Params {
  CUtensorMap a[kMaxTerms];
  CUtensorMap b[kMaxTerms];
  CUtensorMap c[kMaxGroup];
  int k[kMaxTerms];
  int stream[kMaxTerms];
  Sm90Problem problem[kMaxGroup];
  int problems;
  int m;
  int m_blocks;  // of a cluster
  int band;
  int tiles;
  Dropout dropout;
};

static_assert(sizeof(Sm90Params) <= 32764, "larger than a kernel's arguments can be");

}  // namespace lora_kernels::lora_linear::cuda
