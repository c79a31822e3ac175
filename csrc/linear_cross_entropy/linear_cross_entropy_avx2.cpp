// Rows of logits for avx2: 8 lanes.
#define LK_LANES 8
#include "rows.h"

namespace lora_kernels::linear_cross_entropy {

RowsKernel rows_avx2(Dtype dtype) { return rows_of(dtype); }

}  // namespace lora_kernels::linear_cross_entropy
