// The kernels of one instruction set over lora_linear's multiply-add engine: one per element type.
#pragma once

#include "strips.h"

#include "../lora_linear/engine_fma.h"

namespace lora_kernels::rms_norm {
namespace {

const Kernels* fma_kernels(Dtype dtype) {
  static constexpr Kernels f32 = kernels_of<lora_linear::FmaEngine<float>>();
  static constexpr Kernels bfloat = kernels_of<lora_linear::FmaEngine<bf16>>();
  static constexpr Kernels half = kernels_of<lora_linear::FmaEngine<fp16>>();
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

}  // namespace
}  // namespace lora_kernels::rms_norm
