// gated_activation on the CPU: one pass over rows, forward or backward. No torch headers. Formulas:
// lora_kernels/ops/gated_activation/reference.py.
//
// Bytes moved: every operand read once, every result written once. fp32 arithmetic, one rounding at
// each store. Elements are independent, so the result does not depend on the threads.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace lora_kernels::gated_activation {

enum class Kind : int { kSilu, kGeluTanh, kRelu, kReluSquared };

struct RowsParams {
  int64_t columns;
  const void *dh, *gate, *up;  // dh null: forward; up null: not gated
  int64_t lddh, ldgate, ldup;
  void *h, *dgate, *dup;       // contiguous rows; h in the forward, the others in the backward
};

using RowsKernel = void (*)(const RowsParams&, int64_t begin, int64_t end);

RowsKernel rows_avx512(Dtype, Kind);
RowsKernel rows_avx2(Dtype, Kind);
RowsKernel rows_baseline(Dtype, Kind);

}  // namespace lora_kernels::gated_activation
