// Host entry of gated_activation on the CPU: checks, Params, threads.
#include "gated_activation_host.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "../cpu/isa.h"
#include "gated_activation.h"

namespace lora_kernels::gated_activation {
namespace {

using Maybe = std::optional<at::Tensor>;

Dtype dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      TORCH_CHECK(false, "gated_activation (cpu): dtype ", t.scalar_type(),
                  " is not supported; accepted: float32, bfloat16, float16");
  }
}

Kind kind_of(const std::string& name) {
  if (name == "silu") return Kind::kSilu;
  if (name == "gelu_tanh") return Kind::kGeluTanh;
  if (name == "relu") return Kind::kRelu;
  TORCH_CHECK(name == "relu_squared", "gated_activation (cpu): kind '", name,
              "' is not supported; accepted: silu, gelu_tanh, relu, relu_squared");
  return Kind::kReluSquared;
}

at::Tensor readable(const at::Tensor& t, const at::Tensor& like) {
  TORCH_CHECK(t.dim() == 2 && t.sizes() == like.sizes() && t.scalar_type() == like.scalar_type(),
              "gated_activation (cpu): operands must be 2-D, of one shape and dtype");
  return t.size(1) == 1 || t.stride(1) == 1 ? t : t.contiguous();
}

void run(const RowsParams& p, Dtype dtype, Kind kind, int64_t rows) {
  using cpu::Isa;
  const Isa isa = cpu::active_isa();
  const RowsKernel kernel = isa >= Isa::kAvx512 ? rows_avx512(dtype, kind)
                            : isa >= Isa::kAvx2 ? rows_avx2(dtype, kind)
                                                : rows_baseline(dtype, kind);
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, p.columns));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace

at::Tensor gated_activation_fwd(const at::Tensor& gate, const Maybe& up, const std::string& kind) {
  const Dtype dtype = dtype_of(gate);
  const at::Tensor g = readable(gate, gate), u = up ? readable(*up, gate) : at::Tensor();
  at::Tensor h = at::empty(gate.sizes(), gate.options());
  RowsParams p{};
  p.columns = gate.size(1);
  p.gate = g.const_data_ptr();
  p.ldgate = g.stride(0);
  if (up) {
    p.up = u.const_data_ptr();
    p.ldup = u.stride(0);
  }
  p.h = h.mutable_data_ptr();
  run(p, dtype, kind_of(kind), gate.size(0));
  return h;
}

std::tuple<at::Tensor, at::Tensor> gated_activation_bwd(const at::Tensor& dh,
                                                        const at::Tensor& gate, const Maybe& up,
                                                        const std::string& kind) {
  const Dtype dtype = dtype_of(gate);
  const at::Tensor d = readable(dh, gate), g = readable(gate, gate);
  const at::Tensor u = up ? readable(*up, gate) : at::Tensor();
  at::Tensor dgate = at::empty(gate.sizes(), gate.options());
  at::Tensor dup = at::empty(up ? gate.sizes() : at::IntArrayRef{0}, gate.options());
  RowsParams p{};
  p.columns = gate.size(1);
  p.dh = d.const_data_ptr();
  p.lddh = d.stride(0);
  p.gate = g.const_data_ptr();
  p.ldgate = g.stride(0);
  if (up) {
    p.up = u.const_data_ptr();
    p.ldup = u.stride(0);
    p.dup = dup.mutable_data_ptr();
  }
  p.dgate = dgate.mutable_data_ptr();
  run(p, dtype, kind_of(kind), gate.size(0));
  return {dgate, dup};
}

}  // namespace lora_kernels::gated_activation
