// The multiply-add engines of one instruction set, one per element type.
#pragma once

#include "product_fma.h"
#include "table.h"

namespace lora_kernels::attention {
namespace {

const Engine* fma_engine(const char* name, Dtype dtype) {
  static const Engine engines[] = {make_engine<FmaEngine<float>>(name),
                                   make_engine<FmaEngine<bf16>>(name),
                                   make_engine<FmaEngine<fp16>>(name)};
  return &engines[static_cast<int>(dtype)];
}

}  // namespace
}  // namespace lora_kernels::attention
