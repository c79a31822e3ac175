// quant_linear for avx2: fp32 at 8 lanes.
#define LK_LANES 8
#define LK_MR 4
#define LK_ROWS 128
#define LK_K_BLOCK 256

#include "vector_kernels.h"

namespace lora_kernels::quant_linear {

const Kernels* kernels_avx2(Dtype dtype) { return vector_kernels("avx2", dtype); }

}  // namespace lora_kernels::quant_linear
