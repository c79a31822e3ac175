// attention for baseline: the multiply-add engine at 4 lanes.
#define LK_LANES 4
#define LK_MR 4

#include "decode_engine.h"
#include "fma_engines.h"

namespace lora_kernels::attention {

const Engine* engine_baseline(Dtype dtype) { return fma_engine("baseline", dtype); }
const DecodeEngine* decode_baseline(Dtype dtype) { return decode_engine(dtype); }

}  // namespace lora_kernels::attention
