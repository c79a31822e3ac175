// lora_linear for avx2: the multiply-add engine at 8 lanes.
#define LK_LANES 8
#define LK_MR 4
#define LK_ROWS 128
#define LK_K_BLOCK 256

#include "few_rows_kernels.h"
#include "fma_engines.h"

namespace lora_kernels::lora_linear {

const Engine* engine_avx2(Dtype dtype) { return fma_engine("avx2", dtype); }
const FewRows* few_rows_avx2(Dtype dtype) { return few_rows_of(dtype); }

}  // namespace lora_kernels::lora_linear
