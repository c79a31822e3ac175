// attention for avx2: the multiply-add engine at 8 lanes.
#define LK_LANES 8
#define LK_MR 4

#include "decode_engine.h"
#include "fma_engines.h"

namespace lora_kernels::attention {

const Engine* engine_avx2(Dtype dtype) { return fma_engine("avx2", dtype); }
const DecodeEngine* decode_avx2(Dtype dtype) { return decode_engine(dtype); }

}  // namespace lora_kernels::attention
