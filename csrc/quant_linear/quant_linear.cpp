// Host entries of quant_linear on the CPU: checks, allocation, params, threads, kernels.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <thread>

#include "../common/tensor_operands.h"
#include "../cpu/isa.h"
#include "../cpu/memory.h"
#include "quant_linear_host.h"

namespace lora_kernels::quant_linear {
namespace {

constexpr int64_t kMaxRows = 4096;                   // of X in one job: bounds its packed copy
constexpr int64_t kKeptBytes = int64_t{64} << 20;    // of workspace that a thread keeps
constexpr int64_t kStreamBytes = int64_t{1} << 20;   // results stored past the cache
constexpr int64_t kLargePages = int64_t{4} << 20;  // results of at least as many bytes
constexpr int64_t kThreadWork = int64_t{1} << 18;    // products worth a thread

Dtype dtype_of(at::ScalarType type) { return lora_kernels::dtype_of(type, "quant_linear"); }

const Kernels& kernels_for(Dtype dtype) {
  return *cpu::for_active_isa(kernels_amx, kernels_avx512, kernels_avx2, kernels_baseline, dtype);
}

// An adapter operand in fp32 or in the dtype of x.
Adapter adapter(const std::optional<at::Tensor>& given, at::ScalarType dtype, int64_t rows,
                int64_t columns, const char* name, std::vector<at::Tensor>& held) {
  TORCH_CHECK(given->dim() == 2 && given->size(0) == rows && given->size(1) == columns,
              "quant_linear (cpu): ", name, " is ", given->sizes(), "; accepted: [", rows, ", ",
              columns, "]");
  held.push_back(rows_in(*given, dtype));
  const at::Tensor& t = held.back();
  return {t.const_data_ptr(), row_stride(t), dtype_of(t.scalar_type())};
}

int threads_for(int64_t work) {
  if (work < kThreadWork || at::in_parallel_region()) return 1;
  return static_cast<int>(std::min<int64_t>(at::get_num_threads(), work / (kThreadWork / 2)));
}

// `light`: the work of all phases but the last.
template <class Params>
void run_job(const Job<Params>& job, const Params& p, int64_t light, int64_t work) {
  const int64_t shared_bytes = (job.shared_bytes(p) + 63) / 64 * 64, own_bytes = job.own_bytes(p);
  const bool kept = shared_bytes <= kKeptBytes;
  const std::shared_ptr<void> block = kept ? nullptr : cpu::allocate(shared_bytes);
  char* mine = static_cast<char*>(
      cpu::thread_workspace(static_cast<size_t>(own_bytes + (kept ? shared_bytes : 0))));
  void* shared = kept ? mine : block.get();
  char* own_of_caller = mine + (kept ? shared_bytes : 0);
  const std::thread::id caller = std::this_thread::get_id();
  for (int phase = 0; phase < job.phases; ++phase) {
    const int threads = threads_for(phase + 1 == job.phases ? work : light);
    if (threads == 1) {
      job.run(p, phase, 0, 1, shared, own_of_caller);
      continue;
    }
    run_threads(threads, [&](int t) {
      void* own = std::this_thread::get_id() == caller ? own_of_caller
                                                       : cpu::thread_workspace(own_bytes);
      job.run(p, phase, t, threads, shared, own);
    });
  }
}

// Large results on large pages: clearing fresh small ones takes longer than decoding a weight.
at::Tensor new_matrix(int64_t rows, int64_t columns, at::ScalarType dtype) {
  const int64_t bytes = rows * columns * static_cast<int64_t>(c10::elementSize(dtype));
  if (bytes < kLargePages) return at::empty({rows, columns}, dtype);
  std::shared_ptr<void> block = cpu::allocate(static_cast<size_t>(bytes));
  void* data = block.get();
  return at::from_blob(data, {rows, columns}, [block](void*) mutable { block.reset(); },
                       at::TensorOptions().dtype(dtype));
}

// Training reads W in panels, each row of one on a page of its own. It takes the system 2 ms a MB,
// once, which pays within some dozen steps: a forward alone does not ask for it.
void join_pages(const Weight& w, int64_t m) {
  constexpr int64_t kPanelRows = 64;
  if (m < kPanelRows) return;
  const bool nibbles = w.layout == Layout::kFlat, int4 = w.layout == Layout::kInt4;
  cpu::join_pages(w.codes, static_cast<size_t>(int4 ? w.n * w.row_bytes
                                                    : w.n * w.k / (nibbles ? 2 : 1)));
}

}  // namespace

std::string engine_name(at::ScalarType dtype) { return kernels_for(dtype_of(dtype)).name; }

at::Tensor dequantize(const QuantWeight& weight, at::ScalarType dtype,
                      const std::optional<at::Tensor>& out_given) {
  const Weight& w = weight.weight;
  const Kernels& kernels = kernels_for(dtype_of(dtype));
  at::Tensor out = out_given.has_value() ? *out_given : new_matrix(w.n, w.k, dtype);
  TORCH_CHECK(out.is_contiguous() && out.scalar_type() == dtype && out.numel() == w.n * w.k,
              "dequantize (cpu): out is ", out.scalar_type(), " ", out.sizes(),
              "; accepted: contiguous ", dtype, " of ", w.n * w.k, " elements");
  const int64_t total = w.n * w.k;
  const int64_t unit = w.layout == Layout::kFlat ? std::lcm(w.block, int64_t{64}) : w.k;
  const int64_t units = (total + unit - 1) / unit;
  const int threads = threads_for(total);
  const bool stream = static_cast<int64_t>(out.nbytes()) >= kStreamBytes;
  void* dst = out.mutable_data_ptr();
  run_threads(threads, [&](int t) {
    const int64_t begin = units * t / threads * unit, end = units * (t + 1) / threads * unit;
    kernels.dequantize(w, dtype_of(dtype), dst, begin, std::min(end, total), stream);
  });
  return out;
}

std::vector<at::Tensor> quantize_flat(const at::Tensor& w_given, const at::Tensor& code,
                                      int64_t block, int64_t nested_block,
                                      const at::Tensor& nested_code, double min_absmax) {
  const at::Tensor w = w_given.contiguous();
  QuantizeFlatParams p{};
  p.dtype = dtype_of(w.scalar_type());
  p.w = w.const_data_ptr();
  p.n = w.numel();
  p.block = block;
  p.min_absmax = static_cast<float>(min_absmax);
  const float* value = code.const_data_ptr<float>();
  int order[16];
  std::iota(order, order + 16, 0);
  std::stable_sort(order, order + 16, [&](int a, int b) { return value[a] < value[b]; });
  for (int i = 0; i < 16; ++i) p.code[i] = static_cast<uint8_t>(order[i]);
  for (int i = 0; i < 15; ++i) p.midpoint[i] = (value[order[i]] + value[order[i + 1]]) / 2.0f;
  const int64_t blocks = (p.n + block - 1) / block;
  const at::Tensor packed = at::empty({(p.n + 1) / 2}, at::kByte);
  const at::Tensor absmax = at::empty({blocks}, at::kFloat);
  p.codes = packed.mutable_data_ptr<uint8_t>();
  p.absmax = absmax.mutable_data_ptr<float>();
  const Kernels& kernels = kernels_for(p.dtype);
  const int threads = threads_for(p.n);
  run_threads(threads, [&](int t) {
    kernels.quantize_flat(p, blocks * t / threads, blocks * (t + 1) / threads);
  });
  if (nested_block == 0) return {packed, absmax};

  const at::Tensor offset = absmax.mean(), centred = at::sub(absmax, offset);
  const float *map = nested_code.const_data_ptr<float>(), *v = centred.const_data_ptr<float>();
  float middle[255];
  for (int i = 0; i < 255; ++i) middle[i] = (map[i] + map[i + 1]) / 2.0f;
  const int64_t outer = (blocks + nested_block - 1) / nested_block;
  const at::Tensor codes = at::empty({blocks}, at::kByte);
  const at::Tensor nested = at::empty({outer}, at::kFloat);
  auto* to = codes.mutable_data_ptr<uint8_t>();
  auto* scale = nested.mutable_data_ptr<float>();
  at::parallel_for(0, outer, 64, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * nested_block, last = std::min(blocks, first + nested_block);
      float largest = 0.0f;
      for (int64_t i = first; i < last; ++i) largest = std::max(largest, std::fabs(v[i]));
      scale[b] = largest;
      const float inverse = 1.0f / std::max(largest, p.min_absmax);
      for (int64_t i = first; i < last; ++i) {
        to[i] = static_cast<uint8_t>(std::lower_bound(middle, middle + 255, v[i] * inverse) -
                                     middle);
      }
    }
  });
  return {packed, codes, nested, offset};
}

std::vector<at::Tensor> quantize_rows(const at::Tensor& w_given) {
  const at::Tensor w = w_given.contiguous();
  TORCH_CHECK(w.dim() == 2, "quantize (cpu): w has ", w.dim(), " dimensions; accepted: 2");
  const at::Tensor packed = at::empty({w.size(0), w.size(1)}, at::kChar);
  const at::Tensor scale = at::empty({w.size(0)}, at::kFloat);
  const QuantizeRowsParams p{dtype_of(w.scalar_type()), w.const_data_ptr(), w.size(0), w.size(1),
                             packed.mutable_data_ptr<int8_t>(), scale.mutable_data_ptr<float>()};
  const Kernels& kernels = kernels_for(p.dtype);
  const int threads = threads_for(p.n * p.k);
  run_threads(threads, [&](int t) {
    kernels.quantize_rows(p, p.n * t / threads, p.n * (t + 1) / threads);
  });
  return {packed, scale};
}

std::tuple<at::Tensor, at::Tensor> quant_linear_fwd(
    const at::Tensor& x_given, const QuantWeight& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& lora_a, const std::optional<at::Tensor>& lora_b,
    double scaling, double dropout_p, const std::optional<at::Tensor>& seed) {
  Weight w = weight.weight;
  TORCH_CHECK(x_given.dim() == 2 && x_given.size(1) == w.k, "quant_linear (cpu): x is ",
              x_given.sizes(), "; accepted: [M, ", w.k, "]");
  // Codes sorted by group are those of a plain weight, for X and A with their columns sorted alike;
  // masks number the columns as they came.
  const bool sorted = w.position != nullptr && dropout_p == 0.0;
  if (sorted) w.group_of = w.position = nullptr;
  const at::Tensor x = sorted ? x_given.index_select(1, weight.order) : separate_rows(x_given);
  const at::ScalarType type = x.scalar_type();
  std::vector<at::Tensor> held;
  FwdParams p{};
  p.weight = &w;
  p.dtype = dtype_of(type);
  p.ldx = row_stride(x);
  if (bias.has_value()) {
    held.push_back(bias->to(at::kFloat).contiguous());
    p.bias = held.back().const_data_ptr<float>();
  }
  if (lora_a.has_value() && lora_b.has_value()) {
    p.rank = lora_a->size(0);
    p.a = adapter(sorted ? lora_a->index_select(1, weight.order) : *lora_a, type, p.rank, w.k,
                  "lora_a", held);
    p.b = adapter(lora_b, type, w.n, p.rank, "lora_b", held);
    p.scaling = static_cast<float>(scaling);
    p.dropout = dropout_params(dropout_p, seed);
  }
  p.keep_scale = keep_scale(p.dropout);
  const int64_t m = x.size(0);
  const at::Tensor y = at::empty({m, w.n}, x.options()), s = at::empty({m, p.rank}, x.options());
  p.ldy = w.n;
  p.lds = p.rank;
  const Kernels& kernels = kernels_for(p.dtype);
  const auto size = static_cast<int64_t>(x.element_size());
  for (int64_t row = 0; row < m; row += kMaxRows) {
    p.row0 = row;
    p.m = std::min(kMaxRows, m - row);
    p.x = static_cast<const char*>(x.const_data_ptr()) + row * p.ldx * size;
    p.y = static_cast<char*>(y.mutable_data_ptr()) + row * p.ldy * size;
    p.s = static_cast<char*>(s.mutable_data_ptr()) + row * p.lds * size;
    run_job(kernels.fwd, p, p.m * w.k + p.rank * (w.n + (p.m + 1) * w.k), p.m * w.k * w.n);
  }
  return {y, s};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> quant_linear_bwd(
    const at::Tensor& dy_given, const std::optional<at::Tensor>& x_given, const QuantWeight& weight,
    const std::optional<at::Tensor>& lora_a, const std::optional<at::Tensor>& lora_b,
    const at::Tensor& s_given, double scaling, double dropout_p,
    const std::optional<at::Tensor>& seed, bool need_dx, bool need_da, bool need_db) {
  const Weight& w = weight.weight;
  TORCH_CHECK(dy_given.dim() == 2 && dy_given.size(1) == w.n, "quant_linear (cpu): dy is ",
              dy_given.sizes(), "; accepted: [M, ", w.n, "]");
  const at::Tensor dy = separate_rows(dy_given);
  const at::ScalarType type = dy.scalar_type();
  const int64_t m = dy.size(0);
  if (need_dx) join_pages(w, m);
  std::vector<at::Tensor> held;
  BwdParams p{};
  p.weight = &w;
  p.dtype = dtype_of(type);
  p.lddy = row_stride(dy);
  if (lora_a.has_value() && lora_b.has_value()) {
    p.rank = lora_a->size(0);
    p.a = adapter(lora_a, type, p.rank, w.k, "lora_a", held);
    p.b = adapter(lora_b, type, w.n, p.rank, "lora_b", held);
    p.scaling = static_cast<float>(scaling);
    p.dropout = dropout_params(dropout_p, seed);
  }
  p.keep_scale = keep_scale(p.dropout);
  const auto operand = [&](const at::Tensor& t, int64_t columns, const char* name) {
    TORCH_CHECK(t.dim() == 2 && t.size(0) == m && t.size(1) == columns && t.scalar_type() == type,
                "quant_linear (cpu): ", name, " is ", t.scalar_type(), " ", t.sizes(),
                "; accepted: ", type, " [", m, ", ", columns, "]");
    return separate_rows(t);
  };
  const Kernels& kernels = kernels_for(p.dtype);
  const auto none = [&] { return at::empty({0}, dy.options()); };  // results must not alias
  at::Tensor dx = none(), x, s;
  if (need_dx) dx = at::empty({m, w.k}, dy.options());
  p.lddx = w.k;
  const int64_t light = m * w.n + p.rank * (w.n + w.k) * (m + 1);
  const auto partials = [&](int64_t columns) {
    const auto padded = [](int64_t v, int64_t to) { return (v + to - 1) / to * to; };
    return at::zeros({threads_for(light), padded(p.rank, kernels.rank_multiple),
                      padded(columns, kernels.column_multiple)}, at::kFloat);
  };
  at::Tensor da = none(), db = none();
  if (need_da && p.rank > 0) {
    TORCH_CHECK(x_given.has_value(), "quant_linear (cpu): the gradient of lora_a needs x");
    x = operand(*x_given, w.k, "x");
    p.ldx = row_stride(x);
    da = partials(w.k);
    p.da = da.mutable_data_ptr<float>();
  }
  if (need_db && p.rank > 0) {
    s = operand(s_given, p.rank, "s");
    p.lds = row_stride(s);
    db = partials(w.n);
    p.db = db.mutable_data_ptr<float>();
  }
  const auto size = static_cast<int64_t>(dy.element_size());
  const auto at_row = [&](const at::Tensor& t, int64_t elements) {
    return static_cast<char*>(const_cast<void*>(t.const_data_ptr())) + elements * size;
  };
  for (int64_t row = 0; row < m; row += kMaxRows) {
    p.row0 = row;
    p.m = std::min(kMaxRows, m - row);
    p.dy = at_row(dy, row * p.lddy);
    if (need_dx) p.dx = at_row(dx, row * p.lddx);
    if (p.da != nullptr) p.x = at_row(x, row * p.ldx);
    if (p.db != nullptr) p.s = at_row(s, row * p.lds);
    run_job(kernels.bwd, p, light, p.m * w.k * w.n);
  }
  if (p.da != nullptr) {
    da = sum_partials(da, p.rank, w.k, 1.0f, false, lora_a->scalar_type());
  }
  if (p.db != nullptr) {
    db = sum_partials(db, p.rank, w.n, p.scaling, true, lora_b->scalar_type());
  }
  return {dx, da, db};
}

}  // namespace lora_kernels::quant_linear
