// The forward of a group up to its GEMM, from tensors: S is made, the K-extended problem stands.
// Host code of the entries of lora_linear and of ops that have another epilogue.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "operands.h"

namespace lora_kernels::lora_linear::cuda {

inline constexpr stable::Require require{"lora_linear"};

// The kernels number the masks of members that they are given.
constexpr const char* kMaskedFrozen = "a member has no adapter (rank 0), and there is dropout";

struct Ranks {
  std::vector<int64_t> rank, column, padded_column;
  int64_t sum = 0, padded_sum = 0;

  explicit Ranks(const std::vector<stable::Matrix>& a) {
    for (const stable::Matrix& m : a) {
      rank.push_back(m.rows);
      column.push_back(sum);
      padded_column.push_back(padded_sum);
      sum += m.rows;
      padded_sum += padded_rank(m.rows);
    }
  }

  bool all_positive() const {
    for (int64_t r : rank) {
      if (r == 0) return false;
    }
    return true;
  }
};

inline std::vector<stable::Matrix> as_matrices(const std::vector<stable::Tensor>& tensors,
                                               const char* name) {
  std::vector<stable::Matrix> matrices;
  for (const stable::Tensor& t : tensors) matrices.push_back(stable::as_matrix(t, name));
  return matrices;
}

inline void check_group(const stable::Matrix& x, const std::vector<stable::Matrix>& w,
                        const std::vector<stable::Matrix>& a, const std::vector<stable::Matrix>& b,
                        const std::vector<double>& scalings) {
  const size_t members = w.size();
  require(members >= 1 && members <= kMaxGroup, "a group has 1 to 8 members");
  require(a.size() == members && b.size() == members && scalings.size() == members,
          "the lists differ in length");
  for (size_t g = 0; g < members; ++g) {
    require(w[g].columns == x.columns && a[g].columns == x.columns && b[g].rows == w[g].rows &&
                b[g].columns == a[g].rows,
            "the shapes of x, weight, lora_a and lora_b do not fit");
    require(w[g].tensor.scalar_type() == x.tensor.scalar_type(), "weight and x differ in dtype");
    for (const stable::Matrix* m : {&w[g], &a[g], &b[g]}) {
      require(stable::same_device(m->tensor, x.tensor), "an operand is on another device than x");
    }
  }
}

// S or dS of the caller, [M, sum of ranks].
inline std::optional<stable::Matrix> given(const std::optional<stable::Tensor>& t,
                                           const char* name, const stable::Matrix& x, int64_t ranks,
                                           int64_t threshold) {
  if (!t.has_value()) return std::nullopt;
  const stable::Matrix m = stable::as_matrix(*t, name);
  if (m.rows != x.rows || m.columns != ranks || t->scalar_type() != x.tensor.scalar_type() ||
      !stable::same_device(*t, x.tensor)) {
    require.refuse(std::string(name) + " has another shape, dtype or device than x asks for");
  }
  if (threshold != 0) require.refuse(std::string(name) + " is given with dropout");
  return m;
}

// A forward that lacks its GEMM. Holds what `gemm` points to: it has to live until the launch.
struct Forward {
  Forward(const stable::Matrix& x, Dtype dtype) : pads(x.tensor, dtype) { gemm.dtype = dtype; }

  GemmParams gemm{};               // Y_g = [scaled_s_g | X] [B_g | W_g]^T + bias_g
  std::vector<stable::Tensor> ys;  // [M, N_g]
  std::vector<stable::Tensor> s;   // one, [M, sum of ranks]; without rows where it was given
  std::vector<stable::Tensor> held;
  Pads pads;
};

// [pad]  shrink, or a given S scaled.
inline Forward prepare_forward(const stable::Place& place, const stable::Tensor& x_in,
                               const std::vector<stable::Tensor>& weights,
                               const std::vector<stable::Tensor>& lora_as,
                               const std::vector<stable::Tensor>& lora_bs,
                               const std::vector<std::optional<stable::Tensor>>& biases,
                               const std::vector<double>& scalings, double keep_scale,
                               int64_t threshold, const std::optional<stable::Tensor>& seed,
                               const std::optional<stable::Tensor>& shrunk) {
  const stable::Matrix x = stable::as_matrix(x_in, "x");
  const std::vector<stable::Matrix> w = as_matrices(weights, "weight"),
                                    a = as_matrices(lora_as, "lora_a"),
                                    b = as_matrices(lora_bs, "lora_b");
  check_group(x, w, a, b, scalings);
  require(biases.size() == w.size(), "the lists differ in length");
  const size_t members = w.size();
  const Ranks ranks(a);
  require(threshold == 0 || ranks.all_positive(), kMaskedFrozen);
  const std::optional<stable::Matrix> given_s = given(shrunk, "shrunk", x, ranks.sum, threshold);

  Forward made(x, stable::dtype_of(x_in, "x"));
  GemmParams& gemm = made.gemm;
  Pads& pads = made.pads;
  made.s.push_back(stable::empty(x.tensor, {given_s ? 0 : x.rows, ranks.sum}));
  stable::Tensor scaled_s = stable::empty(x.tensor, {x.rows, ranks.padded_sum});
  char* const scaled_data = static_cast<char*>(scaled_s.mutable_data_ptr());
  for (const stable::Matrix& m : w) made.held.push_back(m.tensor);
  for (const stable::Matrix& m : b) made.held.push_back(m.tensor);
  made.held.push_back(x.tensor);
  made.held.push_back(scaled_s);
  std::vector<Operand> pa, pb;
  for (size_t g = 0; g < members; ++g) {
    const bool adapted = ranks.rank[g] > 0;
    pb.push_back(adapted ? pads.add(b[g], 0, b[g].columns) : Operand{});
    pa.push_back(adapted && !given_s ? pads.add(a[g], 0, a[g].columns) : Operand{});
    if (adapted && given_s) {
      pads.copy(*given_s, ranks.column[g], ranks.rank[g], static_cast<float>(scalings[g]),
                scaled_data + 2 * ranks.padded_column[g], ranks.padded_sum);
    }
  }
  pads.launch(place.stream);

  stable::Tensor space = stable::empty(x.tensor, {0});
  if (!given_s && ranks.sum > 0) {
    ShrinkParams shrink{};
    shrink.dtype = gemm.dtype;
    shrink.x = x.data;
    shrink.ldx = x.ld;
    shrink.m = x.rows;
    shrink.k = x.columns;
    for (size_t g = 0; g < members; ++g) {
      if (ranks.rank[g] == 0) continue;
      shrink.member[shrink.members++] = {pa[g].data,
                                         pa[g].ld,
                                         ranks.rank[g],
                                         ranks.column[g],
                                         ranks.padded_column[g],
                                         static_cast<float>(scalings[g])};
    }
    shrink.s = made.s[0].mutable_data_ptr();
    shrink.lds = ranks.sum;
    shrink.scaled_s = scaled_data;
    shrink.ld_scaled = ranks.padded_sum;
    shrink.keep_scale = static_cast<float>(keep_scale);
    shrink.dropout = make_dropout(threshold, seed);
    shrink.sm_count = place.sm_count;
    space = stable::workspace(x.tensor, shrink_workspace(shrink));
    shrink.workspace = space.mutable_data_ptr();
    require(check(shrink));
    stable::check_launch(launch_shrink(shrink, place.stream), "shrink");
  }

  gemm.layout = OperandLayout::kNK;
  gemm.m = x.rows;
  gemm.problems = static_cast<int>(members);
  gemm.sm_count = place.sm_count;
  for (size_t g = 0; g < members; ++g) {
    made.ys.push_back(stable::empty(x.tensor, {x.rows, w[g].rows}));
    GemmProblem& problem = gemm.problem[g];
    problem.n = problem.ldc = w[g].rows;
    problem.c = made.ys.back().mutable_data_ptr();
    if (biases[g].has_value()) {
      require(biases[g]->numel() == w[g].rows, "a bias has another length than its weight");
      made.held.push_back(torch::stable::contiguous(*biases[g]));
      problem.bias = made.held.back().const_data_ptr();
      problem.bias_dtype = stable::dtype_of(made.held.back(), "bias");
    }
    problem.terms = ranks.rank[g] > 0 ? 2 : 1;
    problem.first_term = static_cast<int>(2 * g) + 2 - problem.terms;
    const char* scaled = scaled_data + 2 * ranks.padded_column[g];
    gemm.term[2 * g] = {scaled, ranks.padded_sum, pb[g].data, pb[g].ld, ranks.rank[g], -1};
    gemm.term[2 * g + 1] = {x.data, x.ld, w[g].data, w[g].ld, x.columns, -1};
  }
  return made;
}

}  // namespace lora_kernels::lora_linear::cuda
