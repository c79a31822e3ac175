// Host entry of the CUDA kernels of lora_linear, on the LibTorch stable ABI: library
// lora_kernels_cuda. Shapes, dtypes and the group are those of
// lora_kernels/ops/lora_linear/cuda.py, which has checked them; here only what a wrong caller could
// crash on is checked again.
//
// Forward:  [pad]  shrink  GEMM.   Backward:  [pad]  one pass over dY  dA  GEMM.
// A given S is scaled by pad, without a shrink; a given dS leaves the pass over dY to dB alone.
// Everything runs on the current stream of x's device, allocates through torch and never waits for
// the device, so a call can be captured into a graph.
#include <tuple>

#include "../../common/stable_torch.h"
#include "forward.h"
#include "gemm_sm90.h"

namespace lora_kernels::lora_linear::cuda {
namespace {

using stable::as_matrix;
using stable::check_launch;
using stable::dtype_of;
using stable::Matrix;
using stable::Place;
using stable::Tensor;

// The GEMM of this device and these operands; `name` is "auto" or one kernel by name.
void run_gemm(const GemmParams& p, const std::string& name, const Place& place) {
  struct Named {
    const char* name;
    Sm90Config config;
  };
  static constexpr Named kSm90[] = {{"sm90", Sm90Config::kChoose},
                                    {"sm90_128x256_cluster", Sm90Config::k128x256Cluster},
                                    {"sm90_128x256", Sm90Config::k128x256},
                                    {"sm90_128x128_cluster", Sm90Config::k128x128Cluster},
                                    {"sm90_128x128", Sm90Config::k128x128}};
  require(check(p));
  if (name == "auto") {
    if (place.hopper && check_sm90(p) == nullptr) {
      return check_launch(launch_gemm_sm90(p, Sm90Config::kChoose, place.stream), "gemm_sm90");
    }
    return check_launch(launch_gemm_sm80(p, place.stream), "gemm_sm80");
  }
  if (name == "sm80") return check_launch(launch_gemm_sm80(p, place.stream), "gemm_sm80");
  for (const Named& known : kSm90) {
    if (name != known.name) continue;
    require(place.hopper, "the sm_90a GEMM needs compute capability 9.0");
    require(check_sm90(p, known.config));
    return check_launch(launch_gemm_sm90(p, known.config, place.stream), "gemm_sm90");
  }
  require.refuse("gemm='" + name +
                 "' is unknown; accepted: auto, sm80, sm90, sm90_128x256_cluster, sm90_128x256, "
                 "sm90_128x128_cluster, sm90_128x128");
}

std::tuple<std::vector<Tensor>, Tensor> forward(Tensor x, std::vector<Tensor> weights,
                                                std::vector<Tensor> lora_as,
                                                std::vector<Tensor> lora_bs,
                                                std::vector<std::optional<Tensor>> biases,
                                                std::vector<double> scalings, double keep_scale,
                                                int64_t threshold, std::optional<Tensor> seed,
                                                std::string gemm, std::optional<Tensor> shrunk) {
  const Place place(x);
  const Forward made = prepare_forward(place, x, weights, lora_as, lora_bs, biases, scalings,
                                       keep_scale, threshold, seed, shrunk);
  run_gemm(made.gemm, gemm, place);
  return {made.ys, made.s[0]};
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> backward(
    std::vector<Tensor> dys_in, Tensor x_in, std::vector<Tensor> weights,
    std::vector<Tensor> lora_as, std::vector<Tensor> lora_bs, Tensor s_in,
    std::vector<double> scalings, double keep_scale, int64_t threshold, std::optional<Tensor> seed,
    bool need_dx, bool need_da, bool need_db, std::string gemm, std::optional<Tensor> ds_in) {
  const Place place(x_in);
  const Matrix x = as_matrix(x_in, "x"), s = as_matrix(s_in, "s");
  const std::vector<Matrix> w = as_matrices(weights, "weight"), a = as_matrices(lora_as, "lora_a"),
                            b = as_matrices(lora_bs, "lora_b"), dy = as_matrices(dys_in, "dy");
  check_group(x, w, a, b, scalings);
  const size_t members = w.size();
  const Dtype dtype = dtype_of(x_in, "x");
  const Ranks ranks(a);
  require(dy.size() == members, "the lists differ in length");
  require(s.rows == x.rows && s.columns == ranks.sum && dtype_of(s_in, "s") == dtype,
          "s has another shape or dtype than forward gave it");
  require(threshold == 0 || ranks.all_positive(), kMaskedFrozen);
  const Dropout dropout = make_dropout(threshold, seed);
  const std::optional<Matrix> given_ds = given(ds_in, "ds", x, ranks.sum, threshold);
  const bool need_ds = need_dx || need_da;
  const bool make_ds = need_ds && !given_ds;
  // One that lies as the kernels want it is read in place.
  const bool in_place = given_ds && ranks.sum == ranks.padded_sum &&
                        aligned16(given_ds->data, given_ds->ld);

  const Tensor none = stable::empty(x.tensor, {0});
  Tensor own_ds =
      need_ds && !in_place ? stable::empty(x.tensor, {x.rows, ranks.padded_sum}) : none;
  const char* const ds_data =
      static_cast<const char*>(in_place ? given_ds->data : own_ds.const_data_ptr());
  const int64_t ldds = in_place ? given_ds->ld : ranks.padded_sum;
  Pads pads(x.tensor, dtype);
  std::vector<Operand> pa(members), pb(members), ps(members);
  for (size_t g = 0; g < members; ++g) {
    require(
        dy[g].rows == x.rows && dy[g].columns == w[g].rows && dtype_of(dys_in[g], "dy") == dtype,
        "dy has another shape or dtype than y");
    if (ranks.rank[g] == 0) continue;
    if (need_dx) pa[g] = pads.add(a[g], 0, a[g].columns);
    if (make_ds) pb[g] = pads.add(b[g], 0, b[g].columns);
    if (need_ds && given_ds && !in_place) {
      pads.copy(*given_ds, ranks.column[g], ranks.rank[g], 1.0f,
                static_cast<char*>(own_ds.mutable_data_ptr()) + 2 * ranks.padded_column[g], ldds);
    }
    if (need_db) ps[g] = pads.add(s, ranks.column[g], ranks.rank[g]);
  }
  pads.launch(place.stream);

  std::vector<Tensor> das, dbs;
  if (need_db) {
    for (const Matrix& m : b) dbs.push_back(stable::empty(m.tensor, {m.rows, m.columns}));
  }
  if ((make_ds || need_db) && ranks.sum > 0) {
    DyPassParams pass{};
    pass.dtype = dtype;
    pass.m = x.rows;
    for (size_t g = 0; g < members; ++g) {
      if (ranks.rank[g] == 0) continue;
      DyMember& member = pass.member[pass.members++];
      member.dy = dy[g].data;
      member.lddy = dy[g].ld;
      member.b = pb[g].data;
      member.ldb = pb[g].ld;
      member.s = ps[g].data;
      member.lds = ps[g].ld;
      member.n = w[g].rows;
      member.rank = ranks.rank[g];
      member.padded_column = ranks.padded_column[g];
      member.scaling = static_cast<float>(scalings[g]);
      if (need_db) {
        member.db = dbs[g].mutable_data_ptr();
        member.lddb = b[g].columns;
        member.db_dtype = dtype_of(dbs[g], "lora_b");
      }
    }
    pass.ds = make_ds ? own_ds.mutable_data_ptr() : nullptr;
    pass.ldds = ranks.padded_sum;
    pass.keep_scale = static_cast<float>(keep_scale);
    pass.sm_count = place.sm_count;
    Tensor space = stable::workspace(x.tensor, dy_pass_workspace(pass));
    pass.workspace = space.mutable_data_ptr();
    require(check(pass));
    check_launch(launch_dy_pass(pass, place.stream), "dy_pass");
  }
  if (need_da) {
    for (const Matrix& m : a) das.push_back(stable::empty(m.tensor, {m.rows, m.columns}));
  }
  if (need_da && ranks.sum > 0) {
    DaParams p{};
    p.dtype = dtype;
    p.x = x.data;
    p.ldx = x.ld;
    p.ds = ds_data;
    p.ldds = ldds;
    p.m = x.rows;
    p.k = x.columns;
    for (size_t g = 0; g < members; ++g) {
      if (ranks.rank[g] == 0) continue;
      p.member[p.members++] = {ranks.rank[g], ranks.padded_column[g], das[g].mutable_data_ptr(),
                               a[g].columns, dtype_of(das[g], "lora_a")};
    }
    p.dropout = dropout;
    p.sm_count = place.sm_count;
    Tensor space = stable::workspace(x.tensor, da_workspace(p));
    p.workspace = space.mutable_data_ptr();
    require(check(p));
    check_launch(launch_da(p, place.stream), "da");
  }
  Tensor dx = need_dx ? stable::empty(x.tensor, {x.rows, x.columns}) : none;
  if (need_dx) {
    GemmParams p{};
    p.dtype = dtype;
    p.layout = OperandLayout::kKN;
    p.m = x.rows;
    p.problems = 1;
    p.problem[0].n = p.problem[0].ldc = x.columns;
    p.problem[0].c = dx.mutable_data_ptr();
    p.dropout = dropout;
    p.sm_count = place.sm_count;
    int& terms = p.problem[0].terms;
    for (size_t g = 0; g < members; ++g) {
      if (ranks.rank[g] == 0) continue;
      const char* part = ds_data + 2 * ranks.padded_column[g];
      const int stream = threshold > 0 ? static_cast<int>(g) : -1;
      p.term[terms++] = {part, ldds, pa[g].data, pa[g].ld, ranks.rank[g], stream};
    }
    for (size_t g = 0; g < members; ++g) {
      p.term[terms++] = {dy[g].data, dy[g].ld, w[g].data, w[g].ld, w[g].rows, -1};
    }
    run_gemm(p, gemm, place);
  }
  return {dx, das, dbs};
}

std::string build_info() { return std::string("nvcc ") + LK_NVCC_VERSION + "; " + LK_CUDA_TARGETS; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(LK_LIBRARY, m) {
  m.def(
      "lora_linear_fwd(Tensor x, Tensor[] weights, Tensor[] lora_as, Tensor[] lora_bs, "
      "Tensor?[] biases, float[] scalings, float keep_scale, int threshold, Tensor? seed, "
      "str gemm, Tensor? shrunk=None) -> (Tensor[] ys, Tensor s)");
  m.def(
      "lora_linear_bwd(Tensor[] dys, Tensor x, Tensor[] weights, Tensor[] lora_as, "
      "Tensor[] lora_bs, Tensor s, float[] scalings, float keep_scale, int threshold, "
      "Tensor? seed, bool need_dx, bool need_da, bool need_db, str gemm, Tensor? ds=None) "
      "-> (Tensor dx, Tensor[] das, Tensor[] dbs)");
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(LK_LIBRARY, LK_KEY, m) {
  m.impl("lora_linear_fwd", TORCH_BOX(&forward));
  m.impl("lora_linear_bwd", TORCH_BOX(&backward));
}

STABLE_TORCH_LIBRARY_IMPL(LK_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}

}  // namespace lora_kernels::lora_linear::cuda
