// quant_linear for AMX-BF16. Compiles to nothing where the compiler has no AMX target.
#include "../lora_linear/product.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include "../lora_linear/engine_amx.h"
#include "tile_dx.h"
#include "bwd.h"
#include "quantize.h"
#include "tile_fwd.h"
#endif

#include "quant_linear.h"

namespace lora_kernels::quant_linear {

const Kernels* kernels_amx(Dtype dtype) {
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
  using E = lora_linear::AmxEngine;
  static const Kernels kernels{"amx",          dequantize,   quantize_flat, quantize_rows,
                               tile_fwd_job(), bwd_job<E>(), E::MR,         E::NV};
  return dtype == Dtype::kBFloat16 ? &kernels : nullptr;
#else
  (void)dtype;
  return nullptr;
#endif
}

}  // namespace lora_kernels::quant_linear
