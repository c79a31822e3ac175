// Rows of cos and sin, and the rotation of a pair. Also the epilogue of lora_qkv.
#pragma once

#include "../../common/convert.cuh"
#include "params.h"

namespace lora_kernels::rope::cuda {

// Where the row of a table begins; a position outside of the cache is not known, and gives NaN.
struct TableRow {
  int64_t cos, sin;
  bool known;
};

LK_DEVICE TableRow table_row(const Rotation& r, uint32_t place) {
  const uint32_t sequence = static_cast<uint32_t>(r.sequence);
  if (LK_FAULT(kShiftedTable)) ++place;
  const int64_t b = place / sequence, n = place % sequence;
  if (r.ids == nullptr) {
    return {b * r.cos.batch + n * r.cos.row, b * r.sin.batch + n * r.sin.row, true};
  }
  const int64_t at = b * r.ids_batch + n * r.ids_row;
  const int64_t id = r.ids_bytes == 8 ? static_cast<const int64_t*>(r.ids)[at]
                                      : static_cast<const int32_t*>(r.ids)[at];
  const bool known = id >= 0 && id < r.positions;
  const int64_t row = known ? id : 0;
  return {row * r.cos.row, row * r.sin.row, known};
}

LK_DEVICE float load_channel(const Table& t, int64_t row, int channel) {
  return load_as_float(t.data, row + channel * t.channel, t.dtype);
}

LK_DEVICE float not_a_number() {
#if defined(LK_EMULATOR)
  return bits_to_float(0x7fc00000u);
#else
  return __uint_as_float(0x7fc00000u);
#endif
}

// z1 = y1 cos1 - y2 sin1, z2 = y2 cos2 + y1 sin2; transposed
// y1 = z1 cos1 + z2 sin2, y2 = z2 cos2 - z1 sin1. Either is first * c + second * s with these:
struct PairFactors {
  float c1, c2;
  float s1, s2;  // of the other channel
};

LK_DEVICE PairFactors pair_factors(float c1, float c2, float s1, float s2, bool inverse) {
  return {c1, c2, inverse ? s2 : -s1, inverse ? -s1 : s2};
}

}  // namespace lora_kernels::rope::cuda
