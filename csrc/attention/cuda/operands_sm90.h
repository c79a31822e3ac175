// What the copy engine is told about q, k, v and dO. Host code.
#pragma once

#include "../../common/tensor_map.h"
#include "forward_sm90_schedule.h"
#include "launch.h"

namespace lora_kernels::attention::cuda {

struct Extents {
  int64_t rows, heads, batch;
};

inline Extents query_extents(const AttentionParams& p) {
  return {p.rows, p.heads, p.cu_rows == nullptr ? p.batch : 1};
}
inline Extents key_extents(const AttentionParams& p) {
  return {p.keys, p.kv_heads, p.cu_rows == nullptr ? p.batch : 1};
}

// Strides in bytes are multiples of 16 below 2^40; 0 would read one row over and over.
inline bool describable(const Strided& t, const Extents& e) {
  const struct {
    int64_t stride, extent;
  } dimensions[] = {{t.row, e.rows}, {t.head, e.heads}, {t.batch, e.batch}};
  for (const auto& d : dimensions) {
    if (d.extent > 1 && (d.stride <= 0 || d.stride >= int64_t{1} << 39)) return false;
  }
  return true;
}

// Null where the Hopper kernels can run the problem.
inline const char* check_sm90(const AttentionParams& p) {
  if (p.softcap != 0.0f || p.slopes != nullptr || p.drop_threshold != 0) {
    return "softcap, ALiBi and dropout are not in the sm_90a kernels";
  }
  if (!(p.scale > 0.0f)) return "the sm_90a kernels want a scale above 0";
  if (p.batch == 0 || p.rows == 0 || p.keys == 0) return "the sm_90a kernels want queries and keys";
  if (!describable(p.q, query_extents(p)) || !describable(p.k, key_extents(p)) ||
      !describable(p.v, key_extents(p))) {
    return "an operand is expanded (a stride of 0), which the copy engine does not read";
  }
  return nullptr;
}

// [batch, rows, heads, D], copied in boxes of 64 columns and `box_rows` rows. Strides of extents of
// 1 are never used, but have to be valid.
inline cudaError_t encode_operand(TensorMap* map, const AttentionParams& p, const Strided& t,
                                  const Extents& e, int box_rows) {
  const auto bytes = [&](int64_t stride, int64_t extent) {
    return 2 * (extent > 1 ? stride : int64_t{p.head_dim});
  };
  return encode_tensor_map(map, p.dtype,
                           {t.data,
                            {p.head_dim, e.rows, e.heads, e.batch},
                            {bytes(t.row, e.rows), bytes(t.head, e.heads), bytes(t.batch, e.batch)},
                            {kTileColumns, box_rows, 1, 1}});
}

}  // namespace lora_kernels::attention::cuda
