// gated_activation for baseline: 4 lanes.
#define LK_LANES 4
#include "table.h"

namespace lora_kernels::gated_activation {

RowsKernel rows_baseline(Dtype dtype, Kind kind) { return rows_of(dtype, kind); }
const Blocks* blocks_baseline(Dtype dtype, Kind kind) { return fma_blocks(dtype, kind); }

}  // namespace lora_kernels::gated_activation
