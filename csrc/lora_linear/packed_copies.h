// Packed copies of frozen weights, kept from call to call. Policy and budget are the caller's
// (lora_kernels/ops/lora_linear/packing.py).
//
// A copy stands for a view of a storage: its offset, shape, strides and dtype, the dtype of the
// products and the direction. It is valid while the storage lives, the version counter stands and
// a sample of about 8 x 8 elements has the bits it had.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace lora_kernels::lora_linear {

// The copy of weight [N, K] as pack_weight would make it now; nothing where there is no valid one.
std::optional<at::Tensor> packed_copy(const at::Tensor& weight, at::ScalarType dtype,
                                      bool for_dgrad);

// Keeps `packed`, unless all copies would then take more than `budget` bytes (negative: no limit).
bool keep_packed_copy(const at::Tensor& weight, at::ScalarType dtype, bool for_dgrad,
                      const at::Tensor& packed, int64_t budget);

int64_t packed_copies_bytes();  // of those whose weight lives
int64_t packed_copies_count();
void drop_packed_copies();

}  // namespace lora_kernels::lora_linear
