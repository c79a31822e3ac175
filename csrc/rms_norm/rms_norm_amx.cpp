// rms_norm in bf16 with S on AMX tiles. Empty where the compiler has no AMX target.
#define LK_LANES 16

#include "strips.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include "../lora_linear/engine_amx.h"
#endif

namespace lora_kernels::rms_norm {

const Kernels* kernels_amx(Dtype dtype) {
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
  static constexpr Kernels kernels = kernels_of<lora_linear::AmxEngine>();
  return dtype == Dtype::kBFloat16 ? &kernels : nullptr;
#else
  (void)dtype;
  return nullptr;
#endif
}

}  // namespace lora_kernels::rms_norm
