// gated_activation for avx2: 8 lanes.
#define LK_LANES 8
#include "table.h"

namespace lora_kernels::gated_activation {

RowsKernel rows_avx2(Dtype dtype, Kind kind) { return rows_of(dtype, kind); }
const Blocks* blocks_avx2(Dtype dtype, Kind kind) { return fma_blocks(dtype, kind); }

}  // namespace lora_kernels::gated_activation
