// Rows of operands as tiles of AMX-BF16: rows of a quantized weight and of an adapter as left
// operands, rows of X as right ones.
//
// A group is 64 columns, two steps of 32. Within a group the columns of 4-bit weights come in the
// order of their bits: word i of a row's 32 bytes holds columns 4i + 1, 4i, 4i + 3, 4i + 2 in its
// nibbles from the lowest; the first step takes the lowest nibble of all 16 words, then the second
// nibble, the second step the other two. So one variable shift and one table look-up, whose index
// needs no mask, make 32 weights. X and A are put into the same order; sums over columns do not see
// it.
//
// Left strip (32 rows): per step two tiles of 16 rows x 32 columns.
// Right strip (32 rows): per step up to two tiles of [column pair][row][parity], `width` rows each.
#pragma once

#include <immintrin.h>

#include "decode.h"

namespace lora_kernels::quant_linear {
namespace {

constexpr int64_t kGroup = 64, kStrip = 32, kStep = 32, kGroupSteps = kGroup / kStep;
constexpr int64_t kTile = 512, kStepTiles = 2 * kTile;  // elements

#define LK_VBMI __attribute__((target("avx512vbmi")))

// Every machine with AMX has AVX512-VBMI; a hypervisor may hide it.
inline bool has_byte_tables() {
  static const bool has = __builtin_cpu_supports("avx512vbmi");
  return has;
}

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

// Two steps in natural order -> the order of the nibbles.
inline void nibble_order(__m512i v[2]) {
  alignas(64) static constexpr uint16_t kEvery4th[32] = {
      1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 45, 49, 53, 57, 61,
      0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60};
  const __m512i first = _mm512_load_si512(kEvery4th);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(2));
  const __m512i natural = v[0];
  v[0] = _mm512_permutex2var_epi16(natural, first, v[1]);
  v[1] = _mm512_permutex2var_epi16(natural, second, v[1]);
}

// One group of a row of `columns` elements, from column k.
template <class Src>
inline void load_group(const Src* row, int64_t k, int64_t columns, bool nibbles, __m512i v[2]) {
  for (int s = 0; s < 2; ++s) v[s] = load_bf16(row + k + 32 * s, columns - k - 32 * s);
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
      __m512i v[2] = {};
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
    alignas(64) bf16 group[kGroupSteps][kStrip][32];
    for (int64_t i = 0; i < 16 * tiles; ++i) {
      __m512i v[2] = {};
      if (i < rows) {
        for (int s = 0; s < 2; ++s) {
          v[s] = load_bf16(src + i * ld + k + 32 * s, columns - k - 32 * s);
          if (keep != nullptr) v[s] = _mm512_maskz_mov_epi16(keep[i * ldkeep + k / 32 + s], v[s]);
        }
        if (nibbles) nibble_order(v);
      }
      for (int s = 0; s < 2; ++s) _mm512_store_si512(group[s][i], v[s]);
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

// 64 columns of row n of an fp8 weight, 32 at dst and 32 at dst + stride; false: not of one scale.
inline bool fp8_group(const Weight& w, int64_t n, int64_t k0, bf16* dst, int64_t stride) {
  const int64_t block = k0 / w.block;
  if ((k0 + kGroup - 1) / w.block != block) return false;
  const __m512 scale = _mm512_set1_ps(w.scale[n / w.block_rows * w.scale_columns + block]);
  const auto* codes = reinterpret_cast<const __m128i*>(w.codes + n * w.k + k0);
  const auto wide = [&](const __m128i* p) {
    return _mm512_mul_ps(fp8_lanes(_mm_loadu_si128(p)), scale);
  };
  _mm512_store_si512(dst, as_int(_mm512_cvtne2ps_pbh(wide(codes + 1), wide(codes))));
  _mm512_store_si512(dst + stride, as_int(_mm512_cvtne2ps_pbh(wide(codes + 3), wide(codes + 2))));
  return true;
}

// Rows of a quantized weight as left strips, some rows of one group at a time.
class WeightRows {
 public:
  explicit WeightRows(const Weight& w) : w_(w) {
    if (w.layout == Layout::kFlat) {
      nibbles_ = w.k % 64 == 0 && w.block % 32 == 0;
      row_bytes_ = w.k / 2;
    } else if (w.layout == Layout::kInt4) {
      const bool one = w.scale_columns == 1;
      nibbles_ = w.group_of == nullptr && (w.block % 64 == 0 || w.block == 32 || one);
      row_bytes_ = w.row_bytes;
    } else {
      row_bytes_ = w.k;
    }
    unit_ = w.block == 32 ? 32 : 64;
    units_ = nibbles_ ? round_up(w.k, kGroup) / unit_ : 0;
  }

  // Are the columns of a group in the order of the nibbles.
  bool nibbles() const { return nibbles_; }
  int64_t scratch_floats() const { return w_.layout == Layout::kFlat ? kStrip * units_ : 0; }

  // Is the scale of a whole row left to the result; tiles then hold the codes, exactly.
  bool unscaled() const {
    return w_.layout == Layout::kInt8 ||
           (w_.layout == Layout::kFp8 && w_.scale_columns == 1 && has_byte_tables());
  }

  // The scales of rows [n0, n0 + 32) in groups [g0, g1): before the groups themselves.
  void begin(int64_t n0, int64_t g0, int64_t g1, float* scratch) {
    n0_ = n0;
    rows_ = std::min(kStrip, w_.n - n0);
    if (!nibbles_) return;
    const int64_t first = g0 * kGroup / unit_, end = g1 * kGroup / unit_;
    const int64_t have = std::min(end, (w_.k + unit_ - 1) / unit_) - first;
    if (w_.layout == Layout::kInt4 || w_.k % w_.block == 0) {
      // Whole blocks in a row: read where they are, unless they are nested.
      const int64_t blocks =
          w_.layout == Layout::kInt4 ? w_.scale_columns : w_.k / w_.block;
      per_ = blocks == 1 ? end + 1 : w_.block / unit_;
      if (w_.scale != nullptr) {
        first_ = 0;
        ld_ = blocks;
        scale_ = w_.scale + n0 * blocks;
        zero_ = w_.zero == nullptr ? nullptr : w_.zero + n0 * blocks;
        return;
      }
      first_ = first / per_;
      ld_ = (first + have - 1) / per_ + 1 - first_;
      for (int64_t i = 0; i < rows_; ++i) {
        flat_scales(w_, (n0 + i) * blocks + first_, ld_, scratch + i * ld_);
      }
    } else {
      per_ = 1;
      first_ = first;
      ld_ = have;
      for (int64_t i = 0; i < rows_; ++i) {
        const int64_t element = (n0 + i) * w_.k + first * unit_;
        for (int64_t u = 0; u < have; ++u) {
          scratch[i * ld_ + u] = flat_scale(w_, (element + u * unit_) / w_.block);
        }
      }
    }
    scale_ = scratch;
  }

  // Codes of the strip after this one, to be asked for in the order of memory while all groups of
  // this one are decoded. This one's where there is none.
  const uint8_t* next_strip() const {
    return w_.codes + (n0_ + (n0_ + 2 * kStrip <= w_.n ? kStrip : 0)) * row_bytes_;
  }
  // Bytes of a row in a group.
  int64_t group_bytes() const { return nibbles_ || w_.layout == Layout::kInt4 ? 32 : 64; }

  // Rows [first, first + count) of group g, 4 or 16, as rows of two tiles, `stride` elements apart. As
  // many bytes as they read are asked for at `next`; null: none are.
  void rows(int64_t first, int64_t count, int64_t g, bf16* dst, int64_t stride,
            const uint8_t* next) const {
    const int64_t have = std::clamp<int64_t>(rows_ - first, 0, count);
    if (!nibbles_) {
      for (int64_t i = 0; i < have; ++i) {
        plain(first + i, g, dst + i * 32, stride, next == nullptr ? next : next + 64 * i);
      }
    } else if (w_.layout == Layout::kInt4) {
      nibble_rows<true>(first, count, have, g, dst, stride, next);
    } else {
      nibble_rows<false>(first, count, have, g, dst, stride, next);
    }
    for (int64_t i = have; i < count; ++i) {
      _mm512_store_si512(dst + i * 32, _mm512_setzero_si512());
      _mm512_store_si512(dst + stride + i * 32, _mm512_setzero_si512());
    }
  }
  void tiles(int64_t half, int64_t g, bf16* dst, int64_t stride, const uint8_t* next) const {
    rows(16 * half, 16, g, dst, stride, next);
  }

 private:
  // The 16 values of a block in fp32.
  template <bool kZeros>
  __m512 values(__m512 codebook, int64_t at) const {
    const __m512 scale = _mm512_set1_ps(scale_[at]);
    if constexpr (!kZeros) return _mm512_mul_ps(codebook, scale);
    return _mm512_mul_ps(_mm512_sub_ps(codebook, _mm512_set1_ps(zero_[at])), scale);
  }

  template <bool kZeros>
  void nibble_rows(int64_t first, int64_t count, int64_t have, int64_t g, bf16* dst, int64_t stride,
                   const uint8_t* next) const {
    if (unit_ != 64) {
      look_up<kZeros, true, 0>(first, have, g, dst, stride, next);
    } else if (have < count || (g + 1) * 32 > row_bytes_) {
      look_up<kZeros, false, 0>(first, have, g, dst, stride, next);
    } else if (count == 4) {
      look_up<kZeros, false, 4>(first, 4, g, dst, stride, next);
    } else {
      look_up<kZeros, false, 16>(first, 16, g, dst, stride, next);
    }
  }

  // kTwo: two scales in a group, 8 words each. kRows: so many rows of 32 bytes; 0: as given.
  template <bool kZeros, bool kTwo, int kRows>
  void look_up(int64_t first, int64_t given_rows, int64_t g, bf16* dst, int64_t stride,
               const uint8_t* next) const {
    const __m512 codebook =
        kZeros ? _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
               : _mm512_loadu_ps(w_.table);
    alignas(64) static constexpr uint16_t kShifts[32] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                                         0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4,
                                                         4, 4, 4, 4, 4, 4, 4, 4, 4, 4};
    const __m512i shift01 = _mm512_load_si512(kShifts);
    const __m512i shift23 = _mm512_add_epi16(shift01, _mm512_set1_epi16(8));
    const int64_t unit = kTwo ? 2 * g : g;
    const int64_t at = first * ld_ + unit / per_ - first_;
    const int64_t second = kTwo ? (unit + 1) / per_ - unit / per_ : 0;
    constexpr bool kWhole = kRows > 0;
    const int64_t rows = kWhole ? kRows : given_rows;
    const uint8_t* row = w_.codes + (n0_ + first) * row_bytes_ + g * 32;
    const int64_t left = kWhole ? 32 : row_bytes_ - g * 32;
    const __mmask32 valid = left >= 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1u;
    const auto steps = [&](int64_t i, __m512i table) {
      const uint8_t* from = row + i * row_bytes_;
      const __m512i codes = _mm512_broadcast_i64x4(
          left >= 32 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                     : _mm256_maskz_loadu_epi8(valid, from));
      __m512i even = _mm512_srlv_epi16(codes, shift01), odd = _mm512_srlv_epi16(codes, shift23);
      if constexpr (kTwo) {
        constexpr int kAndOr = 0xea;  // (a & b) | c
        const __m512i nibble = _mm512_set1_epi16(15);
        const __m512i half = _mm512_broadcast_i64x4(
            _mm256_inserti128_si256(_mm256_setzero_si256(), _mm_set1_epi16(16), 1));
        even = _mm512_ternarylogic_epi32(even, nibble, half, kAndOr);
        odd = _mm512_ternarylogic_epi32(odd, nibble, half, kAndOr);
      }
      _mm512_store_si512(dst + i * 32, _mm512_permutexvar_epi16(even, table));
      _mm512_store_si512(dst + stride + i * 32, _mm512_permutexvar_epi16(odd, table));
    };
    // A pair of tables comes from one conversion: of two blocks, or of two rows, whose halves are
    // then doubled, since bit 4 of an index is a bit of the next nibble.
    if constexpr (kTwo) {
      for (int64_t i = 0; i < rows; ++i) {
        const __m512 low = values<kZeros>(codebook, at + i * ld_);
        const __m512 high = values<kZeros>(codebook, at + i * ld_ + second);
        steps(i, as_int(_mm512_cvtne2ps_pbh(high, low)));
      }
    } else {
      for (int64_t i = 0; i < rows; i += 2) {
        const bool two = i + 1 < rows;
        const __m512 low = values<kZeros>(codebook, at + i * ld_);
        const __m512 high = two ? values<kZeros>(codebook, at + (i + 1) * ld_) : low;
        const __m512i pair = as_int(_mm512_cvtne2ps_pbh(high, low));
        if (next != nullptr) _mm_prefetch(next + i * 32, _MM_HINT_T1);
        steps(i, _mm512_shuffle_i64x2(pair, pair, 0x44));
        if (two) steps(i + 1, _mm512_shuffle_i64x2(pair, pair, 0xee));
      }
    }
  }

  // Any layout, columns in natural order.
  void plain(int64_t i, int64_t g, bf16* dst, int64_t stride, const uint8_t* next) const {
    const int64_t k0 = g * kGroup, count = std::min(kGroup, w_.k - k0);
    if (w_.layout == Layout::kInt8 && count == kGroup) {
      const auto* q = reinterpret_cast<const __m128i*>(w_.codes + (n0_ + i) * w_.k + k0);
      const auto wide = [](const __m128i* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p)));
      };
      if (next != nullptr) _mm_prefetch(next, _MM_HINT_T1);
      _mm512_store_si512(dst, as_int(_mm512_cvtne2ps_pbh(wide(q + 1), wide(q))));
      _mm512_store_si512(dst + stride, as_int(_mm512_cvtne2ps_pbh(wide(q + 3), wide(q + 2))));
      return;
    }
    if (w_.layout == Layout::kFp8 && count == kGroup && fp8_group(w_, n0_ + i, k0, dst, stride)) {
      return;
    }
    alignas(64) bf16 row[kGroup];
    if (w_.layout == Layout::kInt8) {
      const auto* q = reinterpret_cast<const int8_t*>(w_.codes) + (n0_ + i) * w_.k + k0;
      for (int64_t k = 0; k < count; ++k) from_float(static_cast<float>(q[k]), row[k]);
    } else {
      decode(w_, n0_ + i, k0, count, row);
    }
    for (int64_t k = count; k < kGroup; ++k) row[k].bits = 0;
    _mm512_store_si512(dst, _mm512_load_si512(row));
    _mm512_store_si512(dst + stride, _mm512_load_si512(row + 32));
  }

  const Weight& w_;
  bool nibbles_ = false;
  int64_t row_bytes_ = 0, unit_ = 64, units_ = 0, n0_ = 0, rows_ = 0;
  int64_t per_ = 1, first_ = 0, ld_ = 0;  // units of a block; the first block; blocks of a row
  const float *scale_ = nullptr, *zero_ = nullptr;
};

}  // namespace
}  // namespace lora_kernels::quant_linear
