// Rows of logits for avx512: 16 lanes.
#define LK_LANES 16
#include "rows.h"

namespace lora_kernels::linear_cross_entropy {

RowsKernel rows_avx512(Dtype dtype) { return rows_of(dtype); }

}  // namespace lora_kernels::linear_cross_entropy
