// lora_linear for avx2: the multiply-add engine at 8 lanes.
#define LK_LANES 8
#define LK_MR 4
#define LK_ROWS 128
#define LK_K_BLOCK 256

#include "product.h"
#include "engine_fma.h"
#include "table.h"

namespace lora_kernels::lora_linear {

const Engine* engine_avx2(Dtype dtype) {
  static const Engine f32 = make_engine<FmaEngine<float>>("avx2");
  static const Engine bfloat = make_engine<FmaEngine<bf16>>("avx2");
  static const Engine half = make_engine<FmaEngine<fp16>>("avx2");
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
