// Which tile of which sequence a block works on.
//
// Packed sequences need no list of tiles and no longest length from the host: in tiles of n rows,
// sequence b with its first row at c_b gets the places floor(c_b / n) + b up to, but without, those
// of b + 1. That is enough for its ceil(length / n) tiles, and a place finds its sequence by
// bisection; at most one place per sequence stays empty.
#pragma once

#include <type_traits>

#include "../../common/gpu.h"
#include "params.h"

namespace lora_kernels::attention::cuda {

struct Sequence {
  int b;     // -1: an empty place
  int tile;  // within the sequence
  int rows, keys;
  int first_row, first_key;  // in packed tensors; 0 otherwise

  LK_DEVICE int offset() const { return keys - rows; }  // the last query stands at the last key
};

// Of queries, or where kOfKeys of keys.
template <int kSize, bool kOfKeys>
LK_DEVICE Sequence find_sequence(const AttentionParams& p, int place) {
  Sequence s{0, 0, p.rows, p.keys, 0, 0};
  if (p.cu_rows == nullptr) {
    const int per = static_cast<int>(ceil_div(kOfKeys ? p.keys : p.rows, kSize));
    s.b = place / per;
    s.tile = place % per;
    return s;
  }
  const int32_t* ends = kOfKeys ? p.cu_keys : p.cu_rows;
  int low = 0, high = p.batch;  // places: low's is <= place, high's is above
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (ends[middle] / kSize + middle <= place) {
      low = middle;
    } else {
      high = middle;
    }
  }
  s.b = low;
  s.tile = place - (ends[low] / kSize + low);
  s.first_row = p.cu_rows[low];
  s.first_key = p.cu_keys[low];
  s.rows = p.cu_rows[low + 1] - p.cu_rows[low];
  s.keys = p.cu_keys[low + 1] - p.cu_keys[low];
  if (static_cast<int64_t>(s.tile) * kSize >= (kOfKeys ? s.keys : s.rows)) s.b = -1;
  return s;
}

// Element (first + i, head) of a sequence; `first` is first_row or first_key.
template <class T, class Tensor>
LK_DEVICE auto* at(const Tensor& t, int b, int64_t first, int64_t i, int head) {
  using Pointer = decltype(t.data);
  if constexpr (std::is_const_v<std::remove_pointer_t<Pointer>>) {
    return static_cast<const T*>(t.data) + b * t.batch + (first + i) * t.row + head * t.head;
  } else {
    return static_cast<T*>(t.data) + b * t.batch + (first + i) * t.row + head * t.head;
  }
}

// Of lse, dlse and delta: [B, H, S], packed [H, T].
LK_DEVICE int64_t statistic(const AttentionParams& p, const Sequence& s, int head) {
  return p.cu_rows == nullptr ? (static_cast<int64_t>(s.b) * p.heads + head) * p.rows
                              : static_cast<int64_t>(head) * p.rows + s.first_row;
}

}  // namespace lora_kernels::attention::cuda
