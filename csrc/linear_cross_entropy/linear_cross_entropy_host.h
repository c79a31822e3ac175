// Host entry of linear_cross_entropy, bound in bindings.cpp.
#pragma once

#include <torch/types.h>

#include <optional>
#include <string>

namespace lora_kernels::linear_cross_entropy {

// The instruction set whose kernel serves, for explain().
std::string engine_name(at::ScalarType dtype);

// Losses [m] fp32 of logits [m, V] (contiguous rows; fp32, bf16 or fp16); with coefficients [m]
// the logits are overwritten by the gradient of sum coefficients * losses.
at::Tensor losses_of_rows(at::Tensor logits, const at::Tensor& labels,
                          const std::optional<at::Tensor>& coefficients, int64_t ignore_index,
                          double smoothing, double softcap, double z_loss);

}  // namespace lora_kernels::linear_cross_entropy
