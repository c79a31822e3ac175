// The kernels of one instruction set whose arithmetic is fp32 on vectors, for each dtype of X.
#pragma once

#include "../lora_linear/product.h"

#include "../lora_linear/engine_fma.h"
#include "bwd.h"
#include "quantize.h"
#include "vector_fwd.h"

namespace lora_kernels::quant_linear {
namespace {

template <class T>
Kernels make_vector_kernels(const char* name) {
  using E = lora_linear::FmaEngine<T>;
  return {name,  dequantize, quantize_flat, quantize_rows, vector_fwd_job(), bwd_job<E>(),
          E::MR, E::NV};
}

const Kernels* vector_kernels(const char* name, Dtype dtype) {
  static const Kernels f32 = make_vector_kernels<float>(name);
  static const Kernels bfloat = make_vector_kernels<bf16>(name);
  static const Kernels half = make_vector_kernels<fp16>(name);
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
}  // namespace lora_kernels::quant_linear
