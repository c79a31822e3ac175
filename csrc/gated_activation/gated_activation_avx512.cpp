// gated_activation for avx512: 16 lanes.
#define LK_LANES 16
#include "table.h"

namespace lora_kernels::gated_activation {

RowsKernel rows_avx512(Dtype dtype, Kind kind) { return rows_of(dtype, kind); }
const Blocks* blocks_avx512(Dtype dtype, Kind kind) { return fma_blocks(dtype, kind); }

}  // namespace lora_kernels::gated_activation
