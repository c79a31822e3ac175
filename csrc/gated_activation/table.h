// The kernels of one instruction set, by dtype and kind.
#pragma once

#include "product_fma.h"

namespace lora_kernels::gated_activation {
namespace {

RowsKernel rows_of(Dtype dtype, Kind kind) {
  switch (dtype) {
    case Dtype::kFloat32:
      return rows_of<float>(kind);
    case Dtype::kBFloat16:
      return rows_of<bf16>(kind);
    case Dtype::kFloat16:
      return rows_of<fp16>(kind);
  }
  return nullptr;
}

const Blocks* fma_blocks(Dtype dtype, Kind kind) {
  switch (dtype) {
    case Dtype::kFloat32:
      return blocks_of<FmaEngine<float>, float>(kind);
    case Dtype::kBFloat16:
      return blocks_of<FmaEngine<bf16>, bf16>(kind);
    case Dtype::kFloat16:
      return blocks_of<FmaEngine<fp16>, fp16>(kind);
  }
  return nullptr;
}

}  // namespace
}  // namespace lora_kernels::gated_activation
