// lora_linear for baseline: the multiply-add engine at 4 lanes.
#define LK_LANES 4
#define LK_MR 4
#define LK_ROWS 128
#define LK_K_BLOCK 256

#include "product.h"
#include "engine_fma.h"
#include "table.h"

namespace lora_kernels::lora_linear {

const Engine* engine_baseline(Dtype dtype) {
  static const Engine f32 = make_engine<FmaEngine<float>>("baseline");
  static const Engine bfloat = make_engine<FmaEngine<bf16>>("baseline");
  static const Engine half = make_engine<FmaEngine<fp16>>("baseline");
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
