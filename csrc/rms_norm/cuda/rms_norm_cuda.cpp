// Host entry of the CUDA kernels of rms_norm, on the LibTorch stable ABI: library
// lora_kernels_cuda. Shapes and dtypes are those of lora_kernels/ops/rms_norm/cuda.py, which has
// checked them; here only what a wrong caller could crash on is checked again.
//
// Forward:   [pad]  the norm with S;  with more than 64 columns of S the norm, lora_linear's shrink.
// Backward:  dx and the shares of dweight, their sum.
// Everything runs on the current stream of x's device, allocates through torch and never waits for
// the device, so a call can be captured into a graph.
#include <tuple>

#include "../../common/stable_torch.h"
#include "../../lora_linear/cuda/operands.h"
#include "launch.h"

namespace lora_kernels::rms_norm::cuda {
namespace {

namespace lora = lora_linear::cuda;
using stable::as_matrix;
using stable::check_launch;
using stable::dtype_of;
using stable::Matrix;
using stable::Place;
using stable::ScalarType;
using stable::Tensor;

constexpr stable::Require require{"rms_norm"};

// The weight as the kernels read it, contiguous; what it returns has to outlive the launch.
template <class Params>
std::optional<Tensor> add_weight(Params& p, const std::optional<Tensor>& weight, const Matrix& x) {
  if (!weight.has_value()) return std::nullopt;
  require(weight->numel() == x.columns && stable::same_device(*weight, x.tensor),
          "weight does not fit x");
  Tensor held = torch::stable::contiguous(*weight);
  p.weight = held.const_data_ptr();
  p.weight_dtype = dtype_of(held, "weight");
  return held;
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor x_in, std::optional<Tensor> weight,
                                           std::vector<Tensor> lora_as, double eps,
                                           double offset) {
  const Place place(x_in);
  const Matrix x = as_matrix(x_in, "x");
  const Dtype dtype = dtype_of(x_in, "x");
  require(lora_as.size() <= kMaxMembers, "a group has at most 8 members");
  std::vector<Matrix> a;
  std::vector<lora::Operand> operands;
  lora::Pads pads(x.tensor, dtype);
  int64_t columns = 0;
  for (const Tensor& t : lora_as) {
    a.push_back(as_matrix(t, "lora_a"));
    require(a.back().columns == x.columns && stable::same_device(t, x.tensor),
            "lora_a does not fit x");
    operands.push_back(pads.add(a.back(), 0, x.columns));
    columns += a.back().rows;
  }
  pads.launch(place.stream);
  Tensor y = stable::empty(x.tensor, {x.rows, x.columns});
  Tensor rstd = stable::empty(x.tensor, {x.rows}, ScalarType::Float);
  Tensor s = stable::empty(x.tensor, {x.rows, columns});
  NormalizeParams p{};
  p.dtype = dtype;
  p.m = x.rows;
  p.k = x.columns;
  p.x = x.data;
  p.ldx = x.ld;
  const std::optional<Tensor> held = add_weight(p, weight, x);
  p.eps = static_cast<float>(eps);
  p.offset = static_cast<float>(offset);
  p.y = y.mutable_data_ptr();
  p.rstd = static_cast<float*>(rstd.mutable_data_ptr());
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
  require(check(p));
  check_launch(launch_normalize(p, place.stream), "normalize");
  if (together) return {y, rstd, s};

  lora::shrink_rows(y, dtype, a, operands, s, place);
  return {y, rstd, s};
}

std::tuple<Tensor, Tensor> backward(Tensor dy_in, Tensor x_in, std::optional<Tensor> weight,
                                    Tensor rstd, double offset, bool need_dweight) {
  const Place place(x_in);
  const Matrix x = as_matrix(x_in, "x"), dy = as_matrix(dy_in, "dy");
  const Dtype dtype = dtype_of(x_in, "x");
  require(dy.rows == x.rows && dy.columns == x.columns && dtype_of(dy_in, "dy") == dtype &&
              stable::same_device(dy_in, x.tensor),
          "dy has another shape, dtype or device than x");
  require(rstd.numel() == x.rows && dtype_of(rstd, "rstd") == Dtype::kFloat32 &&
              stable::same_device(rstd, x.tensor) && rstd.is_contiguous(),
          "rstd is not that of forward");
  GradientParams p{};
  p.dtype = dtype;
  p.m = x.rows;
  p.k = x.columns;
  p.dy = dy.data;
  p.lddy = dy.ld;
  p.x = x.data;
  p.ldx = x.ld;
  const std::optional<Tensor> held = add_weight(p, weight, x);
  p.rstd = static_cast<const float*>(rstd.const_data_ptr());
  p.offset = static_cast<float>(offset);
  Tensor dx = stable::empty(x.tensor, {x.rows, x.columns});
  p.dx = dx.mutable_data_ptr();
  const bool wanted = need_dweight && held.has_value();
  Tensor dw = stable::empty(held.has_value() ? *held : x.tensor, {wanted ? x.columns : 0});
  if (wanted) p.dw = dw.mutable_data_ptr();
  p.sm_count = place.sm_count;
  Tensor space = stable::workspace(x.tensor, gradients_workspace(p));
  p.workspace = space.mutable_data_ptr();
  require(check(p));
  check_launch(launch_gradients(p, place.stream), "gradients");
  return {dx, dw};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(LK_LIBRARY, m) {
  m.def(
      "rms_norm_fwd(Tensor x, Tensor? weight, Tensor[] lora_as, float eps, float offset) "
      "-> (Tensor y, Tensor rstd, Tensor s)");
  m.def(
      "rms_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, float offset, "
      "bool need_dweight) -> (Tensor dx, Tensor dweight)");
}

STABLE_TORCH_LIBRARY_IMPL(LK_LIBRARY, LK_KEY, m) {
  m.impl("rms_norm_fwd", TORCH_BOX(&forward));
  m.impl("rms_norm_bwd", TORCH_BOX(&backward));
}

}  // namespace lora_kernels::rms_norm::cuda
