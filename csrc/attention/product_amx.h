// Products by AMX-BF16: operands are bf16, sums fp32. Left operand: row-major, as tiles are loaded
// with any stride. Right operand: strips of 32 columns, [k / 2][column][k % 2].
// Tiles: sums 2x2 of 16x16 (tmm0-3), left 2 of 16 rows x 32 k (tmm4-5), right 2 of 16 k pairs x 16
// columns (tmm6-7).
#pragma once

// GCC 12 takes the undefined operand of its own intrinsics for a variable that is not set.
#pragma GCC diagnostic ignored "-Wuninitialized"

#include <immintrin.h>

#include "../common/vector_math.h"
#include "../cpu/amx_config.h"

namespace lora_kernels::attention {
namespace {

struct AmxEngine {
  using T = bf16;
  using P = bf16;
  static constexpr int NR = 32, KR = 32;
  static constexpr int BR = 64, BC = 128, kExpDegree = 4;

  static void enter() { _tile_loadconfig(&cpu::kTileConfig); }
  static void leave() { _tile_release(); }

  static __m512i narrow(Vec low, Vec high) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
  }
  static void store_a(bf16* dst, const Vec v[2]) { _mm512_store_si512(dst, narrow(v[0], v[1])); }
  // Rows k and k + 1 of a strip, k even.
  static void store_b(bf16* strip, int64_t k, const Vec even[2], const Vec odd[2]) {
    const __m512i pairs = _mm512_load_si512(kPairs);
    for (int v = 0; v < 2; ++v) {
      _mm512_store_si512(strip + k * NR + 32 * v,
                         _mm512_permutexvar_epi16(pairs, narrow(even[v], odd[v])));
    }
  }
  static void copy_b(bf16* strip, int64_t k, const bf16* even, const bf16* odd) {
    const __m512i pairs = _mm512_load_si512(kPairs);
    const __m512i e = _mm512_load_si512(even), o = _mm512_load_si512(odd);
    const __m512i low = _mm512_shuffle_i64x2(e, o, 0x44), high = _mm512_shuffle_i64x2(e, o, 0xee);
    _mm512_store_si512(strip + k * NR, _mm512_permutexvar_epi16(pairs, low));
    _mm512_store_si512(strip + k * NR + 32, _mm512_permutexvar_epi16(pairs, high));
  }
  // A vector of a transposed block holds two columns of bf16 for each of 16 rows.
  static void store_transposed(bf16* dst, int64_t ld, int64_t column, const Vec v[LK_LANES]) {
    for (int l = 0; l < LK_LANES; ++l) {
      const __m512i both = (__m512i)v[l];
      bf16* out = dst + 2 * (column + l) * ld;
      _mm256_store_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(both));
      _mm256_store_si256(reinterpret_cast<__m256i*>(out + ld),
                         _mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
    }
  }

  // c [rows, NR] (+)= a [rows, k] strip [k, NR]; rows up to a multiple of 16 are written.
  static void product(const bf16* a, int64_t lda, const bf16* strip, int64_t rows, int64_t k,
                      float* c, int64_t ldc, bool accumulate) {
    int64_t i = 0;
    for (; i + 16 < rows; i += 32) {
      tiles<2>(a + i * lda, lda, strip, k, c + i * ldc, ldc, accumulate);
    }
    if (i < rows) tiles<1>(a + i * lda, lda, strip, k, c + i * ldc, ldc, accumulate);
  }

 private:
  // [16 of an even row | 16 of the odd row below] -> pairs
  alignas(64) static constexpr uint16_t kPairs[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

  template <int MT>
  static void tiles(const bf16* a, int64_t lda, const bf16* b, int64_t k, float* c, int64_t ldc,
                    bool accumulate) {
    const int64_t a_stride = lda * 2, c_stride = ldc * 4;
    if (accumulate) {
      _tile_loadd(0, c, c_stride);
      _tile_loadd(1, c + 16, c_stride);
      if constexpr (MT == 2) {
        _tile_loadd(2, c + 16 * ldc, c_stride);
        _tile_loadd(3, c + 16 * ldc + 16, c_stride);
      }
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t kk = 0; kk < k; kk += 32) {
      _tile_loadd(4, a + kk, a_stride);
      _tile_loadd(6, b + kk * NR, 2 * NR * 2);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + kk * NR + 32, 2 * NR * 2);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (MT == 2) {
        _tile_loadd(5, a + 16 * lda + kk, a_stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, c_stride);
    _tile_stored(1, c + 16, c_stride);
    if constexpr (MT == 2) {
      _tile_stored(2, c + 16 * ldc, c_stride);
      _tile_stored(3, c + 16 * ldc + 16, c_stride);
    }
  }
};

}  // namespace
}  // namespace lora_kernels::attention
