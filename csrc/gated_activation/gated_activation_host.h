// Host entries of gated_activation on the CPU, as bound to Python. Everything is 2-D; kind is silu,
// gelu, gelu_tanh, relu or relu_squared.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace lora_kernels::gated_activation {

at::Tensor gated_activation_fwd(const at::Tensor& gate, const std::optional<at::Tensor>& up,
                                const std::string& kind);

// (dgate, dup); dup is empty without up.
std::tuple<at::Tensor, at::Tensor> gated_activation_bwd(const at::Tensor& dh,
                                                        const at::Tensor& gate,
                                                        const std::optional<at::Tensor>& up,
                                                        const std::string& kind);

// (h, S): lora_as [rank, columns] each, S [rows, sum of ranks].
std::tuple<at::Tensor, at::Tensor> gated_activation_fwd_products(
    const at::Tensor& gate, const std::optional<at::Tensor>& up, const std::string& kind,
    const std::vector<at::Tensor>& lora_as);

// (dgate, dup, dS, dBs): lora_bs [columns, rank] of gate and, where there is one, of up; s
// [rows, sum of ranks] of theirs, or nothing: no dBs.
std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>>
gated_activation_bwd_products(const at::Tensor& dh, const at::Tensor& gate,
                              const std::optional<at::Tensor>& up, const std::string& kind,
                              const std::vector<at::Tensor>& lora_bs,
                              const std::optional<at::Tensor>& s,
                              const std::vector<double>& scalings);

}  // namespace lora_kernels::gated_activation
