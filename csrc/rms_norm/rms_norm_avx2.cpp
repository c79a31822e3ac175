// rms_norm for avx2: 8 lanes, the strips and blocks of lora_linear_avx2.cpp.
#define LK_LANES 8
#define LK_MR 4
#define LK_ROWS 128
#define LK_K_BLOCK 256

#include "fma_kernels.h"

namespace lora_kernels::rms_norm {

const Kernels* kernels_avx2(Dtype dtype) { return fma_kernels(dtype); }

}  // namespace lora_kernels::rms_norm
