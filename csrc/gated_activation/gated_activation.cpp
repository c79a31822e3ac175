// Host entry of gated_activation on the CPU: checks, Params, threads.
#include "gated_activation_host.h"

#include <ATen/Parallel.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include "../common/tensor_operands.h"
#include "../cpu/isa.h"
#include "gated_activation.h"

namespace lora_kernels::gated_activation {
namespace {

using Maybe = std::optional<at::Tensor>;

Dtype dtype_of(const at::Tensor& t) {
  return lora_kernels::dtype_of(t.scalar_type(), "gated_activation");
}

Kind kind_of(const std::string& name) {
  if (name == "silu") return Kind::kSilu;
  if (name == "gelu") return Kind::kGelu;
  if (name == "gelu_tanh") return Kind::kGeluTanh;
  if (name == "relu") return Kind::kRelu;
  TORCH_CHECK(name == "relu_squared", "gated_activation (cpu): kind '", name,
              "' is not supported; accepted: silu, gelu, gelu_tanh, relu, relu_squared");
  return Kind::kReluSquared;
}

at::Tensor readable(const at::Tensor& t, const at::Tensor& like) {
  TORCH_CHECK(t.dim() == 2 && t.sizes() == like.sizes() && t.scalar_type() == like.scalar_type(),
              "gated_activation (cpu): operands must be 2-D, of one shape and dtype");
  return unit_columns(t);
}

// Operands and results of one call; the tensors outlive the pointers in `params`.
struct Call {
  at::Tensor gate, up, dh, h, dgate, dup;
  RowsParams params{};

  Call(const Maybe& given_dh, const at::Tensor& given_gate, const Maybe& given_up) {
    gate = readable(given_gate, given_gate);
    params.columns = gate.size(1);
    params.gate = gate.const_data_ptr();
    params.ldgate = gate.stride(0);
    if (given_up) {
      up = readable(*given_up, gate);
      params.up = up.const_data_ptr();
      params.ldup = up.stride(0);
    }
    if (!given_dh) {
      h = at::empty(gate.sizes(), gate.options());
      params.h = h.mutable_data_ptr();
      return;
    }
    dh = readable(*given_dh, gate);
    params.dh = dh.const_data_ptr();
    params.lddh = dh.stride(0);
    dgate = at::empty(gate.sizes(), gate.options());
    params.dgate = dgate.mutable_data_ptr();
    dup = at::empty(up.defined() ? gate.sizes() : at::IntArrayRef{0}, gate.options());
    if (up.defined()) params.dup = dup.mutable_data_ptr();
  }

  void run(Kind kind) const {
    const RowsKernel kernel = cpu::for_active_isa(rows_amx, rows_avx512, rows_avx2, rows_baseline,
                                                  dtype_of(gate), kind);
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, params.columns));
    at::parallel_for(0, gate.size(0), grain,
                     [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  }
};

const Blocks& blocks_for(Dtype dtype, Kind kind) {
  return *cpu::for_active_isa(blocks_amx, blocks_avx512, blocks_avx2, blocks_baseline, dtype, kind);
}

// operands[m] is [columns, rank], S is [rows, sum of ranks] or nothing. (S or dS, dBs in fp32.)
std::tuple<at::Tensor, std::vector<at::Tensor>> run_with_products(
    const Call& call, Kind kind, const std::vector<at::Tensor>& operands, const Maybe& s,
    const std::vector<double>& scalings) {
  const at::Tensor& gate = call.gate;
  const int64_t rows = gate.size(0), columns = gate.size(1);
  const int64_t members = static_cast<int64_t>(operands.size());
  const Blocks& blocks = blocks_for(dtype_of(gate), kind);
  const auto fp32 = gate.options().dtype(at::kFloat);
  BlocksParams p{};
  p.rows = call.params;
  p.members = members;
  int64_t ranks = 0;
  std::vector<at::Tensor> low, packed;
  for (const at::Tensor& operand : operands) {
    TORCH_CHECK(operand.dim() == 2 && operand.size(0) == columns && operand.size(1) > 0,
                "gated_activation (cpu): an adapter must be [", columns, ", rank >= 1]");
    ranks += operand.size(1);
    low.push_back(operand.to(gate.scalar_type()));
    packed.push_back(
        at::empty({padded_columns(columns) * padded_rank(operand.size(1))}, fp32));
  }
  TORCH_CHECK(!s || (s->dim() == 2 && s->size(0) == rows && s->size(1) == ranks),
              "gated_activation (cpu): s must be [", rows, ", ", ranks, "]");
  const at::Tensor saved = s ? s->to(gate.scalar_type()).contiguous() : at::Tensor();
  const at::Tensor out = at::empty({rows, ranks}, gate.options());
  const int64_t element = gate.element_size();
  for (int64_t m = 0, column = 0; m < members; column += operands[m].size(1), ++m) {
    Member& of = p.member[m];
    of.rank = operands[m].size(1);
    of.packed = packed[m].const_data_ptr();
    of.scaling = static_cast<float>(scalings[m]);
    of.out = static_cast<char*>(out.mutable_data_ptr()) + column * element;
    of.ldout = ranks;
    if (s) {
      of.s = static_cast<const char*>(saved.const_data_ptr()) + column * element;
      of.lds = ranks;
    }
  }
  at::parallel_for(0, members, 1, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      blocks.pack(low[m].const_data_ptr(), low[m].stride(0), low[m].stride(1), columns,
                  p.member[m].rank, packed[m].mutable_data_ptr());
    }
  });
  const int64_t count = (rows + kBlockRows - 1) / kBlockRows;
  const int64_t slots = std::max<int64_t>(1, std::min<int64_t>(count, at::get_num_threads()));
  int64_t sums = 0;
  for (int64_t m = 0; m < members; ++m) sums += sums_size(p, m);
  const int64_t size = (sums + scratch_size(p) + 15) / 16 * 16;
  const at::Tensor workspace = at::empty({slots, size}, fp32);
  float* const floats = workspace.mutable_data_ptr<float>();
  at::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      blocks.run(p, count * slot / slots * kBlockRows,
                 std::min(rows, count * (slot + 1) / slots * kBlockRows), floats + slot * size);
    }
  });
  std::vector<at::Tensor> dbs;
  const float* from = floats;
  for (int64_t m = 0; s && m < members; from += sums_size(p, m), ++m) {
    const Member& of = p.member[m];
    at::Tensor db = at::empty({columns, of.rank}, fp32);
    float* const to = db.mutable_data_ptr<float>();
    at::parallel_for(0, (columns + 15) / 16, 32, [&](int64_t begin, int64_t end) {
      blocks.finish(from, slots, size, columns, of.rank, of.scaling, begin * 16,
                    std::min(columns, end * 16), to);
    });
    dbs.push_back(db.to(operands[m].scalar_type()));
  }
  return {out, dbs};
}

}  // namespace

at::Tensor gated_activation_fwd(const at::Tensor& gate, const Maybe& up, const std::string& kind) {
  const Call call(std::nullopt, gate, up);
  call.run(kind_of(kind));
  return call.h;
}

std::tuple<at::Tensor, at::Tensor> gated_activation_bwd(const at::Tensor& dh,
                                                        const at::Tensor& gate, const Maybe& up,
                                                        const std::string& kind) {
  const Call call(dh, gate, up);
  call.run(kind_of(kind));
  return {call.dgate, call.dup};
}

std::tuple<at::Tensor, at::Tensor> gated_activation_fwd_products(
    const at::Tensor& gate, const Maybe& up, const std::string& kind,
    const std::vector<at::Tensor>& lora_as) {
  const Call call(std::nullopt, gate, up);
  std::vector<at::Tensor> low;
  for (const at::Tensor& a : lora_as) low.push_back(a.to(gate.scalar_type()));
  const at::Tensor joined = low.size() == 1 ? low[0] : at::cat(low);
  const auto [s, none] = run_with_products(call, kind_of(kind), {joined.t()}, std::nullopt, {1.0});
  return {call.h, s};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>>
gated_activation_bwd_products(const at::Tensor& dh, const at::Tensor& gate, const Maybe& up,
                              const std::string& kind, const std::vector<at::Tensor>& lora_bs,
                              const Maybe& s, const std::vector<double>& scalings) {
  TORCH_CHECK(lora_bs.size() == (up ? 2 : 1) && scalings.size() == lora_bs.size(),
              "gated_activation (cpu): one adapter and scaling for each of gate and up");
  const Call call(dh, gate, up);
  auto [ds, dbs] = run_with_products(call, kind_of(kind), lora_bs, s, scalings);
  return {call.dgate, call.dup, ds, dbs};
}

}  // namespace lora_kernels::gated_activation
