// rms_norm for baseline: 4 lanes, the strips and blocks of lora_linear_baseline.cpp.
#define LK_LANES 4
#define LK_MR 4
#define LK_ROWS 128
#define LK_K_BLOCK 256

#include "fma_kernels.h"

namespace lora_kernels::rms_norm {

const Kernels* kernels_baseline(Dtype dtype) { return fma_kernels(dtype); }

}  // namespace lora_kernels::rms_norm
