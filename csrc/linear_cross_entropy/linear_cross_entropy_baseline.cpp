// Rows of logits for baseline: 4 lanes.
#define LK_LANES 4
#include "rows.h"

namespace lora_kernels::linear_cross_entropy {

RowsKernel rows_baseline(Dtype dtype) { return rows_of(dtype); }

}  // namespace lora_kernels::linear_cross_entropy
