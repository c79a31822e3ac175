// Losses of rows of logits, and their gradient in place of the logits. No torch headers.
//
//   z    = c tanh(logits / c) where softcap c > 0, else the logits
//   lse  = max_v z + log sum_v exp(z_v - max)
//   loss = lse - (1 - e) z_y - e mean_v z_v + q lse^2
//   grad = g ((1 + 2 q lse) exp(z_v - lse) - e / V - (1 - e) [v = y]) (1 - (z_v / c)^2)
//
// with smoothing e, z-loss q and the row's coefficient g. Three passes over a row (max, sum,
// gradient), which stays in L2; logits are read from memory once and written once.
// Numerics: fp32 (inputs of lower precision are widened exactly), sums in as many partial
// sums as a vector has lanes, one rounding at the store. Rows are independent: the result does not depend on the chunk.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace lora_kernels::linear_cross_entropy {

struct RowsParams {
  void* logits;  // [rows, vocabulary], overwritten by the gradient where coefficients are given
  int64_t ld;
  int64_t rows, vocabulary;
  const int64_t* labels;      // [rows]; ignore_index: loss 0 and gradient 0
  const float* coefficients;  // [rows], null: losses only
  float* losses;              // [rows]
  int64_t ignore_index;
  float smoothing, softcap, z_loss;
};

using RowsKernel = void (*)(const RowsParams&, int64_t begin, int64_t end);

RowsKernel rows_avx512(Dtype);
RowsKernel rows_avx2(Dtype);
RowsKernel rows_baseline(Dtype);

}  // namespace lora_kernels::linear_cross_entropy
