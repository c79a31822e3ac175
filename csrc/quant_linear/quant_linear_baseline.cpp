// quant_linear for baseline: fp32 at 4 lanes.
#define LK_LANES 4
#define LK_MR 4
#define LK_ROWS 128
#define LK_K_BLOCK 256

#include "vector_kernels.h"

namespace lora_kernels::quant_linear {

const Kernels* kernels_baseline(Dtype dtype) { return vector_kernels("baseline", dtype); }

}  // namespace lora_kernels::quant_linear
