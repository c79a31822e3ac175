// lora_linear for avx512: the multiply-add engine at 16 lanes.
#define LK_LANES 16
#define LK_MR 8
#define LK_ROWS 512
#define LK_K_BLOCK 384

#include "product.h"
#include "engine_fma.h"
#include "table.h"

namespace lora_kernels::lora_linear {

const Engine* engine_avx512(Dtype dtype) {
  static const Engine f32 = make_engine<FmaEngine<float>>("avx512");
  static const Engine bfloat = make_engine<FmaEngine<bf16>>("avx512");
  static const Engine half = make_engine<FmaEngine<fp16>>("avx512");
  switch (dtype) {
    case Dtype::kFloat32:
      return &f32;
    case Dtype::kBFloat16:
      return &bfloat;
    case Dtype::kFloat16:
      return &half;
  }
  return nullptr;
}

}  // namespace lora_kernels::lora_linear
