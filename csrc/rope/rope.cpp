// Host entry of rope on the CPU: checks, Params, threads.
#include "rope_host.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <utility>

#include "../common/tensor_operands.h"
#include "../cpu/isa.h"
#include "rope.h"

namespace lora_kernels::rope {
namespace {

Dtype dtype_of(const at::Tensor& t) { return lora_kernels::dtype_of(t.scalar_type(), "rope"); }

TableDtype table_dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return TableDtype::kFloat32;
    case at::kBFloat16:
      return TableDtype::kBFloat16;
    case at::kHalf:
      return TableDtype::kFloat16;
    case at::kDouble:
      return TableDtype::kFloat64;
    default:
      TORCH_CHECK(false, "rope (cpu): cos or sin has dtype ", t.scalar_type(),
                  "; accepted: float32, bfloat16, float16, float64");
  }
}

// Of a tensor that has `dims` axes with that of the batch; 0 where it has none or shares one.
int64_t batch_stride(const at::Tensor& t, int64_t dims) {
  return t.dim() < dims || t.size(0) == 1 ? 0 : t.stride(0);
}

Table table_of(const at::Tensor& t) {
  return {t.const_data_ptr(), table_dtype_of(t), batch_stride(t, 3), t.stride(-2), t.stride(-1)};
}

void check_rows(const at::Tensor& t, int64_t batch, int64_t positions) {
  TORCH_CHECK(t.size(-2) == positions && (t.dim() == 2 || t.size(0) == 1 || t.size(0) == batch),
              "rope (cpu): cos and sin need a row for each position");
}

}  // namespace

std::vector<at::Tensor> rope_rotate(const std::vector<at::Tensor>& heads, const at::Tensor& cos,
                                    const at::Tensor& sin,
                                    const std::optional<at::Tensor>& position_ids,
                                    bool interleaved, bool inverse, bool in_place) {
  TORCH_CHECK(!heads.empty() && heads.size() <= kMaxTensors, "rope (cpu): 1 to ", kMaxTensors,
              " tensors are accepted");
  const at::Tensor& q = heads[0];
  const Dtype dtype = dtype_of(q);
  TORCH_CHECK(q.dim() == 3 || q.dim() == 4, "rope (cpu): heads must be 3-D or 4-D");
  const int64_t batch = q.dim() == 4 ? q.size(0) : 1;
  RopeParams p{};
  p.positions = q.size(-3);
  p.channels = q.size(-1);
  p.rotated = cos.size(-1);
  TORCH_CHECK((cos.dim() == 2 || cos.dim() == 3) && cos.sizes() == sin.sizes() &&
                  p.rotated % 2 == 0 && p.rotated > 0 && p.rotated <= p.channels,
              "rope (cpu): cos and sin must have one shape and an even number of channels");
  p.cos = table_of(cos);
  p.sin = table_of(sin);
  if (position_ids) {
    const at::Tensor& ids = *position_ids;
    TORCH_CHECK((ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt) &&
                    ids.dim() >= 1 && ids.dim() <= 2 && ids.size(-1) == p.positions &&
                    (ids.dim() == 1 || ids.size(0) == 1 || ids.size(0) == batch) && cos.dim() == 2,
                "rope (cpu): position_ids must be int32 or int64, a row of them for each sequence");
    p.ids = ids.const_data_ptr();
    p.wide_ids = ids.scalar_type() == at::kLong;
    p.ids_batch = batch_stride(ids, 2);
    p.ids_row = ids.stride(-1);
  } else {
    check_rows(cos, batch, p.positions);
  }
  std::vector<at::Tensor> sources, results;
  int64_t work = 0;
  for (const at::Tensor& t : heads) {
    TORCH_CHECK(t.dim() == q.dim() && t.scalar_type() == q.scalar_type() &&
                    t.size(-1) == p.channels && t.size(-3) == p.positions &&
                    (t.dim() == 3 || t.size(0) == batch),
                "rope (cpu): heads must differ in their number alone");
    const bool readable = t.stride(-1) == 1 || t.numel() == 0;
    TORCH_CHECK(readable || !in_place, "rope (cpu): channels must lie side by side in place");
    sources.push_back(readable ? t : t.contiguous());
    results.push_back(in_place ? t : at::empty(t.sizes(), t.options()));
    const at::Tensor &x = sources.back(), &y = results.back();
    p.heads[p.tensors++] = {x.const_data_ptr(),  y.mutable_data_ptr(),
                            t.size(-2),          batch_stride(x, 4), x.stride(-3), x.stride(-2),
                            batch_stride(y, 4),  y.stride(-3),       y.stride(-2)};
    work += t.size(-2) * p.channels;
  }
  const int64_t places = batch * p.positions;
  if (places == 0 || work == 0) return results;
  const RotateKernel kernel = cpu::for_active_isa(nullptr, rotate_avx512, rotate_avx2,
                                                  rotate_baseline, dtype, interleaved, inverse);
  const int64_t grain = std::max<int64_t>(1, 32768 / work);
  at::parallel_for(0, places, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(2 * p.rotated));
    kernel(p, begin, end, scratch.data());
  });
  return results;
}

}  // namespace lora_kernels::rope
