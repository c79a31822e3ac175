// lora_linear for avx512: the multiply-add engine at 16 lanes.
#define LK_LANES 16
#define LK_MR 8
#define LK_ROWS 512
#define LK_K_BLOCK 384

#include "few_rows_kernels.h"
#include "fma_engines.h"

namespace lora_kernels::lora_linear {

const Engine* engine_avx512(Dtype dtype) { return fma_engine("avx512", dtype); }
const FewRows* few_rows_avx512(Dtype dtype) { return few_rows_of(dtype); }

}  // namespace lora_kernels::lora_linear
