// Host entries of lora_linear on the CPU, as bound to Python. 2-D tensors; formulas:
// lora_kernels/ops/lora_linear/reference.py. `packed` weights come from pack_weight with the same
// compute dtype and the same active instruction set. A given S (`shrunk`) or dS is [M, sum of
// ranks] in the dtype of x, without dropout.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace lora_kernels::lora_linear {

std::string engine_name(at::ScalarType dtype);
int64_t engine_id(at::ScalarType dtype);  // tells engines apart in this process
int64_t packed_bytes(at::ScalarType dtype, int64_t k, int64_t n);

// weight [N, K] -> bytes in the engine's layout, as the right operand of X W^T or of dY W.
at::Tensor pack_weight(const at::Tensor& weight, at::ScalarType dtype, bool for_dgrad);

std::tuple<std::vector<at::Tensor>, at::Tensor> lora_linear_fwd(
    const at::Tensor& x, const std::vector<at::Tensor>& packed,
    const std::vector<int64_t>& out_features, const std::vector<at::Tensor>& lora_as,
    const std::vector<at::Tensor>& lora_bs, const std::vector<std::optional<at::Tensor>>& biases,
    const std::vector<double>& scalings, double dropout_p, const std::optional<at::Tensor>& seed,
    const std::optional<at::Tensor>& shrunk);

// Up to how many rows lora_linear_fwd_few is quicker than the engine or the library.
int64_t few_rows(at::ScalarType dtype);

// The same for at most four rows without dropout, from weights as they are (few_rows.h).
std::tuple<std::vector<at::Tensor>, at::Tensor> lora_linear_fwd_few(
    const at::Tensor& x, const std::vector<at::Tensor>& weights,
    const std::vector<at::Tensor>& lora_as, const std::vector<at::Tensor>& lora_bs,
    const std::vector<std::optional<at::Tensor>>& biases, const std::vector<double>& scalings,
    const std::optional<at::Tensor>& shrunk);

std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>> lora_linear_bwd(
    const std::vector<at::Tensor>& dys, const at::Tensor& x,
    const std::vector<at::Tensor>& packed, const std::vector<at::Tensor>& lora_as,
    const std::vector<at::Tensor>& lora_bs, const at::Tensor& s,
    const std::vector<double>& scalings, double dropout_p, const std::optional<at::Tensor>& seed,
    bool need_dx, bool need_da, bool need_db, const std::optional<at::Tensor>& ds);

}  // namespace lora_kernels::lora_linear
