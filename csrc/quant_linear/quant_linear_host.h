// Host entries of quant_linear on the CPU, as bound to Python. Formats and the order of `parts`:
// lora_kernels/ops/quant_linear/formats.py. Formulas: reference.py beside it.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "quant_linear.h"

namespace lora_kernels::quant_linear {

// A weight with the tensors that it points into.
struct QuantWeight {
  Weight weight{};
  std::vector<at::Tensor> held;
  at::Tensor order;  // int4 with codes sorted by group: the column of each position; else undefined
  int64_t repacked_bytes = 0;  // what an int4 weight costs beside its own parts
};

// layout: as in formats.py. `parts` stay where they are, but for int4: its codes are repacked to
// rows of nibbles, its scales and zeros to fp32 [n, groups].
std::shared_ptr<QuantWeight> make_weight(const std::string& layout, int64_t n, int64_t k,
                                         int64_t block, int64_t nested_block, double factor,
                                         const std::vector<at::Tensor>& parts);

std::string engine_name(at::ScalarType dtype);

// [n, k] in `out`, or a new tensor of `dtype`.
at::Tensor dequantize(const QuantWeight& weight, at::ScalarType dtype,
                      const std::optional<at::Tensor>& out);

// packed, absmax, and with nested_block > 0 the parts of nested statistics.
std::vector<at::Tensor> quantize_flat(const at::Tensor& w, const at::Tensor& code, int64_t block,
                                      int64_t nested_block, const at::Tensor& nested_code,
                                      double min_absmax);
std::vector<at::Tensor> quantize_rows(const at::Tensor& w);

std::tuple<at::Tensor, at::Tensor> quant_linear_fwd(
    const at::Tensor& x, const QuantWeight& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& lora_a, const std::optional<at::Tensor>& lora_b,
    double scaling, double dropout_p, const std::optional<at::Tensor>& seed);

// dX, dA and dB in the dtypes of A and B; what is not needed is empty. x is read for dA only.
std::tuple<at::Tensor, at::Tensor, at::Tensor> quant_linear_bwd(
    const at::Tensor& dy, const std::optional<at::Tensor>& x, const QuantWeight& weight,
    const std::optional<at::Tensor>& lora_a, const std::optional<at::Tensor>& lora_b,
    const at::Tensor& s, double scaling, double dropout_p, const std::optional<at::Tensor>& seed,
    bool need_dx, bool need_da, bool need_db);

}  // namespace lora_kernels::quant_linear
