// Host entries of gated_activation on the CPU, as bound to Python. Everything is 2-D; kind is silu,
// gelu_tanh, relu or relu_squared.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace lora_kernels::gated_activation {

at::Tensor gated_activation_fwd(const at::Tensor& gate, const std::optional<at::Tensor>& up,
                                const std::string& kind);

// (dgate, dup); dup is empty without up.
std::tuple<at::Tensor, at::Tensor> gated_activation_bwd(const at::Tensor& dh,
                                                        const at::Tensor& gate,
                                                        const std::optional<at::Tensor>& up,
                                                        const std::string& kind);

}  // namespace lora_kernels::gated_activation
