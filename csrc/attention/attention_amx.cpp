// attention for AMX-BF16. Compiles to an empty engine where the compiler has no AMX target.
#include "attention.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define LK_LANES 16
#include "product_amx.h"
#include "table.h"
#endif

namespace lora_kernels::attention {

const Engine* engine_amx(Dtype dtype) {
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
  static const Engine engine = make_engine<AmxEngine>("amx");
  return dtype == Dtype::kBFloat16 ? &engine : nullptr;
#else
  (void)dtype;
  return nullptr;
#endif
}

}  // namespace lora_kernels::attention
