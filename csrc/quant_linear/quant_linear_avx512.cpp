// quant_linear for avx512: fp32 at 16 lanes.
#define LK_LANES 16
#define LK_MR 8
#define LK_ROWS 512
#define LK_K_BLOCK 384

#include "vector_kernels.h"

namespace lora_kernels::quant_linear {

const Kernels* kernels_avx512(Dtype dtype) { return vector_kernels("avx512", dtype); }

}  // namespace lora_kernels::quant_linear
