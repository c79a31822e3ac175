// Rows of operands as tiles of AMX-BF16: rows of a quantized weight and of an adapter as left
// operands, rows of X as right ones.
//
// A group is 128 columns, four steps of 32. Within a group the columns of 4-bit weights come in the
// order of their bits: word i of a row's 64 bytes holds columns 4i + 1, 4i, 4i + 3, 4i + 2 in its
// nibbles from the lowest, and step s takes nibble s of all words. So one shift and one table
// look-up make 32 weights. X and A are put into the same order; sums over columns do not see it.
//
// Left strip (32 rows): per step two tiles of 16 rows x 32 columns.
// Right strip (32 rows): per step up to two tiles of [column pair][row][parity], `width` rows each.
#pragma once

#include <immintrin.h>

#include "decode.h"

namespace lora_kernels::quant_linear {
namespace {

constexpr int64_t kGroup = 128, kStrip = 32, kStep = 32, kGroupSteps = kGroup / kStep;
constexpr int64_t kTile = 512, kStepTiles = 2 * kTile;  // elements

inline __m512i as_int(__m512bh v) { return reinterpret_cast<__m512i>(v); }

inline __m512i load_bf16(const bf16* src, int64_t n) {
  if (n >= 32) return _mm512_loadu_si512(src);
  return n <= 0 ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16((1u << n) - 1u, src);
}
inline __m512i load_bf16(const float* src, int64_t n) {
  const uint32_t keep = n >= 32 ? ~0u : (n <= 0 ? 0u : (1u << n) - 1u);
  const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(keep), src);
  const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(keep >> 16), src + 16);
  return as_int(_mm512_cvtne2ps_pbh(high, low));
}

// Four steps in natural order -> the order of the nibbles.
inline void nibble_order(__m512i v[4]) {
  alignas(64) static constexpr uint16_t kEvery4th[32] = {0,  4,  8,  12, 16, 20, 24, 28,
                                                         32, 36, 40, 44, 48, 52, 56, 60};
  const __m512i base = _mm512_load_si512(kEvery4th);
  __m512i out[4];
  for (int s = 0; s < 4; ++s) {
    const __m512i index = _mm512_add_epi16(base, _mm512_set1_epi16(static_cast<short>(s ^ 1)));
    const __m512i low = _mm512_permutex2var_epi16(v[0], index, v[1]);
    const __m512i high = _mm512_permutex2var_epi16(v[2], index, v[3]);
    out[s] = _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1);
  }
  for (int s = 0; s < 4; ++s) v[s] = out[s];
}

// One group of a row of `columns` elements, from column k.
template <class Src>
inline void load_group(const Src* row, int64_t k, int64_t columns, bool nibbles, __m512i v[4]) {
  for (int s = 0; s < 4; ++s) v[s] = load_bf16(row + k + 32 * s, columns - k - 32 * s);
  if (nibbles) nibble_order(v);
}

// v[i] lane j <-> v[j] lane i.
inline void transpose_dwords(__m512i v[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    v[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    v[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    v[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// Rows of an adapter [rows <= 32, columns] as a left strip, of whole groups or whole steps.
template <class Src>
void pack_left(const Src* src, int64_t ld, int64_t rows, int64_t columns, bool groups, bool nibbles,
               bf16* dst) {
  for (int64_t k = 0; k < columns; k += kGroup, dst += kGroupSteps * kStepTiles) {
    const int64_t left = round_up(columns - k, kStep) / kStep;
    const int64_t steps = groups ? kGroupSteps : std::min(kGroupSteps, left);
    for (int64_t i = 0; i < kStrip; ++i) {
      __m512i v[4] = {};
      if (i < rows) load_group(src + i * ld, k, columns, nibbles, v);
      for (int64_t s = 0; s < steps; ++s) {
        _mm512_store_si512(dst + s * kStepTiles + i * 32, v[s]);
      }
    }
  }
}

// Rows of X [rows <= 32, columns] as a right strip of whole groups. keep: dropout masks, or null.
inline void pack_right(const bf16* src, int64_t ld, int64_t rows, int64_t columns, bool nibbles,
                       int64_t width, const uint32_t* keep, int64_t ldkeep, bf16* dst) {
  const int64_t tiles = rows > 16 ? 2 : 1;
  const auto lanes = static_cast<__mmask16>((1u << width) - 1u);
  for (int64_t k = 0; k < columns; k += kGroup, dst += kGroupSteps * kStepTiles) {
    alignas(64) bf16 group[4][kStrip][32];
    for (int64_t i = 0; i < 16 * tiles; ++i) {
      __m512i v[4] = {};
      if (i < rows) {
        for (int s = 0; s < 4; ++s) {
          v[s] = load_bf16(src + i * ld + k + 32 * s, columns - k - 32 * s);
          if (keep != nullptr) v[s] = _mm512_maskz_mov_epi16(keep[i * ldkeep + k / 32 + s], v[s]);
        }
        if (nibbles) nibble_order(v);
      }
      for (int s = 0; s < 4; ++s) _mm512_store_si512(group[s][i], v[s]);
    }
    for (int64_t s = 0; s < kGroupSteps; ++s) {
      for (int64_t t = 0; t < tiles; ++t) {
        __m512i v[16];
        for (int64_t i = 0; i < 16; ++i) v[i] = _mm512_load_si512(group[s][16 * t + i]);
        transpose_dwords(v);
        bf16* tile = dst + s * kStepTiles + t * kTile;
        for (int64_t p = 0; p < 16; ++p) {
          _mm512_mask_storeu_epi32(tile + p * 2 * width, lanes, v[p]);
        }
      }
    }
  }
}

// Rows of a quantized weight as left strips, group by group.
class WeightRows {
 public:
  explicit WeightRows(const Weight& w) : w_(w) {
    if (w.layout == Layout::kFlat) {
      unit_ = std::min<int64_t>(w.block, 64);
      nibbles_ = w.k % 64 == 0 && w.block % 32 == 0;
    } else if (w.layout == Layout::kInt4) {
      unit_ = std::min<int64_t>(w.block, 64);
      nibbles_ = w.group_of == nullptr &&
                 (w.block % 64 == 0 || w.block == 32 || w.scale_columns == 1);
      if (w.scale_columns == 1) unit_ = 64;
    }
    units_ = nibbles_ ? round_up(w.k, kGroup) / unit_ : 0;
  }

  // Are the columns of a group in the order of the nibbles.
  bool nibbles() const { return nibbles_; }
  int64_t scratch_floats() const {
    return kStrip * units_ * (w_.layout == Layout::kInt4 ? 2 : 1);
  }

  // The scales of rows [n0, n0 + 32) in groups [g0, g1): before the groups themselves.
  void begin(int64_t n0, int64_t g0, int64_t g1, float* scratch) {
    n0_ = n0;
    rows_ = std::min(kStrip, w_.n - n0);
    if (!nibbles_) return;
    const int64_t first = g0 * kGroup / unit_, end = g1 * kGroup / unit_;
    const int64_t have = std::min(end, round_up(w_.k, unit_) / unit_) - first;
    first_ = first;
    ld_ = end - first;
    scale_ = scratch;
    zero_ = scratch + kStrip * ld_;
    for (int64_t i = 0; i < rows_; ++i) {
      float *scale = scale_ + i * ld_, *zero = zero_ + i * ld_;
      if (w_.layout == Layout::kFlat && w_.block == unit_) {
        flat_scales(w_, (n0 + i) * (w_.k / unit_) + first, have, scale);
      } else if (w_.layout == Layout::kFlat) {
        int64_t last = -1;
        float value = 0.0f;
        for (int64_t u = 0; u < have; ++u) {
          const int64_t block = ((n0 + i) * w_.k + (first + u) * unit_) / w_.block;
          if (block != last) value = flat_scale(w_, last = block);
          scale[u] = value;
        }
      } else {
        const int64_t per = w_.scale_columns == 1 ? first + have : w_.block / unit_;
        const int64_t row = (n0 + i) * w_.scale_columns;
        for (int64_t u = 0; u < have; ++u) {
          scale[u] = w_.scale[row + (first + u) / per];
          zero[u] = w_.zero[row + (first + u) / per];
        }
        std::fill(zero + have, zero + ld_, 0.0f);
      }
      std::fill(scale + have, scale + ld_, 0.0f);
    }
  }

  // Group g of the rows of begin(): four steps of a left strip. `ahead` bytes further on, the codes
  // are asked for.
  void group(int64_t g, bf16* dst, int64_t ahead) const {
    if (!nibbles_) {
      for (int64_t i = 0; i < rows_; ++i) plain(g, i, dst);
    } else if (unit_ == 64) {
      const bool full = (g + 1) * kGroup <= w_.k;
      if (w_.layout == Layout::kInt4) {
        full ? halves<true, true>(g, dst, ahead) : halves<true, false>(g, dst, ahead);
      } else {
        full ? halves<false, true>(g, dst, ahead) : halves<false, false>(g, dst, ahead);
      }
    } else {
      quarters(g, dst);
    }
    for (int64_t i = rows_; i < kStrip; ++i) {
      for (int64_t s = 0; s < kGroupSteps; ++s) {
        _mm512_store_si512(dst + s * kStepTiles + i * 32, _mm512_setzero_si512());
      }
    }
  }

 private:
  const uint8_t* row_codes(int64_t i) const {
    const int64_t bytes = w_.layout == Layout::kFlat ? w_.k / 2 : w_.row_bytes;
    return w_.codes + (n0_ + i) * bytes;
  }
  // 64 bytes of codes; zeros past the end of the row.
  __m512i codes_of(const uint8_t* row, int64_t g) const {
    const int64_t left = (w_.k + 1) / 2 - g * 64;
    if (left >= 64) return _mm512_loadu_si512(row + g * 64);
    return _mm512_maskz_loadu_epi8((uint64_t{1} << left) - 1u, row + g * 64);
  }
  __m512 table(bool zeros, int64_t i, int64_t unit) const {
    const __m512 scale = _mm512_set1_ps(scale_[i * ld_ + unit - first_]);
    if (!zeros) return _mm512_mul_ps(_mm512_loadu_ps(w_.table), scale);
    const __m512 code = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_mul_ps(_mm512_sub_ps(code, _mm512_set1_ps(zero_[i * ld_ + unit - first_])), scale);
  }

  // Two scales in a group: the lower 16 words look up in one table, the upper in another.
  template <bool kZeros, bool kFull>
  void halves(int64_t g, bf16* dst, int64_t ahead) const {
    const __m512i nibble = _mm512_set1_epi16(15);
    const __m512i half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    for (int64_t i = 0; i < rows_; ++i, dst += 32) {
      const uint8_t* row = row_codes(i);
      const __m512i codes = kFull ? _mm512_loadu_si512(row + g * 64) : codes_of(row, g);
      _mm_prefetch(reinterpret_cast<const char*>(w_.codes) + ahead + (row - w_.codes) + g * 64,
                   _MM_HINT_T1);
      const __m512i values =
          as_int(_mm512_cvtne2ps_pbh(table(kZeros, i, 2 * g + 1), table(kZeros, i, 2 * g)));
      constexpr int kAndOr = 0xea;  // (a & b) | c
      const __m512i i0 = _mm512_ternarylogic_epi32(codes, nibble, half, kAndOr);
      const __m512i i1 =
          _mm512_ternarylogic_epi32(_mm512_srli_epi16(codes, 4), nibble, half, kAndOr);
      const __m512i i2 =
          _mm512_ternarylogic_epi32(_mm512_srli_epi16(codes, 8), nibble, half, kAndOr);
      const __m512i i3 = _mm512_or_si512(_mm512_srli_epi16(codes, 12), half);
      _mm512_store_si512(dst, _mm512_permutexvar_epi16(i0, values));
      _mm512_store_si512(dst + kStepTiles, _mm512_permutexvar_epi16(i1, values));
      _mm512_store_si512(dst + 2 * kStepTiles, _mm512_permutexvar_epi16(i2, values));
      _mm512_store_si512(dst + 3 * kStepTiles, _mm512_permutexvar_epi16(i3, values));
    }
  }

  // Four scales in a group: eight words each, two registers of tables.
  void quarters(int64_t g, bf16* dst) const {
    const bool zeros = w_.layout == Layout::kInt4;
    const __m512i nibble = _mm512_set1_epi16(15);
    alignas(64) uint16_t offset[32];
    for (int i = 0; i < 32; ++i) offset[i] = static_cast<uint16_t>(16 * (i / 8));
    const __m512i quarter = _mm512_load_si512(offset);
    for (int64_t i = 0; i < rows_; ++i, dst += 32) {
      const __m512i codes = codes_of(row_codes(i), g);
      const __m512i first =
          as_int(_mm512_cvtne2ps_pbh(table(zeros, i, 4 * g + 1), table(zeros, i, 4 * g)));
      const __m512i second =
          as_int(_mm512_cvtne2ps_pbh(table(zeros, i, 4 * g + 3), table(zeros, i, 4 * g + 2)));
      for (int s = 0; s < 4; ++s) {
        const __m512i shifted = _mm512_srl_epi16(codes, _mm_cvtsi32_si128(4 * s));
        const __m512i index = _mm512_ternarylogic_epi32(shifted, nibble, quarter, 0xea);
        _mm512_store_si512(dst + s * kStepTiles, _mm512_permutex2var_epi16(first, index, second));
      }
    }
  }

  // Any layout, columns in natural order.
  void plain(int64_t g, int64_t i, bf16* dst) const {
    const int64_t k0 = g * kGroup, count = std::min(kGroup, w_.k - k0);
    dst += i * 32;
    if (w_.layout == Layout::kInt8 && count == kGroup) {
      const __m512 scale = _mm512_set1_ps(w_.scale[n0_ + i]), factor = _mm512_set1_ps(w_.factor);
      const auto* q = reinterpret_cast<const __m128i*>(w_.codes + (n0_ + i) * w_.k + k0);
      const auto wide = [&](const __m128i* p) {
        const __m512 v = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p)));
        return _mm512_mul_ps(_mm512_mul_ps(v, scale), factor);
      };
      for (int s = 0; s < 4; ++s, q += 2) {
        _mm512_store_si512(dst + s * kStepTiles, as_int(_mm512_cvtne2ps_pbh(wide(q + 1), wide(q))));
      }
      return;
    }
    alignas(64) bf16 row[kGroup];
    decode(w_, n0_ + i, k0, count, row);
    for (int64_t k = count; k < kGroup; ++k) row[k].bits = 0;
    for (int s = 0; s < 4; ++s) {
      _mm512_store_si512(dst + s * kStepTiles, _mm512_load_si512(row + 32 * s));
    }
  }

  const Weight& w_;
  bool nibbles_ = false;
  int64_t unit_ = 64, units_ = 0, n0_ = 0, rows_ = 0, first_ = 0, ld_ = 0;
  float *scale_ = nullptr, *zero_ = nullptr;
};

}  // namespace
}  // namespace lora_kernels::quant_linear
