// Columns of a quantized weight as right operands of the tile unit, for dX = dY W.
//
// A block is up to 512 rows by some groups of 64 columns. A group is two strips of 32 columns; a strip
// is, per step of 32 rows, two tiles of [16 row pairs][16 columns][row of the pair]. NF4, FP4,
// INT4 and INT8 go from codes to tiles in registers; others are decoded into 16 x 64 elements first.
#pragma once

#include "tile_rows.h"

namespace lora_kernels::quant_linear {
namespace {

// Lanes of 16 bits: pairs of element i of two vectors, i below and from 16.
inline __m512i pair_low(__m512i even, __m512i odd) {
  alignas(64) static constexpr uint16_t kIndex[32] = {
      0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  return _mm512_permutex2var_epi16(even, _mm512_load_si512(kIndex), odd);
}
inline __m512i pair_high(__m512i even, __m512i odd) {
  alignas(64) static constexpr uint16_t kIndex[32] = {
      16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
      24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  return _mm512_permutex2var_epi16(even, _mm512_load_si512(kIndex), odd);
}

// Decodes a block in units of 16 rows x 64 columns, rows first.
class ColumnDecoder {
 public:
  explicit ColumnDecoder(const Weight& w) : w_(w) {
    if (w.layout == Layout::kFlat) {
      kind_ = w.k % 64 == 0 && w.block % 64 == 0 ? Kind::kTable : Kind::kAny;
    } else if (w.layout == Layout::kInt4) {
      const bool whole = w.group_of == nullptr && (w.block % 64 == 0 || w.scale_columns == 1);
      kind_ = whole ? Kind::kZeros : Kind::kAny;
    } else {
      kind_ = w.layout == Layout::kInt8 ? Kind::kInt8 : Kind::kAny;
    }
  }

  // Rows [n0, n1), groups [g0, g1), strips `strip` elements apart at dst. Rows up to the next step
  // are zero.
  void begin(int64_t n0, int64_t n1, int64_t g0, int64_t g1, int64_t strip, bf16* dst) {
    n_ = n0_ = n0;
    n1_ = n1;
    g_ = g0_ = g0;
    g1_ = g1;
    strip_ = strip;
    dst_ = dst;
  }
  int64_t units() const {
    const int64_t halves = (round_up(n1_ - n0_, kStep) - (n_ - n0_)) / 16;
    return halves <= 0 ? 0 : halves * (g1_ - g0_) - (g_ - g0_);
  }
  void step() {
    const int64_t row = n_ - n0_;
    bf16* to = dst_ + row / kStep * kStepTiles + row % kStep / 2 * 32 + (g_ - g0_) * 2 * strip_;
    const int64_t k0 = g_ * kGroup, columns = std::min(kGroup, w_.k - k0);
    const int64_t rows = std::min<int64_t>(16, n1_ - n_);
    if (rows == 16 && columns == kGroup && kind_ == Kind::kTable) {
      table_pairs<false>(k0, to);
    } else if (rows == 16 && columns == kGroup && kind_ == Kind::kZeros) {
      table_pairs<true>(k0, to);
    } else if (rows == 16 && columns == kGroup && kind_ == Kind::kInt8) {
      int8_pairs(k0, to);
    } else {
      any_pairs(k0, rows, columns, to);
    }
    if (++g_ < g1_) return;
    g_ = g0_;
    n_ += 16;
  }
  void finish() {
    while (units() > 0) step();
  }
  // Each unit asks for the rows after it itself.
  static constexpr int64_t lines_of_unit() { return 0; }
  void fetch() {}

 private:
  enum class Kind { kTable, kZeros, kInt8, kAny };
  static constexpr int64_t kRowsAhead = 16;  // rows are pages apart: no hardware prefetcher follows

  void store(bf16* to, __m512i a, __m512i b, __m512i c, __m512i d) const {
    _mm512_store_si512(to, a);
    _mm512_store_si512(to + kTile, b);
    _mm512_store_si512(to + strip_, c);
    _mm512_store_si512(to + strip_ + kTile, d);
  }

  // The 16 values of the block of row n that holds column k0.
  template <bool kZeros>
  __m512 values(__m512 codebook, int64_t n, int64_t k0) const {
    if constexpr (!kZeros) {
      return _mm512_mul_ps(codebook, _mm512_set1_ps(flat_scale(w_, (n * w_.k + k0) / w_.block)));
    }
    const int64_t at = n * w_.scale_columns + (w_.scale_columns == 1 ? 0 : k0 / w_.block);
    return _mm512_mul_ps(_mm512_sub_ps(codebook, _mm512_set1_ps(w_.zero[at])),
                         _mm512_set1_ps(w_.scale[at]));
  }

  template <bool kZeros>
  void table_pairs(int64_t k0, bf16* to) const {
    alignas(64) static constexpr uint32_t kLow[16] = {0, 16, 1, 17, 2, 18, 3, 19,
                                                      4, 20, 5, 21, 6, 22, 7, 23};
    alignas(64) static constexpr uint32_t kHigh[16] = {8,  24, 9,  25, 10, 26, 11, 27,
                                                       12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i low = _mm512_load_si512(kLow), high = _mm512_load_si512(kHigh);
    const __m512 codebook =
        kZeros ? _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
               : _mm512_loadu_ps(w_.table);
    const int64_t stride = kZeros ? w_.row_bytes : w_.k / 2;
    const uint8_t* codes = w_.codes + n_ * stride + k0 / 2;
    for (int64_t i = 0; i < 16; i += 2, to += 32, codes += 2 * stride) {
      _mm_prefetch(codes + kRowsAhead * stride, _MM_HINT_T0);
      _mm_prefetch(codes + (kRowsAhead + 1) * stride, _MM_HINT_T0);
      const __m512i tables = as_int(_mm512_cvtne2ps_pbh(values<kZeros>(codebook, n_ + i + 1, k0),
                                                        values<kZeros>(codebook, n_ + i, k0)));
      // Bit 4 of an index is a bit of the other nibble: both halves of a table are the same.
      const __m512i even_table = _mm512_shuffle_i64x2(tables, tables, 0x44);
      const __m512i odd_table = _mm512_shuffle_i64x2(tables, tables, 0xee);
      const __m512i e =
          _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
      const __m512i o = _mm512_cvtepu8_epi16(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + stride)));
      // Even columns are the high nibbles, odd columns the low ones.
      const __m512i ee = _mm512_permutexvar_epi16(_mm512_srli_epi16(e, 4), even_table);
      const __m512i eo = _mm512_permutexvar_epi16(e, even_table);
      const __m512i oe = _mm512_permutexvar_epi16(_mm512_srli_epi16(o, 4), odd_table);
      const __m512i oo = _mm512_permutexvar_epi16(o, odd_table);
      const __m512i a = pair_low(ee, oe), b = pair_low(eo, oo);
      const __m512i c = pair_high(ee, oe), d = pair_high(eo, oo);
      store(to, _mm512_permutex2var_epi32(a, low, b), _mm512_permutex2var_epi32(a, high, b),
            _mm512_permutex2var_epi32(c, low, d), _mm512_permutex2var_epi32(c, high, d));
    }
  }

  void int8_pairs(int64_t k0, bf16* to) const {
    const __m512 factor = _mm512_set1_ps(w_.factor);
    const auto row = [&](int64_t n, __m512i v[2]) {
      const auto* q = reinterpret_cast<const __m128i*>(w_.codes + n * w_.k + k0);
      _mm_prefetch(reinterpret_cast<const char*>(q) + kRowsAhead * w_.k, _MM_HINT_T0);
      const __m512 scale = _mm512_set1_ps(w_.scale[n]);
      const auto wide = [&](const __m128i* p) {
        const __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p)));
        return _mm512_mul_ps(_mm512_mul_ps(code, scale), factor);
      };
      v[0] = as_int(_mm512_cvtne2ps_pbh(wide(q + 1), wide(q)));
      v[1] = as_int(_mm512_cvtne2ps_pbh(wide(q + 3), wide(q + 2)));
    };
    for (int64_t i = 0; i < 16; i += 2, to += 32) {
      __m512i e[2], o[2];
      row(n_ + i, e);
      row(n_ + i + 1, o);
      store(to, pair_low(e[0], o[0]), pair_high(e[0], o[0]), pair_low(e[1], o[1]),
            pair_high(e[1], o[1]));
    }
  }

  void any_pairs(int64_t k0, int64_t rows, int64_t columns, bf16* to) const {
    alignas(64) bf16 block[16][kGroup] = {};
    for (int64_t i = 0; i < rows; ++i) {
      bf16* row = block[i];
      if (w_.layout == Layout::kFp8 && columns == kGroup) {
        const uint8_t* codes = w_.codes + (n_ + i) * w_.k + k0;
        _mm_prefetch(reinterpret_cast<const char*>(codes) + kRowsAhead * w_.k, _MM_HINT_T0);
        if (fp8_group(w_, n_ + i, k0, row, kStep)) continue;
      }
      decode(w_, n_ + i, k0, columns, row);
    }
    for (int64_t i = 0; i < 16; i += 2, to += 32) {
      const __m512i e0 = _mm512_load_si512(block[i]), e1 = _mm512_load_si512(block[i] + 32);
      const __m512i o0 = _mm512_load_si512(block[i + 1]), o1 = _mm512_load_si512(block[i + 1] + 32);
      store(to, pair_low(e0, o0), pair_high(e0, o0), pair_low(e1, o1), pair_high(e1, o1));
    }
  }

  const Weight& w_;
  Kind kind_;
  int64_t n_ = 0, n0_ = 0, n1_ = 0, g_ = 0, g0_ = 0, g1_ = 0, strip_ = 0;
  bf16* dst_ = nullptr;
};

}  // namespace
}  // namespace lora_kernels::quant_linear
