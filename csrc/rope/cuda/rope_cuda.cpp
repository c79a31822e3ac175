// Host entry of the CUDA kernel of rope, on the LibTorch stable ABI: library lora_kernels_cuda.
// Shapes and dtypes are those of lora_kernels/ops/rope/cuda.py, which has checked them; here only
// what a wrong caller could crash on is checked again.
//
// Runs on the current stream of the heads' device and never waits for it: a call can be captured.
#include <climits>

#include "../../common/stable_torch.h"
#include "launch.h"
#include "tables.h"

namespace lora_kernels::rope::cuda {
namespace {

using stable::Tensor;

constexpr stable::Require require{"rope"};

// heads [B, S, H, D] or [S, H, D] of one dtype, into `outs`, tensors of their shapes.
void rotate(const std::vector<Tensor>& heads, const std::vector<Tensor>& outs, const Tensor& cos,
            const Tensor& sin, const std::optional<Tensor>& ids, bool interleaved, bool inverse) {
  require(!heads.empty() && heads.size() <= kMaxTensors, "one launch takes 1 to 8 tensors");
  const Tensor& first = heads[0];
  const stable::Place place(first);
  const int64_t dims = first.dim();
  require(dims == 3 || dims == 4, "heads have three or four dimensions");
  const int64_t batch = dims == 4 ? first.size(0) : 1, sequence = first.size(dims - 3);
  require(first.size(dims - 1) <= INT_MAX, "a head is too large");
  RotateParams p{};
  p.dtype = stable::dtype_of(first, "q");
  p.batch = batch;
  p.head_dim = static_cast<int>(first.size(dims - 1));
  p.inverse = inverse;
  p.tensors = static_cast<int>(heads.size());
  for (size_t i = 0; i < heads.size(); ++i) {
    const Tensor &x = heads[i], &y = outs[i];
    require(x.dim() == dims && x.size(dims - 1) == p.head_dim && x.size(dims - 3) == sequence &&
                (dims == 3 || x.size(0) == batch) && x.scalar_type() == first.scalar_type(),
            "heads differ in shape or dtype");
    require(stable::same_device(x, first),
            "heads are on different devices");
    require(x.size(dims - 2) <= INT_MAX, "too many heads");
    RotateTensor& t = p.tensor[i];
    t.x = x.const_data_ptr();
    t.y = y.mutable_data_ptr();
    t.x_batch = dims == 4 ? x.stride(0) : 0;
    t.y_batch = dims == 4 ? y.stride(0) : 0;
    t.x_row = x.stride(dims - 3), t.y_row = y.stride(dims - 3);
    t.x_head = x.stride(dims - 2), t.y_head = y.stride(dims - 2);
    t.x_channel = x.stride(dims - 1), t.y_channel = y.stride(dims - 1);
    t.heads = static_cast<int>(x.size(dims - 2));
  }
  if (batch == 0 || sequence == 0) return;
  p.rotation = make_rotation(cos, sin, ids, batch, sequence, interleaved, first);
  require(check(p));
  stable::check_launch(launch_rotate(p, place.stream), "rotate");
}

std::vector<Tensor> rope_rotate(std::vector<Tensor> heads, Tensor cos, Tensor sin,
                                std::optional<Tensor> ids, bool interleaved, bool inverse) {
  std::vector<Tensor> outs;
  for (const Tensor& x : heads) {
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i < x.dim(); ++i) sizes.push_back(x.size(i));
    outs.push_back(stable::empty(x, sizes));
  }
  rotate(heads, outs, cos, sin, ids, interleaved, inverse);
  return outs;
}

void rope_rotate_in_place(std::vector<Tensor> heads, Tensor cos, Tensor sin,
                          std::optional<Tensor> ids, bool interleaved) {
  rotate(heads, heads, cos, sin, ids, interleaved, false);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(LK_LIBRARY, m) {
  m.def(
      "rope_rotate(Tensor[] heads, Tensor cos, Tensor sin, Tensor? position_ids, "
      "bool interleaved, bool inverse) -> Tensor[]");
  m.def(
      "rope_rotate_in_place(Tensor(a!)[] heads, Tensor cos, Tensor sin, Tensor? position_ids, "
      "bool interleaved) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(LK_LIBRARY, LK_KEY, m) {
  m.impl("rope_rotate", TORCH_BOX(&rope_rotate));
  m.impl("rope_rotate_in_place", TORCH_BOX(&rope_rotate_in_place));
}

}  // namespace lora_kernels::rope::cuda
