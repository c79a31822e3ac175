// FP8 (e4m3fn) to bf16 by table, the scale already in the table: one look-up for the low and one
// for the high byte of 64 weights, so that a scale costs 128 products, not one for each weight.
//
// The values are those of fp8_lanes times the scale, rounded once. NaN stays NaN.
// Needs AVX512-VBMI, which every machine with AMX has; a hypervisor may hide it.
#pragma once

#include <immintrin.h>

#include "tile_rows.h"

namespace lora_kernels::quant_linear {
namespace {

#define LK_VBMI __attribute__((target("avx512vbmi")))

inline bool has_byte_tables() {
  static const bool has = __builtin_cpu_supports("avx512vbmi");
  return has;
}

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

// 64 columns of `rows` rows of codes, each row through its table or all through one: 32 columns at
// dst + 32 i, 32 at dst + stride + 32 i. Where the row ends, `count` columns are there, then zeros.
template <bool kOneTable, bool kWhole>
LK_VBMI inline void look_up_fp8(const uint8_t* codes, int64_t row_bytes, int64_t rows,
                                int64_t count, const Fp8Table* tables, bf16* dst, int64_t stride,
                                const uint8_t* next) {
  const __mmask64 valid = kWhole ? ~__mmask64{0} : (__mmask64{1} << count) - 1u;
  // Eight bytes that unpacking will bring together.
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
  __m512i low0, low1, high0, high1;
  const auto read = [&](const Fp8Table& table) {
    low0 = _mm512_load_si512(table.bytes);
    low1 = _mm512_load_si512(table.bytes + 64);
    high0 = _mm512_load_si512(table.bytes + 128);
    high1 = _mm512_load_si512(table.bytes + 192);
  };
  if constexpr (kOneTable) read(*tables);
  for (int64_t i = 0; i < rows; ++i, codes += row_bytes) {
    if constexpr (!kOneTable) read(tables[i]);
    if (next != nullptr) _mm_prefetch(reinterpret_cast<const char*>(next + 64 * i), _MM_HINT_T1);
    const __m512i given =
        kWhole ? _mm512_loadu_si512(codes) : _mm512_maskz_loadu_epi8(valid, codes);
    const __m512i code = _mm512_permutexvar_epi64(order, given);
    __m512i low = _mm512_permutex2var_epi8(low0, code, low1);
    __m512i high = _mm512_permutex2var_epi8(high0, code, high1);
    constexpr int kXorAnd = 0x78;  // a ^ (b & c)
    high = _mm512_ternarylogic_epi32(high, code, sign, kXorAnd);
    __m512i first = _mm512_unpacklo_epi8(low, high), second = _mm512_unpackhi_epi8(low, high);
    if constexpr (!kWhole) {
      first = _mm512_maskz_mov_epi16(static_cast<__mmask32>(valid), first);
      second = _mm512_maskz_mov_epi16(static_cast<__mmask32>(valid >> 32), second);
    }
    _mm512_store_si512(dst + i * 32, first);
    _mm512_store_si512(dst + stride + i * 32, second);
  }
}

// Rows of an fp8 weight, half a strip of one group at a time, in the order of the groups.
class Fp8Rows {
 public:
  // Is a scale shared by whole groups, and by enough weights to pay for its table.
  static bool serves(const Weight& w) {
    return w.layout == Layout::kFp8 && has_byte_tables() &&
           (w.scale_columns == 1 || (w.block % kGroup == 0 && w.block_rows % kStrip == 0));
  }
  explicit Fp8Rows(const Weight& w) : w_(w) {}

  // Rows [n0, n0 + 32).
  void begin(int64_t n0) {
    n0_ = n0;
    rows_ = std::min(kStrip, w_.n - n0);
    one_ = (n0 + rows_ - 1) / w_.block_rows == n0 / w_.block_rows;
    end_ = 0;
  }
  void tiles(int64_t half, int64_t g, bf16* dst, int64_t stride, const uint8_t* next) {
    const int64_t k0 = g * kGroup;
    if (k0 >= end_) fill(k0);
    const int64_t first = 16 * half, rows = std::min<int64_t>(16, rows_ - first);
    const int64_t count = w_.k - k0;
    const uint8_t* codes = w_.codes + (n0_ + first) * w_.k + k0;
    if (one_) {
      count >= kGroup
          ? look_up_fp8<true, true>(codes, w_.k, rows, count, tables_, dst, stride, next)
          : look_up_fp8<true, false>(codes, w_.k, rows, count, tables_, dst, stride, next);
    } else {
      const Fp8Table* own = tables_ + first;
      count >= kGroup ? look_up_fp8<false, true>(codes, w_.k, rows, count, own, dst, stride, next)
                      : look_up_fp8<false, false>(codes, w_.k, rows, count, own, dst, stride, next);
    }
    for (int64_t i = std::max<int64_t>(rows, 0); i < 16; ++i) {
      _mm512_store_si512(dst + i * 32, _mm512_setzero_si512());
      _mm512_store_si512(dst + stride + i * 32, _mm512_setzero_si512());
    }
  }

 private:
  void fill(int64_t k0) {
    const int64_t column = w_.scale_columns == 1 ? 0 : k0 / w_.block;
    end_ = w_.scale_columns == 1 ? w_.k : (column + 1) * w_.block;
    for (int64_t i = 0; i < (one_ ? 1 : rows_); ++i) {
      tables_[i].fill(w_.scale[(n0_ + i) / w_.block_rows * w_.scale_columns + column]);
    }
  }

  const Weight& w_;
  int64_t n0_ = 0, rows_ = 0, end_ = 0;
  bool one_ = true;
  Fp8Table tables_[kStrip];
};

}  // namespace
}  // namespace lora_kernels::quant_linear
