// FP8 (e4m3fn) to bf16 by table, the scale already in the table: one look-up for the low and one
// for the high byte of 64 weights, so that a scale costs 128 products, not one for each weight.
//
// The values are those of fp8_lanes times the scale, rounded once. NaN stays NaN.
// Needs AVX512-VBMI (has_byte_tables).
#pragma once

#include <immintrin.h>

#include "tile_rows.h"

namespace lora_kernels::quant_linear {
namespace {

// Low bytes of the values of codes 0 to 127, then their high bytes.
struct alignas(64) Fp8Table {
  uint8_t bytes[256];

  LK_VBMI void fill(float scale) {
    const __m512 factor = _mm512_set1_ps(scale);
    const __m128i lanes = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i v[4];
    for (int i = 0; i < 4; ++i) {
      const __m128i low = _mm_add_epi8(lanes, _mm_set1_epi8(static_cast<char>(32 * i)));
      const __m512 first = _mm512_mul_ps(fp8_lanes(low), factor);
      const __m512 second =
          _mm512_mul_ps(fp8_lanes(_mm_add_epi8(low, _mm_set1_epi8(16))), factor);
      v[i] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
    }
    alignas(64) uint8_t even[64];
    for (int i = 0; i < 64; ++i) even[i] = static_cast<uint8_t>(2 * i);
    const __m512i low = _mm512_load_si512(even), high = _mm512_add_epi8(low, _mm512_set1_epi8(1));
    for (int i = 0; i < 2; ++i) {
      _mm512_store_si512(bytes + 64 * i, _mm512_permutex2var_epi8(v[2 * i], low, v[2 * i + 1]));
      _mm512_store_si512(bytes + 128 + 64 * i,
                         _mm512_permutex2var_epi8(v[2 * i], high, v[2 * i + 1]));
    }
  }
  // The two bytes of the values of 64 codes.
  LK_VBMI void look_up(__m512i codes, __m512i& low, __m512i& high) const {
    low = _mm512_permutex2var_epi8(_mm512_load_si512(bytes), codes, _mm512_load_si512(bytes + 64));
    high = _mm512_permutex2var_epi8(_mm512_load_si512(bytes + 128), codes,
                                    _mm512_load_si512(bytes + 192));
    constexpr int kXorAnd = 0x78;  // a ^ (b & c)
    high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8(static_cast<char>(0x80)),
                                     kXorAnd);
  }
};

// 64 columns of `rows` rows of codes: 32 columns at dst + 32 i, 32 at dst + stride + 32 i. Where the row
// ends, `count` columns are there, then zeros.
template <bool kWhole>
LK_VBMI inline void look_up_fp8(const uint8_t* codes, int64_t row_bytes, int64_t rows,
                                int64_t count, const Fp8Table& table, bf16* dst, int64_t stride,
                                const uint8_t* next) {
  const __mmask64 valid = kWhole ? ~__mmask64{0} : (__mmask64{1} << count) - 1u;
  // Eight bytes that unpacking will bring together.
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t i = 0; i < rows; ++i, codes += row_bytes) {
    if (next != nullptr) _mm_prefetch(reinterpret_cast<const char*>(next + 64 * i), _MM_HINT_T1);
    const __m512i given =
        kWhole ? _mm512_loadu_si512(codes) : _mm512_maskz_loadu_epi8(valid, codes);
    __m512i low, high;
    table.look_up(_mm512_permutexvar_epi64(order, given), low, high);
    __m512i first = _mm512_unpacklo_epi8(low, high), second = _mm512_unpackhi_epi8(low, high);
    if constexpr (!kWhole) {
      first = _mm512_maskz_mov_epi16(static_cast<__mmask32>(valid), first);
      second = _mm512_maskz_mov_epi16(static_cast<__mmask32>(valid >> 32), second);
    }
    _mm512_store_si512(dst + i * 32, first);
    _mm512_store_si512(dst + stride + i * 32, second);
  }
}

// Rows of an fp8 weight as left strips.
class Fp8Rows {
 public:
  // Is a scale shared by whole rows, or by whole groups of strips.
  static bool serves(const Weight& w) {
    return w.layout == Layout::kFp8 && has_byte_tables() &&
           (w.scale_columns == 1 || (w.block % kGroup == 0 && w.block_rows % kStrip == 0));
  }
  explicit Fp8Rows(const Weight& w) : w_(w) {
    if (w.layout == Layout::kFp8 && w.scale_columns == 1) table_.fill(1.0f);
  }

  // Rows [n0, n0 + 32).
  void begin(int64_t n0) { n0_ = n0; }
  // Rows [first, first + count) of group g as rows of two tiles, `stride` elements apart.
  void rows(int64_t first, int64_t count, int64_t g, bf16* dst, int64_t stride,
            const uint8_t* next) {
    const int64_t k0 = g * kGroup, columns = w_.k - k0;
    if (w_.scale_columns != 1) fill(k0);
    const int64_t have = std::clamp<int64_t>(w_.n - n0_ - first, 0, count);
    const uint8_t* codes = w_.codes + (n0_ + first) * w_.k + k0;
    columns >= kGroup
        ? look_up_fp8<true>(codes, w_.k, have, columns, table_, dst, stride, next)
        : look_up_fp8<false>(codes, w_.k, have, columns, table_, dst, stride, next);
    for (int64_t i = have; i < count; ++i) {
      _mm512_store_si512(dst + i * 32, _mm512_setzero_si512());
      _mm512_store_si512(dst + stride + i * 32, _mm512_setzero_si512());
    }
  }
  void tiles(int64_t half, int64_t g, bf16* dst, int64_t stride, const uint8_t* next) {
    rows(16 * half, 16, g, dst, stride, next);
  }

 private:
  void fill(int64_t k0) {
    const int64_t block = n0_ / w_.block_rows * w_.scale_columns + k0 / w_.block;
    if (block == block_) return;
    block_ = block;
    table_.fill(w_.scale[block]);
  }

  const Weight& w_;
  int64_t n0_ = 0, block_ = -1;
  Fp8Table table_;
};

}  // namespace
}  // namespace lora_kernels::quant_linear
