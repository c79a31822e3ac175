// The engines of one instruction set whose arithmetic is engine_fma.h: one per element type.
#pragma once

#include "product.h"

#include "engine_fma.h"
#include "table.h"

namespace lora_kernels::lora_linear {
namespace {

const Engine* fma_engine(const char* name, Dtype dtype) {
  static const Engine f32 = make_engine<FmaEngine<float>>(name);
  static const Engine bfloat = make_engine<FmaEngine<bf16>>(name);
  static const Engine half = make_engine<FmaEngine<fp16>>(name);
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
}  // namespace lora_kernels::lora_linear
