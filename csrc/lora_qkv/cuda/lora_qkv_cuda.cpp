// Host entry of the CUDA kernels of lora_qkv, on the LibTorch stable ABI: library
// lora_kernels_cuda. Shapes and dtypes are those of lora_kernels/ops/lora_qkv/cuda.py, which has
// checked them; here only what a wrong caller could crash on is checked again.
//
// [pad]  shrink  the projection with the rotation. The backward is rope's kernel and lora_linear's.
// Everything runs on the current stream of x's device, allocates through torch and never waits for
// the device, so a call can be captured into a graph.
#include <climits>
#include <tuple>

#include "../../common/stable_torch.h"
#include "../../lora_linear/cuda/forward.h"
#include "../../rope/cuda/tables.h"
#include "launch.h"

namespace lora_kernels::lora_qkv::cuda {
namespace {

using stable::Tensor;

constexpr stable::Require require{"lora_qkv"};

// The kernel of this device and these operands, or sm80 or sm90 by name.
void project(const ProjectionParams& p, const std::string& name, const stable::Place& place) {
  require(check(p));
  if (name == "sm90") {
    require(place.hopper, "the sm_90a kernel needs compute capability 9.0");
    require(check_sm90(p));
  } else {
    require(name == "auto" || name == "sm80", "gemm is unknown; accepted: auto, sm80, sm90");
  }
  const bool hopper = name != "sm80" && place.hopper && check_sm90(p) == nullptr;
  if (hopper && (name == "sm90" || worthwhile_sm90(p))) {
    return stable::check_launch(launch_project_sm90(p, place.stream), "project_sm90");
  }
  stable::check_launch(launch_project(p, place.stream), "project_sm80");
}

std::tuple<std::vector<Tensor>, Tensor> forward(
    Tensor x, std::vector<Tensor> weights, std::vector<Tensor> lora_as, std::vector<Tensor> lora_bs,
    std::vector<std::optional<Tensor>> biases, std::vector<double> scalings, double keep_scale,
    int64_t threshold, std::optional<Tensor> seed, Tensor cos, Tensor sin,
    std::optional<Tensor> position_ids, int64_t sequence, int64_t head_dim,
    std::vector<int64_t> rotated, bool interleaved, std::string gemm) {
  const stable::Place place(x);
  const lora::Forward made =
      lora::prepare_forward(place, x, weights, lora_as, lora_bs, biases, scalings, keep_scale,
                            threshold, seed, std::nullopt);
  ProjectionParams p{};
  p.gemm = made.gemm;
  require(rotated.size() == weights.size(), "the lists differ in length");
  require(head_dim > 0 && head_dim <= INT_MAX && sequence > 0 && p.gemm.m % sequence == 0,
          "the rows are not whole sequences, or a head has no channels");
  p.head_dim = static_cast<int>(head_dim);
  for (size_t g = 0; g < rotated.size(); ++g) {
    require(rotated[g] >= 0 && rotated[g] <= INT_MAX, "more heads rotated than there are");
    p.rotated[g] = static_cast<int>(rotated[g]);
  }
  p.rotation = rope::cuda::make_rotation(cos, sin, position_ids, p.gemm.m / sequence, sequence,
                                         interleaved, x);
  project(p, gemm, place);
  return {made.ys, made.s[0]};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(LK_LIBRARY, m) {
  m.def(
      "lora_qkv_fwd(Tensor x, Tensor[] weights, Tensor[] lora_as, Tensor[] lora_bs, "
      "Tensor?[] biases, float[] scalings, float keep_scale, int threshold, Tensor? seed, "
      "Tensor cos, Tensor sin, Tensor? position_ids, int sequence, int head_dim, int[] rotated, "
      "bool interleaved, str gemm) -> (Tensor[] ys, Tensor s)");
}

STABLE_TORCH_LIBRARY_IMPL(LK_LIBRARY, LK_KEY, m) { m.impl("lora_qkv_fwd", TORCH_BOX(&forward)); }

}  // namespace lora_kernels::lora_qkv::cuda
