// Host entry of attention_decode on the CPU: tasks of a key head and a chunk of keys, then their sum.
#include "decode.h"

#include <ATen/ops/empty.h>

#include <vector>

#include "../cpu/isa.h"
#include "../cpu/memory.h"
#include "attention_host.h"
#include "host_operands.h"

namespace lora_kernels::attention {
namespace {

constexpr int64_t kChunkKeys = 128;  // enough to hide a task, few enough to keep all threads busy

const DecodeEngine& decode_engine_for(at::ScalarType type) {
  return *cpu::for_active_isa(nullptr, decode_avx512, decode_avx2, decode_baseline, dtype_of(type));
}

at::Tensor as_long(const at::Tensor& t) { return t.to(at::kLong).contiguous(); }

void check_pages(const DecodeParams& p, int64_t b, int64_t pages) {
  const int64_t* row = p.table + b * p.table_row;
  for (int64_t n = 0; n * p.page < p.sequences[b].keys; ++n) {
    TORCH_CHECK(0 <= row[n] && row[n] < pages, "attention_decode (cpu): page ", row[n],
                " of sequence ", b, " does not exist; there are ", pages);
  }
}

// Fills out and lse. num_splits 0: chosen.
void run_decode(DecodeParams& p, at::ScalarType dtype, int64_t num_splits) {
  const DecodeEngine& e = decode_engine_for(dtype);
  int64_t most = 0;
  for (int64_t b = 0; b < p.batch; ++b) most = std::max(most, p.sequences[b].keys);
  const int64_t rows = p.sequences[0].rows;
  p.chunk_keys = kChunkKeys;
  if (num_splits > 0) p.chunk_keys = std::max<int64_t>(1, (most + num_splits - 1) / num_splits);

  // Heads side by side share pages: a task takes all of a key, or it would fetch strips of them.
  const bool together = p.groups > 1 && p.k.head < p.k.row && p.v.head < p.v.row;
  std::vector<DecodeTask> tasks;
  std::vector<int64_t> first;  // slot of each key head of each sequence, and their end
  int64_t slots = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence& s = p.sequences[b];
    const int64_t begin = seen_keys(s, p.left, p.right, 0).begin / p.chunk_keys;
    const int64_t last = seen_keys(s, p.left, p.right, rows - 1).end;
    const int64_t count = std::max<int64_t>(0, (last + p.chunk_keys - 1) / p.chunk_keys - begin);
    for (int64_t g = 0; g < p.groups; ++g) first.push_back(slots + g * count);
    for (int64_t g = 0; g < p.groups; g += together ? p.groups : 1) {
      for (int64_t c = 0; c < count; ++c) {
        tasks.push_back({b, g, together ? p.groups : 1, begin + c, slots + g * count + c, count});
      }
    }
    slots += p.groups * count;
  }
  first.push_back(slots);
  p.tasks = tasks.data();
  p.partial_stride = e.padded(p.dv);
  const int64_t of_task = rows * (p.heads / p.groups) * p.partial_stride;
  at::Tensor partial = at::empty({slots * of_task}, at::TensorOptions(at::kFloat));
  p.partial = partial.mutable_data_ptr<float>();

  const int64_t bytes = e.workspace(p);
  run_tasks(static_cast<int64_t>(tasks.size()),
            [&](int64_t t) { e.chunk(p, t, cpu::thread_workspace(bytes)); });
  run_tasks(p.batch * p.groups, [&](int64_t n) {
    e.finish(p, n / p.groups, n % p.groups, first[n], first[n + 1] - first[n]);
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> attention_decode(
    const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
    const at::Tensor& cache_seqlens, const Maybe& block_table, const Maybe& sinks,
    const Maybe& slopes, double scale, int64_t left, int64_t right, double softcap,
    int64_t num_splits) {
  const at::Tensor rows = unit_columns(q), keys = unit_columns(k_cache),
                   values = unit_columns(v_cache);
  const at::Tensor lengths = as_long(cache_seqlens);
  const int64_t batch = q.size(0), count = q.size(1), heads = q.size(2), dv = v_cache.size(3);
  at::Tensor out = at::empty({batch, count, heads, dv}, q.options());
  at::Tensor lse = at::empty({batch, heads, count}, q.options().dtype(at::kFloat));
  if (batch == 0 || count == 0) return {out, lse};

  DecodeParams p{};
  p.page = k_cache.size(1);
  at::Tensor table, held_sinks, held_slopes;
  int64_t capacity = p.page;
  if (block_table) {
    table = as_long(*block_table);
    p.table = table.const_data_ptr<int64_t>();
    p.table_row = table.size(1);
    capacity *= table.size(1);
  }
  std::vector<Sequence> sequences;
  int64_t most = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t n = lengths.const_data_ptr<int64_t>()[b];
    TORCH_CHECK(0 <= n && n <= capacity, "attention_decode (cpu): sequence ", b, " has ", n,
                " keys; the cache holds ", capacity);
    sequences.push_back({0, count, 0, n, b * count});
    most = std::max(most, n);
  }
  p.sequences = sequences.data();
  if (p.table != nullptr) {
    for (int64_t b = 0; b < batch; ++b) check_pages(p, b, k_cache.size(0));
  }
  p.batch = batch;
  p.heads = heads;
  p.groups = k_cache.size(2);
  p.d = q.size(3);
  p.dv = dv;
  p.q = rows_of(rows);
  p.k = rows_of(keys);
  p.v = rows_of(values);
  p.out = rows_of(out);
  p.lse = row_values(lse);
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.left = left > most + count ? -1 : left;
  p.right = right > most + count ? -1 : right;
  p.keep_scale = 1.0f;
  if (sinks) {
    held_sinks = sinks->to(at::kFloat).contiguous();
    p.sinks = held_sinks.const_data_ptr<float>();
  }
  if (slopes) {
    held_slopes = slopes->to(at::kFloat).contiguous();
    p.slopes = held_slopes.const_data_ptr<float>();
    p.slopes_batch = held_slopes.size(0) == 1 ? 0 : held_slopes.size(1);
  }
  run_decode(p, q.scalar_type(), num_splits);
  return {out, lse};
}

}  // namespace lora_kernels::attention
