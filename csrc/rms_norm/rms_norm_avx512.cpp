// rms_norm for avx512: 16 lanes, the strips and blocks of lora_linear_avx512.cpp.
#define LK_LANES 16
#define LK_MR 8
#define LK_ROWS 512
#define LK_K_BLOCK 384

#include "fma_kernels.h"

namespace lora_kernels::rms_norm {

const Kernels* kernels_avx512(Dtype dtype) { return fma_kernels(dtype); }

}  // namespace lora_kernels::rms_norm
