// attention for avx2: the multiply-add engine at 8 lanes.
#define LK_LANES 8
#define LK_MR 4

#include "fma_engines.h"

namespace lora_kernels::attention {

const Engine* engine_avx2(Dtype dtype) { return fma_engine("avx2", dtype); }

}  // namespace lora_kernels::attention
