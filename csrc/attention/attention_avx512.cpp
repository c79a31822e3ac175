// attention for avx512: the multiply-add engine at 16 lanes.
#define LK_LANES 16
#define LK_MR 8

#include "decode_engine.h"
#include "fma_engines.h"

namespace lora_kernels::attention {

const Engine* engine_avx512(Dtype dtype) { return fma_engine("avx512", dtype); }
const DecodeEngine* decode_avx512(Dtype dtype) { return decode_engine(dtype); }

}  // namespace lora_kernels::attention
