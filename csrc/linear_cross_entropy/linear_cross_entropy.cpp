// Host entry of linear_cross_entropy on the CPU: checks, Params, threads.
#include "linear_cross_entropy_host.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "../common/tensor_operands.h"
#include "../cpu/isa.h"
#include "linear_cross_entropy.h"

namespace lora_kernels::linear_cross_entropy {
namespace {

Dtype dtype_of(at::ScalarType type) {
  return lora_kernels::dtype_of(type, "linear_cross_entropy");
}

}  // namespace

std::string engine_name(at::ScalarType dtype) {
  dtype_of(dtype);
  using cpu::Isa;
  const Isa isa = cpu::active_isa();
  return cpu::isa_name(isa >= Isa::kAvx512 ? Isa::kAvx512 : isa);
}

at::Tensor losses_of_rows(at::Tensor logits, const at::Tensor& labels,
                          const std::optional<at::Tensor>& coefficients, int64_t ignore_index,
                          double smoothing, double softcap, double z_loss) {
  TORCH_CHECK(logits.dim() == 2 && logits.stride(1) == 1 && logits.is_cpu(),
              "linear_cross_entropy (cpu): logits must be [m, V] with contiguous rows");
  const int64_t m = logits.size(0), v = logits.size(1);
  TORCH_CHECK(labels.scalar_type() == at::kLong && labels.is_contiguous() && labels.numel() == m,
              "linear_cross_entropy (cpu): labels must be contiguous int64 [", m, "]");
  TORCH_CHECK(!coefficients || (coefficients->scalar_type() == at::kFloat &&
                                coefficients->is_contiguous() && coefficients->numel() == m),
              "linear_cross_entropy (cpu): coefficients must be contiguous float32 [", m, "]");
  const int64_t* y = labels.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < m; ++r) {
    TORCH_CHECK(y[r] == ignore_index || (y[r] >= 0 && y[r] < v), "linear_cross_entropy: label ",
                y[r], " is outside of 0 to ", v - 1);
  }
  at::Tensor losses = at::empty({m}, logits.options().dtype(at::kFloat));
  RowsParams p{};
  p.logits = logits.mutable_data_ptr();
  p.ld = logits.stride(0);
  p.rows = m;
  p.vocabulary = v;
  p.labels = y;
  p.coefficients = coefficients ? coefficients->const_data_ptr<float>() : nullptr;
  p.losses = losses.mutable_data_ptr<float>();
  p.ignore_index = ignore_index;
  p.smoothing = static_cast<float>(smoothing);
  p.softcap = static_cast<float>(softcap);
  p.z_loss = static_cast<float>(z_loss);
  const RowsKernel kernel = cpu::for_active_isa(nullptr, rows_avx512, rows_avx2, rows_baseline,
                                                dtype_of(logits.scalar_type()));
  at::parallel_for(0, m, 8, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return losses;
}

}  // namespace lora_kernels::linear_cross_entropy
