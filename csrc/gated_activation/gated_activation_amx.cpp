// gated_activation for AMX-BF16: bf16 alone. Compiles to nothing where the compiler has no AMX
// target.
#define LK_LANES 16
#include "gated_activation.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include "product_amx.h"
#endif

namespace lora_kernels::gated_activation {

RowsKernel rows_amx(Dtype dtype, Kind kind) {
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
  if (dtype == Dtype::kBFloat16) return rows_of<bf16>(kind);
#endif
  (void)dtype, (void)kind;
  return nullptr;
}

const Blocks* blocks_amx(Dtype dtype, Kind kind) {
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
  if (dtype == Dtype::kBFloat16) return blocks_of<AmxEngine, bf16>(kind);
#endif
  (void)dtype, (void)kind;
  return nullptr;
}

}  // namespace lora_kernels::gated_activation
