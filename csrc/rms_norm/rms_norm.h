// rms_norm on the CPU. No torch headers. Formulas: lora_kernels/ops/rms_norm/reference.py.
//
// Forward, of one row: the sum of squares and the product read the row twice, the second time from
// L1. S [M, R] = Y A^T comes from rows of Y that were just written. Backward, likewise: dy and x are
// read twice, dx is written once; dweight is summed per chunk of rows into a slot of its own.
//
// Numerics: fp32, one rounding at each store. A row is summed in LK_LANES * kUnroll interleaved sums
// that are added in a fixed order, so its bits do not depend on the other rows or on the threads. A
// chunk is `chunk_rows` rows whatever the threads, its slot is summed in blocks of 32 rows.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace lora_kernels::rms_norm {

struct ForwardParams {
  int64_t columns;
  const void* x;  // [M, columns], rows ldx apart
  int64_t ldx;
  const float* gain;  // [columns] offset + weight; null: 1
  float eps;
  void* y;              // [M, columns]
  float* rstd;          // [M]
  const float* shrink;  // A^T [columns, ranks_padded] in fp32, zero beyond ranks; null: no S
  int64_t ranks, ranks_padded;
  void* s;  // [M, ranks]
};

struct BackwardParams {
  int64_t columns;
  const void *dy, *x;
  int64_t lddy, ldx;
  const float *gain, *rstd;
  void* dx;         // [M, columns]
  float* dweights;  // [chunks, columns], zeros; null: not needed
  int64_t chunk_rows;
};

using ForwardRows = void (*)(const ForwardParams&, int64_t begin, int64_t end);
using BackwardRows = void (*)(const BackwardParams&, int64_t begin, int64_t end);

struct Kernels {
  ForwardRows forward;
  BackwardRows backward;  // with dweights: `begin` is where a chunk begins, `end` where it ends
};

Kernels kernels_avx512(Dtype);
Kernels kernels_avx2(Dtype);
Kernels kernels_baseline(Dtype);

constexpr int64_t kRankBlock = 16;  // ranks_padded is a multiple of it

}  // namespace lora_kernels::rms_norm
