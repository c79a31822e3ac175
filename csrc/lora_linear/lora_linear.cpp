// Host entry of lora_linear on the CPU: checks, output allocation, Params, grid, engine.
#include "lora_linear_host.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>

#include "../common/tensor_operands.h"
#include "../cpu/isa.h"
#include "../cpu/memory.h"
#include "few_rows.h"
#include "lora_linear.h"

namespace lora_kernels::lora_linear {
namespace {

Dtype dtype_of(const at::Tensor& t) {
  return lora_kernels::dtype_of(t.scalar_type(), "lora_linear");
}

const Engine& engine_for(Dtype dtype) {
  return *cpu::for_active_isa(engine_amx, engine_avx512, engine_avx2, engine_baseline, dtype);
}

// Splits rows first; columns too where there are fewer strips of rows than threads. Every column
// share repeats the packing and the shrink of its rows, which the cost counts.
Grid choose_grid(const Engine& e, int64_t m, int64_t k, int64_t n, int64_t rank) {
  const int64_t strips = (m + e.mr - 1) / e.mr;
  // With few rows the time goes into reading the weight.
  if (static_cast<double>(m) * k * n < 1 << 20 && k * n < 1 << 17) return {1, 1};
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  Grid best{1, 1};
  double best_cost = -1;
  for (int tm = 1; tm <= threads; ++tm) {
    const int tn = threads / tm;
    const double cost = static_cast<double>((strips + tm - 1) / tm) *
                        (static_cast<double>(n) / tn + static_cast<double>(rank) + 64.0);
    if (best_cost < 0 || cost <= best_cost) {
      best = {tm, tn};
      best_cost = cost;
    }
  }
  return best;
}

struct Operand {
  at::Tensor source;
  int64_t k, n;
  bool columns;  // source is [n, k]
  void* packed;
};

// Packs all small operands in one parallel region.
std::shared_ptr<void> pack_all(const Engine& e, std::vector<Operand>& operands, int threads) {
  size_t bytes = 0;
  for (Operand& o : operands) {
    o.packed = reinterpret_cast<void*>(bytes);
    bytes += round_up(packed_b_bytes(e, o.k, o.n), 64);
  }
  std::shared_ptr<void> block = cpu::allocate(bytes);
  for (Operand& o : operands) {
    o.packed = static_cast<char*>(block.get()) + reinterpret_cast<size_t>(o.packed);
  }
  run_threads(threads, [&](int t) {
    for (const Operand& o : operands) {
      (o.columns ? e.pack_b_cols : e.pack_b_rows)(dtype_of(o.source), o.source.const_data_ptr(),
                                                  row_stride(o.source), o.k, o.n, o.packed, t,
                                                  threads);
    }
  });
  return block;
}

void check_packed(const Engine& e, const at::Tensor& packed, int64_t k, int64_t n) {
  TORCH_CHECK(packed.nbytes() == static_cast<size_t>(packed_b_bytes(e, k, n)),
              "lora_linear (cpu): packed weight has ", packed.nbytes(), " bytes; engine ", e.name,
              " needs ", packed_b_bytes(e, k, n), " for [", n, ", ", k, "]");
}

// S or dS of the caller as the engines read it.
at::Tensor given(const at::Tensor& t, const char* name, at::ScalarType dtype, int64_t m,
                 int64_t ranks, double dropout_p) {
  TORCH_CHECK(t.dim() == 2 && t.size(0) == m && t.size(1) == ranks && t.scalar_type() == dtype,
              "lora_linear (cpu): ", name, " is ", t.scalar_type(), " ", t.sizes(), "; accepted: ",
              dtype, " [", m, ", ", ranks, "]");
  TORCH_CHECK(dropout_p == 0.0, "lora_linear (cpu): ", name,
              " is given with dropout; accepted: dropout_p=0");
  return rows_in(t, dtype);
}

}  // namespace

std::string engine_name(at::ScalarType dtype) {
  return engine_for(dtype_of(at::empty({0}, dtype))).name;
}

int64_t engine_id(at::ScalarType dtype) {
  return reinterpret_cast<int64_t>(&engine_for(lora_kernels::dtype_of(dtype, "lora_linear")));
}

int64_t packed_bytes(at::ScalarType dtype, int64_t k, int64_t n) {
  return packed_b_bytes(engine_for(dtype_of(at::empty({0}, dtype))), k, n);
}

at::Tensor pack_weight(const at::Tensor& weight, at::ScalarType dtype, bool for_dgrad) {
  TORCH_CHECK(weight.dim() == 2 && weight.device().is_cpu(),
              "pack_weight: weight must be a 2-D CPU tensor");
  const Engine& e = engine_for(dtype_of(at::empty({0}, dtype)));
  const at::Tensor source = rows_in(weight, dtype);
  const int64_t k = weight.size(for_dgrad ? 0 : 1), n = weight.size(for_dgrad ? 1 : 0);
  const int64_t bytes = packed_b_bytes(e, k, n);
  std::shared_ptr<void> block = cpu::allocate(bytes);
  const int threads = at::get_num_threads();
  run_threads(threads, [&](int t) {
    (for_dgrad ? e.pack_b_rows : e.pack_b_cols)(dtype_of(source), source.const_data_ptr(),
                                                row_stride(source), k, n, block.get(), t, threads);
  });
  return at::from_blob(block.get(), {bytes}, [block](void*) mutable { block.reset(); },
                       at::TensorOptions().dtype(at::kByte));
}

std::tuple<std::vector<at::Tensor>, at::Tensor> lora_linear_fwd(
    const at::Tensor& x_in, const std::vector<at::Tensor>& packed,
    const std::vector<int64_t>& out_features, const std::vector<at::Tensor>& lora_as,
    const std::vector<at::Tensor>& lora_bs, const std::vector<std::optional<at::Tensor>>& biases,
    const std::vector<double>& scalings, double dropout_p, const std::optional<at::Tensor>& seed,
    const std::optional<at::Tensor>& shrunk) {
  const at::ScalarType dtype = x_in.scalar_type();
  const at::Tensor x = rows_in(x_in, dtype);
  const Engine& e = engine_for(dtype_of(x));
  FwdParams p{};
  p.m = x.size(0);
  p.k = x.size(1);
  p.members = static_cast<int>(packed.size());
  TORCH_CHECK(p.members >= 1 && p.members <= kMaxGroup, "lora_linear (cpu): a group has ",
              p.members, " members; accepted: 1 to ", kMaxGroup);
  p.dropout = dropout_params(dropout_p, seed);
  p.keep_scale = keep_scale(p.dropout);
  int64_t ranks = 0, columns = 0;
  std::vector<Operand> operands;
  std::vector<at::Tensor> ys, held;
  for (int g = 0; g < p.members; ++g) {
    FwdMember& w = p.member[g];
    w.n = out_features[g];
    w.rank = lora_as[g].size(0);
    w.s_column = ranks;
    w.scaling = static_cast<float>(scalings[g]);
    check_packed(e, packed[g], p.k, w.n);
    w.w_packed = packed[g].const_data_ptr();
    if (biases[g].has_value()) {
      held.push_back(biases[g]->to(at::kFloat).contiguous());
      w.bias = held.back().const_data_ptr<float>();
    }
    ys.push_back(at::empty({p.m, w.n}, x.options()));
    w.y = ys.back().mutable_data_ptr();
    w.ldy = w.n;
    if (!shrunk) operands.push_back({rows_in(lora_as[g], dtype), p.k, w.rank, true, nullptr});
    operands.push_back({rows_in(lora_bs[g], dtype), w.rank, w.n, true, nullptr});
    ranks += w.rank;
    columns += w.n;
  }
  at::Tensor s;
  p.x = x.const_data_ptr();
  p.ldx = row_stride(x);
  if (shrunk) {
    s = given(*shrunk, "shrunk", dtype, p.m, ranks, dropout_p);
    p.given_s = s.const_data_ptr();
    p.lds = row_stride(s);
  } else {
    s = at::empty({p.m, ranks}, x.options());
    p.s = s.mutable_data_ptr();
    p.lds = ranks;
  }
  const Grid grid = choose_grid(e, p.m, p.k, columns, shrunk ? 0 : ranks);
  const int threads = grid.threads_m * grid.threads_n;
  const std::shared_ptr<void> block = pack_all(e, operands, threads);
  for (int g = 0; g < p.members; ++g) {
    if (!shrunk) p.member[g].a_packed = operands[2 * g].packed;
    p.member[g].b_packed = operands[shrunk ? g : 2 * g + 1].packed;
  }
  const int64_t bytes = e.fwd_workspace(p, grid);
  run_threads(threads, [&](int t) { e.fwd(p, grid, t, cpu::thread_workspace(bytes)); });
  return {ys, s};
}

int64_t few_rows(at::ScalarType dtype) {
  if (cpu::active_isa() < cpu::Isa::kAvx2) return 0;
  const bool tiles = std::string(engine_name(dtype)) == "amx";
  return dtype == at::kFloat || tiles ? 1 : 2;
}

std::tuple<std::vector<at::Tensor>, at::Tensor> lora_linear_fwd_few(
    const at::Tensor& x_in, const std::vector<at::Tensor>& weights,
    const std::vector<at::Tensor>& lora_as, const std::vector<at::Tensor>& lora_bs,
    const std::vector<std::optional<at::Tensor>>& biases, const std::vector<double>& scalings,
    const std::optional<at::Tensor>& shrunk) {
  const at::ScalarType dtype = x_in.scalar_type();
  const at::Tensor x = separate_rows(x_in);
  FewParams p{};
  p.m = x.size(0);
  p.k = x.size(1);
  p.members = static_cast<int>(weights.size());
  TORCH_CHECK(p.m <= kFewRows && p.members >= 1 && p.members <= kMaxGroup,
              "lora_linear (cpu): ", p.m, " rows and ", p.members,
              " members; accepted: at most ", kFewRows, " and 1 to ", kMaxGroup);
  int64_t columns = 0;
  std::vector<at::Tensor> ys, held;
  const auto rows = [&](const at::Tensor& t, int64_t& ld, Dtype& as) {
    held.push_back(rows_in(t, dtype));
    ld = row_stride(held.back());
    as = dtype_of(held.back());
    return held.back().const_data_ptr();
  };
  for (int g = 0; g < p.members; ++g) {
    FewMember& w = p.member[g];
    TORCH_CHECK(weights[g].scalar_type() == dtype, "lora_linear (cpu): a weight is ",
                weights[g].scalar_type(), "; accepted: ", dtype);
    Dtype as;
    w.w = rows(weights[g], w.ldw, as);
    w.a = rows(lora_as[g], w.lda, w.a_dtype);
    w.b = rows(lora_bs[g], w.ldb, w.b_dtype);
    w.n = weights[g].size(0);
    w.rank = lora_as[g].size(0);
    w.s_column = p.ranks;
    w.scaling = static_cast<float>(scalings[g]);
    if (biases[g].has_value()) {
      held.push_back(biases[g]->to(at::kFloat).contiguous());
      w.bias = held.back().const_data_ptr<float>();
    }
    ys.push_back(at::empty({p.m, w.n}, x.options()));
    w.y = ys.back().mutable_data_ptr();
    p.ranks += w.rank;
    columns += w.n;
  }
  at::Tensor s;
  if (shrunk) {
    s = given(*shrunk, "shrunk", dtype, p.m, p.ranks, 0.0);
    p.given_s = s.const_data_ptr();
    p.lds = row_stride(s);
  } else {
    s = at::empty({p.m, p.ranks}, x.options());
    p.s = s.mutable_data_ptr();
  }
  p.x = x.const_data_ptr();
  p.ldx = row_stride(x);
  const FewRows& few = *cpu::for_active_isa<decltype(&few_rows_baseline)>(
      nullptr, few_rows_avx512, few_rows_avx2, few_rows_baseline, dtype_of(x));
  const int64_t bytes = few.workspace(p);
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 16) / p.k);  // columns worth a thread
  at::parallel_for(0, columns, grain, [&](int64_t begin, int64_t end) {
    few.fwd(p, begin, end, cpu::thread_workspace(bytes));
  });
  return {ys, s};
}

std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>> lora_linear_bwd(
    const std::vector<at::Tensor>& dys_in, const at::Tensor& x_in,
    const std::vector<at::Tensor>& packed, const std::vector<at::Tensor>& lora_as,
    const std::vector<at::Tensor>& lora_bs, const at::Tensor& s_in,
    const std::vector<double>& scalings, double dropout_p, const std::optional<at::Tensor>& seed,
    bool need_dx, bool need_da, bool need_db, const std::optional<at::Tensor>& ds) {
  const at::ScalarType dtype = x_in.scalar_type();
  const at::Tensor x = rows_in(x_in, dtype), s = rows_in(s_in, dtype);
  const Engine& e = engine_for(dtype_of(x));
  BwdParams p{};
  p.m = x.size(0);
  p.k = x.size(1);
  p.members = static_cast<int>(dys_in.size());
  TORCH_CHECK(p.members >= 1 && p.members <= kMaxGroup, "lora_linear (cpu): a group has ",
              p.members, " members; accepted: 1 to ", kMaxGroup);
  p.dropout = dropout_params(dropout_p, seed);
  p.keep_scale = keep_scale(p.dropout);
  int64_t ranks = 0, columns = 0;
  std::vector<Operand> operands;
  std::vector<at::Tensor> dys;
  for (int g = 0; g < p.members; ++g) {
    BwdMember& w = p.member[g];
    dys.push_back(rows_in(dys_in[g], dtype));
    w.dy = dys.back().const_data_ptr();
    w.lddy = row_stride(dys.back());
    w.n = dys.back().size(1);
    w.rank = lora_as[g].size(0);
    w.s_column = ranks;
    w.scaling = static_cast<float>(scalings[g]);
    if (need_dx) {
      check_packed(e, packed[g], w.n, p.k);
      w.w_packed = packed[g].const_data_ptr();
    }
    operands.push_back({rows_in(lora_as[g], dtype), w.rank, p.k, false, nullptr});
    if (!ds) operands.push_back({rows_in(lora_bs[g], dtype), w.n, w.rank, false, nullptr});
    ranks += w.rank;
    columns += w.n;
  }
  p.x = x.const_data_ptr();
  p.ldx = row_stride(x);
  p.s = s.const_data_ptr();
  p.lds = row_stride(s);
  at::Tensor ds_rows;
  if (ds) {
    ds_rows = given(*ds, "ds", dtype, p.m, ranks, dropout_p);
    p.given_ds = ds_rows.const_data_ptr();
    p.ldds = row_stride(ds_rows);
  }
  at::Tensor dx = at::empty({need_dx ? p.m : 0, need_dx ? p.k : 0}, x.options());
  if (need_dx) {
    p.dx = dx.mutable_data_ptr();
    p.lddx = p.k;
  } else {
    dx = at::empty({0}, x.options());
  }
  const Grid grid = choose_grid(e, p.m, columns, p.k, ds ? 0 : ranks);
  const int threads = grid.threads_m * grid.threads_n;
  std::vector<at::Tensor> da_partials, db_partials;
  for (int g = 0; g < p.members; ++g) {
    BwdMember& w = p.member[g];
    const int64_t rank_padded = round_up(w.rank, e.mr);
    const auto partial = [&](int64_t n) {
      return at::zeros({grid.threads_m, rank_padded, round_up(n, e.nv)}, at::kFloat);
    };
    if (need_da) {
      da_partials.push_back(partial(p.k));
      w.da = da_partials.back().mutable_data_ptr<float>();
    }
    if (need_db) {
      db_partials.push_back(partial(w.n));
      w.db = db_partials.back().mutable_data_ptr<float>();
    }
  }
  const std::shared_ptr<void> block = pack_all(e, operands, threads);
  for (int g = 0; g < p.members; ++g) {
    p.member[g].a_packed = operands[ds ? g : 2 * g].packed;
    if (!ds) p.member[g].bt_packed = operands[2 * g + 1].packed;
  }
  const int64_t bytes = e.bwd_workspace(p, grid);
  run_threads(threads, [&](int t) { e.bwd(p, grid, t, cpu::thread_workspace(bytes)); });
  std::vector<at::Tensor> das, dbs;
  for (int g = 0; g < p.members; ++g) {
    const BwdMember& w = p.member[g];
    if (need_da) {
      das.push_back(sum_partials(da_partials[g], w.rank, p.k, 1.0f, false,
                                    lora_as[g].scalar_type()));
    }
    if (need_db) {
      dbs.push_back(sum_partials(db_partials[g], w.rank, w.n, w.scaling, true,
                                    lora_bs[g].scalar_type()));
    }
  }
  return {dx, das, dbs};
}

}  // namespace lora_kernels::lora_linear
