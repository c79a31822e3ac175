// gated_activation for baseline: 4 lanes.
#define LK_LANES 4
#include "rows.h"

namespace lora_kernels::gated_activation {

RowsKernel rows_baseline(Dtype dtype, Kind kind) { return rows_of(dtype, kind); }

}  // namespace lora_kernels::gated_activation
