// Host entry of the CUDA kernels of gated_activation, on the LibTorch stable ABI: library
// lora_kernels_cuda. Shapes and dtypes are those of lora_kernels/ops/gated_activation/cuda.py, which
// has checked them; here only what a wrong caller could crash on is checked again.
//
// Forward:   [pad]  the activation with S;  with more than 64 columns of S the activation, shrink.
// Backward:  [pad]  the gradients with dS and dB, their sum;  with ranks above 32 the gradients, one
// pass over them (lora_linear's).
// Everything runs on the current stream of gate's device, allocates through torch and never waits
// for the device, so a call can be captured into a graph.
#include <tuple>

#include "../../common/stable_torch.h"
#include "../../lora_linear/cuda/operands.h"
#include "launch.h"

namespace lora_kernels::gated_activation::cuda {
namespace {

namespace lora = lora_linear::cuda;
using stable::as_matrix;
using stable::check_launch;
using stable::dtype_of;
using stable::Matrix;
using stable::Place;
using stable::Tensor;

constexpr stable::Require require{"gated_activation"};

// A matrix of the shape, dtype and device of `like`.
Matrix matched(const Tensor& t, const char* name, const Matrix& like) {
  const Matrix m = as_matrix(t, name);
  require(m.rows == like.rows && m.columns == like.columns &&
              t.scalar_type() == like.tensor.scalar_type(),
          "an operand has another shape or dtype than gate");
  require(stable::same_device(t, like.tensor), "an operand is on another device than gate");
  return m;
}

std::vector<Matrix> adapters(const std::vector<Tensor>& tensors, const Matrix& gate, bool columns) {
  std::vector<Matrix> found;
  for (const Tensor& t : tensors) {
    found.push_back(as_matrix(t, "an adapter"));
    require((columns ? found.back().columns : found.back().rows) == gate.columns,
            "an adapter does not fit gate");
    require(stable::same_device(t, gate.tensor), "an adapter is on another device than gate");
  }
  return found;
}

std::tuple<Tensor, Tensor> forward(Tensor gate_in, std::optional<Tensor> up_in, int64_t kind,
                                   std::vector<Tensor> lora_as) {
  const Place place(gate_in);
  const Matrix gate = as_matrix(gate_in, "gate");
  const Dtype dtype = dtype_of(gate_in, "gate");
  require(lora_as.size() <= kMaxMembers, "a group has at most 8 members");
  const std::vector<Matrix> a = adapters(lora_as, gate, true);
  lora::Pads pads(gate.tensor, dtype);
  std::vector<lora::Operand> operands;
  int64_t columns = 0;
  for (const Matrix& m : a) {
    operands.push_back(pads.add(m, 0, m.columns));
    columns += m.rows;
  }
  pads.launch(place.stream);

  Tensor h = stable::empty(gate.tensor, {gate.rows, gate.columns});
  Tensor s = stable::empty(gate.tensor, {gate.rows, columns});
  Matrix up{};
  ActivateParams p{};
  p.dtype = dtype;
  p.kind = static_cast<Kind>(kind);
  p.m = gate.rows;
  p.n = gate.columns;
  p.gate = gate.data;
  p.ldg = gate.ld;
  if (up_in.has_value()) {
    up = matched(*up_in, "up", gate);
    p.up = up.data;
    p.ldu = up.ld;
  }
  p.h = h.mutable_data_ptr();
  p.sm_count = place.sm_count;
  const bool together = columns <= kMaxShrinkColumns;
  if (together) {
    p.members = static_cast<int>(a.size());
    p.columns = static_cast<int>(columns);
    p.s = s.mutable_data_ptr();
    for (int j = 0, column = 0; j < p.members; ++j) {
      p.member[j] = {operands[j].data, operands[j].ld, static_cast<int>(a[j].rows), column};
      column += static_cast<int>(a[j].rows);
    }
  }
  Tensor space = stable::workspace(gate.tensor, activate_workspace(p));
  p.workspace = space.mutable_data_ptr();
  require(check(p));
  check_launch(launch_activate(p, place.stream), "activate");
  if (together) return {h, s};

  lora::shrink_rows(h, dtype, a, operands, s, place);
  return {h, s};
}

// dS, its columns padded where pass_over made it, and the dBs.
struct Products {
  Tensor ds;
  std::vector<Tensor> dbs;
};

// dS and dB by lora_linear's pass over gradients that are in memory.
Products pass_over(const std::vector<Tensor>& grads, const std::vector<Matrix>& b,
                   const std::vector<lora::Operand>& pb, const std::vector<lora::Operand>& ps,
                   const std::vector<double>& scalings, Dtype dtype, const Place& place) {
  const int64_t m = grads[0].size(0), n = grads[0].size(1);
  int64_t padded = 0;
  for (const Matrix& t : b) padded += lora::padded_rank(t.columns);
  Products made{stable::empty(grads[0], {m, padded}), {}};
  lora::DyPassParams p{};
  p.dtype = dtype;
  p.m = m;
  p.members = static_cast<int>(b.size());
  int64_t column = 0;
  for (size_t j = 0; j < b.size(); ++j) {
    lora::DyMember& w = p.member[j];
    w.dy = grads[j].const_data_ptr();
    w.lddy = w.n = n;
    w.b = pb[j].data;
    w.ldb = pb[j].ld;
    w.rank = b[j].columns;
    w.padded_column = column;
    w.scaling = static_cast<float>(scalings[j]);
    column += lora::padded_rank(w.rank);
    if (ps.empty()) continue;
    w.s = ps[j].data;
    w.lds = ps[j].ld;
    made.dbs.push_back(stable::empty(b[j].tensor, {n, w.rank}));
    w.db = made.dbs.back().mutable_data_ptr();
    w.lddb = w.rank;
    w.db_dtype = dtype_of(made.dbs.back(), "lora_b");
  }
  p.ds = made.ds.mutable_data_ptr();
  p.ldds = padded;
  p.keep_scale = 1.0f;
  p.sm_count = place.sm_count;
  Tensor space = stable::workspace(grads[0], lora::dy_pass_workspace(p));
  p.workspace = space.mutable_data_ptr();
  require(lora::check(p));
  check_launch(lora::launch_dy_pass(p, place.stream), "dy_pass");
  return made;
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> backward(
    Tensor dh_in, Tensor gate_in, std::optional<Tensor> up_in, int64_t kind,
    std::vector<Tensor> lora_bs, std::optional<Tensor> s_in, std::vector<double> scalings) {
  const Place place(gate_in);
  const Matrix gate = as_matrix(gate_in, "gate"), dh = matched(dh_in, "dh", gate);
  const Dtype dtype = dtype_of(gate_in, "gate");
  const std::vector<Matrix> b = adapters(lora_bs, gate, false);
  require(b.empty() || b.size() == (up_in.has_value() ? 2u : 1u), "there is not one B per operand");
  require(scalings.size() == b.size(), "the lists differ in length");
  int64_t columns = 0, largest = 0;
  for (const Matrix& m : b) {
    columns += m.columns;
    largest = m.columns > largest ? m.columns : largest;
  }
  lora::Pads pads(gate.tensor, dtype);
  std::vector<lora::Operand> pb, ps;
  for (const Matrix& m : b) pb.push_back(pads.add(m, 0, m.columns));
  Matrix s{};
  if (s_in.has_value()) {
    s = as_matrix(*s_in, "s");
    require(s.rows == gate.rows && s.columns == columns && dtype_of(*s_in, "s") == dtype &&
                stable::same_device(*s_in, gate.tensor),
            "s has another shape, dtype or device than the adapters say");
    int64_t column = 0;
    for (const Matrix& m : b) {
      ps.push_back(pads.add(s, column, m.columns));
      column += m.columns;
    }
  }
  pads.launch(place.stream);

  Matrix up{};
  GradientParams p{};
  p.dtype = dtype;
  p.kind = static_cast<Kind>(kind);
  p.m = gate.rows;
  p.n = gate.columns;
  p.dh = dh.data;
  p.ldh = dh.ld;
  p.gate = gate.data;
  p.ldg = gate.ld;
  Tensor dgate = stable::empty(gate.tensor, {gate.rows, gate.columns});
  Tensor dup = dgate;
  p.dgate = dgate.mutable_data_ptr();
  if (up_in.has_value()) {
    up = matched(*up_in, "up", gate);
    p.up = up.data;
    p.ldu = up.ld;
    dup = stable::empty(gate.tensor, {gate.rows, gate.columns});
    p.dup = dup.mutable_data_ptr();
  }
  p.sm_count = place.sm_count;
  const bool together = !b.empty() && largest <= kMaxGradientRank;
  Products made{stable::empty(gate.tensor, {gate.rows, columns}), {}};
  if (together) {
    p.members = static_cast<int>(b.size());
    p.columns = static_cast<int>(columns);
    p.ds = made.ds.mutable_data_ptr();
    int column = 0;
    for (size_t j = 0; j < b.size(); ++j) {
      GradientMember& w = p.member[j];
      w.b = pb[j].data;
      w.ldb = pb[j].ld;
      w.rank = static_cast<int>(b[j].columns);
      w.column = column;
      w.scaling = static_cast<float>(scalings[j]);
      column += w.rank;
      if (ps.empty()) continue;
      w.s = ps[j].data;
      w.lds = ps[j].ld;
      made.dbs.push_back(stable::empty(b[j].tensor, {gate.columns, b[j].columns}));
      w.db = made.dbs.back().mutable_data_ptr();
      w.db_dtype = dtype_of(made.dbs.back(), "lora_b");
    }
  }
  Tensor space = stable::workspace(gate.tensor, gradients_workspace(p));
  p.workspace = space.mutable_data_ptr();
  require(check(p));
  check_launch(launch_gradients(p, place.stream), "gradients");
  if (!b.empty() && !together) {
    std::vector<Tensor> grads{dgate};
    if (up_in.has_value()) grads.push_back(dup);
    made = pass_over(grads, b, pb, ps, scalings, dtype, place);
  }
  return {dgate, dup, made.ds, made.dbs};
}

}  // namespace

// dup is dgate without up. Where a rank is above 32, ds has padded columns: those of a member begin
// at the sum of the ranks before, each rounded up to a multiple of 8.
STABLE_TORCH_LIBRARY_FRAGMENT(LK_LIBRARY, m) {
  m.def(
      "gated_activation_fwd(Tensor gate, Tensor? up, int kind, Tensor[] lora_as) "
      "-> (Tensor h, Tensor s)");
  m.def(
      "gated_activation_bwd(Tensor dh, Tensor gate, Tensor? up, int kind, Tensor[] lora_bs, "
      "Tensor? s, float[] scalings) -> (Tensor dgate, Tensor dup, Tensor ds, Tensor[] dbs)");
}

STABLE_TORCH_LIBRARY_IMPL(LK_LIBRARY, LK_KEY, m) {
  m.impl("gated_activation_fwd", TORCH_BOX(&forward));
  m.impl("gated_activation_bwd", TORCH_BOX(&backward));
}

}  // namespace lora_kernels::gated_activation::cuda
