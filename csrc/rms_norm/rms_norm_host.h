// Host entries of rms_norm on the CPU, as bound to Python. x and dy are [M, K], weight [K], A [r, K].
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace lora_kernels::rms_norm {

// (y [M, K], rstd [M] fp32, s [M, sum of ranks]); y and s in the dtype of x.
std::tuple<at::Tensor, at::Tensor, at::Tensor> rms_norm_fwd(
    const at::Tensor& x, const std::optional<at::Tensor>& weight,
    const std::vector<at::Tensor>& lora_as, double eps, double offset);

// (dx [M, K], dweight [K] in the dtype of weight; empty where it is not needed).
std::tuple<at::Tensor, at::Tensor> rms_norm_bwd(const at::Tensor& dy, const at::Tensor& x,
                                                const std::optional<at::Tensor>& weight,
                                                const at::Tensor& rstd, double offset,
                                                bool need_dweight);

}  // namespace lora_kernels::rms_norm
