// lora_linear for baseline: the multiply-add engine at 4 lanes.
#define LK_LANES 4
#define LK_MR 4
#define LK_ROWS 128
#define LK_K_BLOCK 256

#include "few_rows_kernels.h"
#include "fma_engines.h"

namespace lora_kernels::lora_linear {

const Engine* engine_baseline(Dtype dtype) { return fma_engine("baseline", dtype); }
const FewRows* few_rows_baseline(Dtype dtype) { return few_rows_of(dtype); }

}  // namespace lora_kernels::lora_linear
