// Products of packed strips on the tile unit, and the way of a finished tile to Y.
#pragma once

#include "quant_linear.h"
#include "tile_rows.h"

namespace lora_kernels::quant_linear {
namespace {

// The four accumulators: rows 0-15 and 16-31 of the left strip by the two tiles of the right one.
template <bool kTwoRows, bool kTwoColumns>
inline void zero_tiles() {
  _tile_zero(0);
  if constexpr (kTwoColumns) _tile_zero(1);
  if constexpr (kTwoRows) _tile_zero(2);
  if constexpr (kTwoRows && kTwoColumns) _tile_zero(3);
}
template <bool kTwoRows, bool kTwoColumns>
inline void load_tiles(const float* c) {
  _tile_loadd(0, c, kStrip * 4);
  if constexpr (kTwoColumns) _tile_loadd(1, c + 16, kStrip * 4);
  if constexpr (kTwoRows) _tile_loadd(2, c + 16 * kStrip, kStrip * 4);
  if constexpr (kTwoRows && kTwoColumns) _tile_loadd(3, c + 16 * kStrip + 16, kStrip * 4);
}
template <bool kTwoRows, bool kTwoColumns>
inline void store_tiles(float* c) {
  _tile_stored(0, c, kStrip * 4);
  if constexpr (kTwoColumns) _tile_stored(1, c + 16, kStrip * 4);
  if constexpr (kTwoRows) _tile_stored(2, c + 16 * kStrip, kStrip * 4);
  if constexpr (kTwoRows && kTwoColumns) _tile_stored(3, c + 16 * kStrip + 16, kStrip * 4);
}
// The operand that is not read again soon, whose tiles would push the other out of L1.
enum class Passing { kLeft, kRight };

// beside() runs after each step, under the products that are still on their way.
template <bool kTwoRows, bool kTwoColumns, Passing kPassing = Passing::kLeft, class Beside>
inline void add_products(const bf16* left, const bf16* right, int64_t steps, int64_t width,
                         Beside&& beside, int64_t right_step = kStepTiles) {
  constexpr bool kLeft = kPassing == Passing::kLeft;
  const int64_t stride = width * 4;
  for (; steps > 0; --steps, left += kStepTiles, right += right_step) {
    if constexpr (kLeft) {
      _tile_stream_loadd(4, left, 64);
      _tile_loadd(6, right, stride);
    } else {
      _tile_loadd(4, left, 64);
      _tile_stream_loadd(6, right, stride);
    }
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTwoColumns) {
      if constexpr (kLeft) {
        _tile_loadd(7, right + kTile, stride);
      } else {
        _tile_stream_loadd(7, right + kTile, stride);
      }
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kTwoRows) {
      if constexpr (kLeft) {
        _tile_stream_loadd(5, left + kTile, 64);
      } else {
        _tile_loadd(5, left + kTile, 64);
      }
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kTwoColumns) _tile_dpbf16ps(3, 5, 7);
    }
    beside();
  }
}
template <bool kTwoRows, bool kTwoColumns>
inline void add_products(const bf16* left, const bf16* right, int64_t steps, int64_t width) {
  add_products<kTwoRows, kTwoColumns>(left, right, steps, width, [] {});
}

template <class Body>
inline void with_shape(int64_t rows, int64_t columns, const Body& body) {
  using True = std::true_type;
  using False = std::false_type;
  if (rows > 16) {
    columns > 16 ? body(True{}, True{}) : body(True{}, False{});
  } else {
    columns > 16 ? body(False{}, True{}) : body(False{}, False{});
  }
}

// Two rows of fp32 as 16 pairs of bf16.
inline __m512i pairs(__m512 even, __m512 odd) {
  alignas(64) static constexpr uint16_t kInterleave[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave),
                                  as_int(_mm512_cvtne2ps_pbh(odd, even)));
}

// 32 rows x 16 columns of fp32, given by rows, to 16 rows of 32 bf16, in eight pieces of some dozen
// instructions: four times 8 rows of the source, then four times 4 rows of the result.
class Transposed {
 public:
  static constexpr int64_t kPieces = 8;

  // Rows [8 q, 8 q + 8); value(row) gives its 16 values.
  template <class Value>
  void take(int64_t q, const Value& value) {
    __m512i v[4];
    for (int64_t i = 0; i < 4; ++i) v[i] = pairs(value(8 * q + 2 * i), value(8 * q + 2 * i + 1));
    const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
    const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    _mm512_store_si512(words_[0][q], _mm512_unpacklo_epi64(a, c));
    _mm512_store_si512(words_[1][q], _mm512_unpackhi_epi64(a, c));
    _mm512_store_si512(words_[2][q], _mm512_unpacklo_epi64(b, d));
    _mm512_store_si512(words_[3][q], _mm512_unpackhi_epi64(b, d));
  }
  // put(column, its 32 values) for columns q, 4 + q, 8 + q, 12 + q.
  template <class Put>
  void give(int64_t q, const Put& put) const {
    const auto word = [&](int i) { return _mm512_load_si512(words_[q][i]); };
    const __m512i a = _mm512_shuffle_i32x4(word(0), word(1), 0x88);
    const __m512i b = _mm512_shuffle_i32x4(word(0), word(1), 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(word(2), word(3), 0x88);
    const __m512i d = _mm512_shuffle_i32x4(word(2), word(3), 0xdd);
    put(q, _mm512_shuffle_i32x4(a, c, 0x88));
    put(q + 4, _mm512_shuffle_i32x4(b, d, 0x88));
    put(q + 8, _mm512_shuffle_i32x4(a, c, 0xdd));
    put(q + 12, _mm512_shuffle_i32x4(b, d, 0xdd));
  }

 private:
  alignas(64) uint32_t words_[4][4][16];
};

// dst[column, row] = c[row, column] for columns [j, j + 16) of the first rows x columns of a 32 x 32
// tile.
inline void store_transposed(const float* c, int64_t j, int64_t rows, int64_t columns, bf16* dst,
                             int64_t ld) {
  const uint32_t keep = rows >= 32 ? ~0u : (1u << rows) - 1u;
  Transposed tile;
  for (int64_t q = 0; q < 4; ++q) {
    tile.take(q, [&](int64_t row) { return _mm512_load_ps(c + row * kStrip + j); });
  }
  for (int64_t q = 0; q < 4; ++q) {
    tile.give(q, [&](int64_t i, __m512i v) {
      if (j + i < columns) _mm512_mask_storeu_epi16(dst + (j + i) * ld, keep, v);
    });
  }
}

// A finished tile of Y^T on its way to Y, in pieces that fit beside the products of the next tile.
// Where the scale of a row of W was left to the result, y = c * scale * factor + update.
class PendingTile {
 public:
  PendingTile(const FwdParams& p, bool unscaled, bool stream)
      : p_(p), unscaled_(unscaled), stream_(stream),
        factor_(_mm512_set1_ps(p.weight->layout == Layout::kInt8 ? p.weight->factor : 1.0f)) {}

  // Tile of W's rows from n0 and X's rows from `row`; update null: none.
  void set(const float* c, const float* update, int64_t n0, int64_t row) {
    c_ = c;
    update_ = update;
    n0_ = n0;
    row_ = row;
    rows_ = std::min(kStrip, p_.weight->n - n0);
    step_ = 0;
    end_ = Transposed::kPieces * (p_.m - row > 16 ? 2 : 1);
    if (!unscaled_) return;
    const bool each = p_.weight->layout == Layout::kInt8;
    for (int64_t i = 0; i < rows_; ++i) {
      scales_[i] = p_.weight->scale[each ? n0 + i : (n0 + i) / p_.weight->block_rows];
    }
  }
  int64_t steps() const { return end_ - step_; }
  void step() {
    const int64_t j = step_ / Transposed::kPieces * 16, q = step_ % Transposed::kPieces;
    ++step_;
    if (q < 4) {
      take(j, q);
    } else {
      give(j, q - 4);
    }
  }
  void flush() {
    while (step_ < end_) step();
  }

 private:
  void take(int64_t j, int64_t q) {
    const float* bias = p_.bias == nullptr ? nullptr : p_.bias + n0_;
    tile_.take(q, [&](int64_t row) {
      if (row >= rows_) return _mm512_setzero_ps();
      __m512 v = _mm512_load_ps(c_ + row * kStrip + j);
      if (unscaled_) {
        v = _mm512_mul_ps(_mm512_mul_ps(v, _mm512_set1_ps(scales_[row])), factor_);
        if (update_ != nullptr) v = _mm512_add_ps(v, _mm512_load_ps(update_ + row * kStrip + j));
      }
      return bias == nullptr ? v : _mm512_add_ps(v, _mm512_set1_ps(bias[row]));
    });
  }
  void give(int64_t j, int64_t q) const {
    const uint32_t keep = rows_ >= 32 ? ~0u : (1u << rows_) - 1u;
    const int64_t columns = std::min(kStrip, p_.m - row_) - j;
    bf16* to = static_cast<bf16*>(p_.y) + (row_ + j) * p_.ldy + n0_;
    tile_.give(q, [&](int64_t i, __m512i v) {
      if (i >= columns) return;
      if (stream_ && rows_ >= 32) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i * p_.ldy), v);
      } else {
        _mm512_mask_storeu_epi16(to + i * p_.ldy, keep, v);
      }
    });
  }

  const FwdParams& p_;
  const bool unscaled_, stream_;
  const __m512 factor_;
  const float *c_ = nullptr, *update_ = nullptr;
  int64_t n0_ = 0, row_ = 0, rows_ = 0, step_ = 0, end_ = 0;
  float scales_[kStrip];
  Transposed tile_;
};

}  // namespace
}  // namespace lora_kernels::quant_linear
