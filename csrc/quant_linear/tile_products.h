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
inline __m512i pairs(const float* even, const float* odd, __m512 add_even, __m512 add_odd) {
  alignas(64) static constexpr uint16_t kInterleave[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512 e = _mm512_add_ps(_mm512_load_ps(even), add_even);
  const __m512 o = _mm512_add_ps(_mm512_load_ps(odd), add_odd);
  return _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave),
                                  as_int(_mm512_cvtne2ps_pbh(o, e)));
}

// dst[column, row] = c[row, column] + bias[row] for columns [j, j + 16) of the first rows x columns
// of a 32 x 32 tile.
inline void store_transposed(const float* c, int64_t j, int64_t rows, int64_t columns,
                             const float* bias, bf16* dst, int64_t ld, bool stream) {
  const uint32_t keep = rows >= 32 ? ~0u : (1u << rows) - 1u;
  const auto add = [&](int64_t row) {
    return bias == nullptr || row >= rows ? _mm512_setzero_ps() : _mm512_set1_ps(bias[row]);
  };
  const int64_t valid = rows > 16 ? 32 : 16;
  __m512i v[16];
  for (int64_t p = 0; p < 16; ++p) {
    const float* even = c + 2 * p * kStrip + j;
    v[p] = 2 * p < valid ? pairs(even, even + kStrip, add(2 * p), add(2 * p + 1))
                         : _mm512_setzero_si512();
  }
  transpose_dwords(v);
  const int64_t count = std::min<int64_t>(16, columns - j);
  for (int64_t i = 0; i < count; ++i) {
    bf16* to = dst + (j + i) * ld;
    if (stream && rows >= 32) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), v[i]);
    } else {
      _mm512_mask_storeu_epi16(to, keep, v[i]);
    }
  }
}

// c = (c * scale) * factor + update of each row; update null: none.
inline void scale_rows(const Weight& w, int64_t n0, int64_t rows, const float* update, float* c) {
  const __m512 factor = _mm512_set1_ps(w.factor);
  for (int64_t i = 0; i < std::min(kStrip, rows); ++i) {
    const __m512 scale = _mm512_set1_ps(w.scale[n0 + i]);
    for (int64_t e = i * kStrip; e < (i + 1) * kStrip; e += 16) {
      const __m512 v = _mm512_mul_ps(_mm512_mul_ps(_mm512_load_ps(c + e), scale), factor);
      _mm512_store_ps(c + e, update == nullptr ? v : _mm512_add_ps(v, _mm512_load_ps(update + e)));
    }
  }
}

// A finished tile of Y^T on its way to Y, in steps that fit between the products of the next tile.
// Where the scale of a row of W was left to the result, y = c * scale * factor + update.
class PendingTile {
 public:
  explicit PendingTile(const FwdParams& p, bool unscaled, bool stream)
      : p_(p), unscaled_(unscaled), stream_(stream) {}

  // Tile of W's rows from n0 and X's rows from `row`; update null: none.
  void set(float* c, const float* update, int64_t n0, int64_t row) {
    c_ = c;
    update_ = update;
    n0_ = n0;
    row_ = row;
    step_ = unscaled_ ? 0 : 1;
    end_ = p_.m - row > 16 ? 3 : 2;
  }
  int64_t steps() const { return end_ - step_; }
  void step() {
    const int64_t rows = std::min(kStrip, p_.weight->n - n0_);
    if (step_ == 0) {
      scale_rows(*p_.weight, n0_, rows, update_, c_);
    } else {
      store_transposed(c_, 16 * (step_ - 1), rows, std::min(kStrip, p_.m - row_),
                       p_.bias == nullptr ? nullptr : p_.bias + n0_,
                       static_cast<bf16*>(p_.y) + row_ * p_.ldy + n0_, p_.ldy, stream_);
    }
    ++step_;
  }
  void flush() {
    while (step_ < end_) step();
  }

 private:
  const FwdParams& p_;
  const bool unscaled_, stream_;
  float* c_ = nullptr;
  const float* update_ = nullptr;
  int64_t n0_ = 0, row_ = 0, step_ = 0, end_ = 0;
};

}  // namespace
}  // namespace lora_kernels::quant_linear
