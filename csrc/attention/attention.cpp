// Host entry of attention on the CPU: operands, Params, tasks, threads, engine.
#include "attention_host.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <vector>

#include "../cpu/isa.h"
#include "../cpu/memory.h"
#include "attention.h"
#include "host_operands.h"

namespace lora_kernels::attention {
namespace {

constexpr int64_t kPassBytes = 5 << 18;  // of a backward pass over keys: what L2 keeps beside a block
constexpr int64_t kLeastRows = 128;      // of a chunk: below, packing the keys again costs too much

const Engine& engine_for(at::ScalarType type) {
  return *cpu::for_active_isa(engine_amx, engine_avx512, engine_avx2, engine_baseline,
                              dtype_of(type));
}

at::Tensor new_row_values(const at::Tensor& q) {
  if (q.dim() == 3) return at::empty({q.size(1), q.size(0)}, q.options().dtype(at::kFloat));
  return at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(at::kFloat));
}

std::vector<Sequence> sequences_of(const at::Tensor& q, const at::Tensor& k, const Maybe& cu_seqlens,
                                   const Maybe& cu_seqlens_k) {
  std::vector<Sequence> found;
  if (!cu_seqlens) {
    const int64_t rows = q.size(1), keys = k.size(1);
    for (int64_t b = 0; b < q.size(0); ++b) found.push_back({0, rows, 0, keys, b * rows});
    return found;
  }
  const at::Tensor of_q = cu_seqlens->to(at::kLong).contiguous();
  const at::Tensor of_k = (cu_seqlens_k ? *cu_seqlens_k : *cu_seqlens).to(at::kLong).contiguous();
  const int64_t* i = of_q.const_data_ptr<int64_t>();
  const int64_t* j = of_k.const_data_ptr<int64_t>();
  for (int64_t b = 0; b + 1 < of_q.numel(); ++b) {
    TORCH_CHECK(0 <= i[b] && i[b] <= i[b + 1] && i[b + 1] <= q.size(0) && 0 <= j[b] &&
                    j[b] <= j[b + 1] && j[b + 1] <= k.size(0),
                "attention (cpu): the boundaries of sequence ", b, " do not fit the tensors");
    found.push_back({i[b], i[b + 1] - i[b], j[b], j[b + 1] - j[b], i[b]});
  }
  return found;
}

Mask mask_of(const at::Tensor& m) {
  MaskKind kind = MaskKind::kBool;
  if (m.scalar_type() == at::kFloat) kind = MaskKind::kFloat32;
  if (m.scalar_type() == at::kBFloat16) kind = MaskKind::kBFloat16;
  if (m.scalar_type() == at::kHalf) kind = MaskKind::kFloat16;
  const auto stride = [&](int64_t n) { return m.size(n) == 1 ? 0 : m.stride(n); };
  return {m.const_data_ptr(), kind, stride(0), stride(1), stride(2), stride(3)};
}

// The arguments that both directions share, and what keeps their memory.
struct Arguments {
  std::vector<Sequence> sequences;
  std::vector<at::Tensor> held;
  int64_t most_rows = 0, most_keys = 0;

  const at::Tensor& hold(const at::Tensor& t) {
    held.push_back(t);
    return held.back();
  }

  void fill(Problem& p, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
            const Maybe& mask, const Maybe& cu_seqlens, const Maybe& cu_seqlens_k,
            const Maybe& slopes, const Maybe& seed, double scale, int64_t left, int64_t right,
            double softcap, double dropout_p) {
    held.reserve(16);
    sequences = sequences_of(q, k, cu_seqlens, cu_seqlens_k);
    for (const Sequence& s : sequences) {
      most_rows = std::max(most_rows, s.rows);
      most_keys = std::max(most_keys, s.keys);
    }
    p.batch = static_cast<int64_t>(sequences.size());
    p.sequences = sequences.data();
    p.heads = q.size(-2);
    p.groups = k.size(-2);
    p.d = q.size(-1);
    p.dv = v.size(-1);
    p.q = rows_of(hold(unit_columns(q)));
    p.k = rows_of(hold(unit_columns(k)));
    p.v = rows_of(hold(unit_columns(v)));
    p.scale = static_cast<float>(scale);
    p.softcap = static_cast<float>(softcap);
    const int64_t reach = most_rows + most_keys;  // farther than any key
    p.left = left > reach ? -1 : left;
    p.right = right > reach ? -1 : right;
    if (slopes) {
      const at::Tensor& t = hold(slopes->to(at::kFloat).contiguous());
      p.slopes = t.const_data_ptr<float>();
      p.slopes_batch = t.size(0) == 1 ? 0 : t.size(1);
    }
    if (mask) p.mask = mask_of(hold(mask->scalar_type() == at::kDouble ? mask->to(at::kFloat) : *mask));
    p.dropout = dropout_params(dropout_p, seed);
    p.keep_scale = keep_scale(p.dropout);
  }
};

// How many parts make `wanted` tasks of `units`, none of them below `least` of `size`.
int64_t parts_for(int64_t wanted, int64_t units, int64_t size, int64_t least) {
  const int64_t parts = (wanted + units - 1) / std::max<int64_t>(units, 1);
  return std::clamp<int64_t>(parts, 1, std::max<int64_t>(1, size / least));
}

}  // namespace

std::string engine_name(at::ScalarType dtype) { return engine_for(dtype).name; }

std::tuple<at::Tensor, at::Tensor> attention_fwd(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Maybe& sinks,
    const Maybe& mask, const Maybe& cu_seqlens, const Maybe& cu_seqlens_k, const Maybe& slopes,
    const Maybe& seed, double scale, int64_t left, int64_t right, double softcap,
    double dropout_p) {
  const Engine& e = engine_for(q.scalar_type());
  Arguments a;
  FwdParams p{};
  a.fill(p, q, k, v, mask, cu_seqlens, cu_seqlens_k, slopes, seed, scale, left, right, softcap,
         dropout_p);
  if (sinks) p.sinks = a.hold(sinks->to(at::kFloat).contiguous()).const_data_ptr<float>();
  std::vector<int64_t> shape = q.sizes().vec();
  shape.back() = p.dv;
  at::Tensor out = at::empty(shape, q.options()), lse = new_row_values(q);
  p.out = rows_of(out);
  p.lse = row_values(lse);
  const int64_t units = p.batch * p.groups, threads = threads_here();
  p.chunks = parts_for(threads == 1 ? 1 : 3 * threads, units, a.most_rows, kLeastRows);
  if (p.left >= 0) {  // the keys of a chunk are few then
    p.chunks = std::max(p.chunks, a.most_rows / (8 * kLeastRows));
  }
  const int64_t bytes = e.fwd_workspace(p);
  run_tasks(units * p.chunks, [&](int64_t task) { e.fwd(p, task, cpu::thread_workspace(bytes)); });
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_bwd(
    const at::Tensor& dout, const Maybe& dlse, const at::Tensor& out, const at::Tensor& lse,
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Maybe& mask,
    const Maybe& cu_seqlens, const Maybe& cu_seqlens_k, const Maybe& slopes, const Maybe& seed,
    double scale, int64_t left, int64_t right, double softcap, double dropout_p, bool need_dq,
    bool need_dk, bool need_dv, bool need_dmask) {
  const Engine& e = engine_for(q.scalar_type());
  Arguments a;
  BwdParams p{};
  a.fill(p, q, k, v, mask, cu_seqlens, cu_seqlens_k, slopes, seed, scale, left, right, softcap,
         dropout_p);
  p.out = rows_of(a.hold(unit_columns(out)));
  p.dout = rows_of(a.hold(unit_columns(dout)));
  p.lse = row_values(a.hold(lse.contiguous()));
  if (dlse) p.dlse = row_values(a.hold(dlse->to(at::kFloat).contiguous()));
  const auto gradient = [&](bool need, const at::Tensor& of) {
    return at::empty(need ? of.sizes() : at::IntArrayRef{0}, of.options());
  };
  at::Tensor dq = gradient(need_dq, q), dk = gradient(need_dk, k), dv = gradient(need_dv, v);
  if (need_dq) p.dq = rows_of(dq);
  if (need_dk) p.dk = rows_of(dk);
  if (need_dv) p.dv_out = rows_of(dv);
  at::Tensor delta = new_row_values(q);
  p.delta = row_values(delta);
  at::Tensor dmask = at::empty({0}, lse.options());
  int64_t units_b = p.batch, units_g = p.groups;
  bool one_chunk = false;
  if (need_dmask && mask) {
    dmask = at::zeros(mask->sizes(), lse.options());
    const Mask strides = mask_of(dmask);
    p.dmask = dmask.mutable_data_ptr<float>();
    p.dmask_batch = strides.batch;
    p.dmask_head = strides.head;
    p.dmask_row = strides.row;
    p.dmask_key = strides.key;
    // A task owns every sum that it adds to.
    p.join_batch = strides.batch == 0;
    p.join_heads = strides.head == 0;
    if (p.join_batch) units_b = std::min<int64_t>(1, p.batch);
    if (p.join_heads) units_g = 1;
    one_chunk = strides.key == 0;
  }
  const int64_t units = units_b * units_g, threads = threads_here();
  p.chunks = one_chunk || units % threads == 0 || units >= 4 * threads
                 ? 1
                 : parts_for(2 * threads, units, a.most_keys, 2 * e.keys);
  const int64_t fit = std::max<int64_t>(1, kPassBytes / e.bytes_of_key(p.d, p.dv) / e.keys) * e.keys;
  const int64_t keys_of_chunk = (a.most_keys + p.chunks - 1) / p.chunks;
  p.passes = std::max<int64_t>(1, (keys_of_chunk + fit - 1) / fit);
  p.all_rows = q.dim() == 3 ? q.size(0) : q.size(0) * q.size(1);
  at::Tensor slots;
  if (need_dq && p.chunks * p.passes > 1) {
    slots = at::zeros({p.chunks, p.heads, p.all_rows, e.padded(p.d)}, lse.options());
    p.dq_slots = slots.mutable_data_ptr<float>();
    p.slot_stride = slots.stride(0);
  }
  const auto for_rows = [&](const auto& body) {
    at::parallel_for(0, p.batch * p.heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const Sequence& s = p.sequences[n / p.heads];
        for (int64_t i = 0; i < s.rows; ++i) body(n / p.heads, s.row, i, n % p.heads);
      }
    });
  };
  for_rows([&](int64_t b, int64_t row, int64_t i, int64_t h) { e.row_delta(p, b, row + i, h); });
  const int64_t bytes = e.bwd_workspace(p);
  run_tasks(units * p.chunks, [&](int64_t task) { e.bwd(p, task, cpu::thread_workspace(bytes)); });
  if (p.dq_slots != nullptr) {
    for_rows([&](int64_t b, int64_t, int64_t i, int64_t h) { e.sum_slots(p, b, i, h); });
  }
  return {dq, dk, dv, delta, dmask};
}

}  // namespace lora_kernels::attention
