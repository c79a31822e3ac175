// cos, sin and positions as the kernels want them, from tensors. Host code of the entries.
#pragma once

#include <optional>
#include <vector>

#include "../../common/stable_torch.h"
#include "params.h"

namespace lora_kernels::rope::cuda {

inline constexpr stable::Require require_rotation{"rope"};

struct Strides {
  int64_t batch, row, last;
};

// Of [S, n] or [B or 1, S, n] (of positions: [S] or [B or 1, S], last is then 0), where a batch of
// one serves every sequence; fails where the shape is another.
inline Strides batched_strides(const stable::Tensor& t, const char* name, int64_t batch,
                               int64_t rows, int trailing) {
  const int64_t dims = t.dim() - trailing;
  const bool fits = (dims == 1 && t.size(0) == rows) ||
                    (dims == 2 && (t.size(0) == batch || t.size(0) == 1) && t.size(1) == rows);
  if (!fits) require_rotation.refuse(std::string(name) + " does not fit the positions");
  const int64_t last = trailing == 1 ? t.stride(dims) : 0;
  if (dims == 1) return {0, t.stride(0), last};
  return {t.size(0) == 1 ? 0 : t.stride(0), t.stride(1), last};
}

inline Rotation make_rotation(const stable::Tensor& cos, const stable::Tensor& sin,
                              const std::optional<stable::Tensor>& ids, int64_t batch,
                              int64_t sequence, bool interleaved, const stable::Tensor& like) {
  Rotation r{};
  r.sequence = sequence;
  r.interleaved = interleaved;
  for (const stable::Tensor* t : {&cos, &sin}) {
    const char* name = t == &cos ? "cos" : "sin";
    require_rotation(stable::same_device(*t, like), "cos or sin is on another device");
    require_rotation(t->dim() >= 2, "cos or sin has no rows");
    Table& table = t == &cos ? r.cos : r.sin;
    table.data = t->const_data_ptr();
    table.dtype = stable::dtype_of(*t, name);
    const int64_t rows = ids.has_value() ? cos.size(0) : sequence;
    require_rotation(!ids.has_value() || t->dim() == 2, "a cache has two dimensions");
    const Strides s = batched_strides(*t, name, batch, rows, 1);
    table.batch = s.batch, table.row = s.row, table.channel = s.last;
    require_rotation(t->size(t->dim() - 1) == cos.size(cos.dim() - 1),
                     "cos and sin differ in channels");
  }
  r.channels = static_cast<int>(cos.size(cos.dim() - 1));
  if (ids.has_value()) {
    const bool wide = ids->scalar_type() == stable::ScalarType::Long;
    require_rotation((wide || ids->scalar_type() == stable::ScalarType::Int) &&
                         stable::same_device(*ids, like),
                     "position_ids are not int32 or int64 on the device of the heads");
    const Strides s = batched_strides(*ids, "position_ids", batch, sequence, 0);
    r.ids = ids->const_data_ptr();
    r.ids_bytes = wide ? 8 : 4;
    r.ids_batch = s.batch, r.ids_row = s.row;
    r.positions = cos.size(0);
  }
  return r;
}

}  // namespace lora_kernels::rope::cuda
