// Products by multiply-add of any vector width: operands and sums are fp32, whatever the tensors
// hold. Left operand: row-major. Right operand: strips of NR columns, [k][NR].
// The micro kernel keeps LK_MR x 2 vectors of sums, two of the right operand and one broadcast.
#pragma once

#include "../common/vector_math.h"

namespace lora_kernels::attention {
namespace {

template <class Element>
struct FmaEngine {
  using T = Element;
  using P = float;
  static constexpr int NR = 2 * LK_LANES, KR = 2;
  static constexpr int BR = 64, BC = 128, kExpDegree = 6;

  static void enter() {}
  static void leave() {}

  static void store_a(float* dst, const Vec v[2]) {
    store_vec(dst, v[0]);
    store_vec(dst + LK_LANES, v[1]);
  }
  // Rows k and k + 1 of a strip, k even.
  static void store_b(float* strip, int64_t k, const Vec even[2], const Vec odd[2]) {
    store_a(strip + k * NR, even);
    store_a(strip + (k + 1) * NR, odd);
  }
  // Rows k and k + 1 of a strip from row-major operands.
  static void copy_b(float* strip, int64_t k, const float* even, const float* odd) {
    for (int v = 0; v < NR; v += LK_LANES) {
      store_vec(strip + k * NR + v, load(even + v));
      store_vec(strip + (k + 1) * NR + v, load(odd + v));
    }
  }
  // Whole vectors of a transposed block are rows of the result.
  static void store_transposed(float* dst, int64_t ld, int64_t column, const Vec v[LK_LANES]) {
    for (int l = 0; l < LK_LANES; ++l) store_vec(dst + (column + l) * ld, v[l]);
  }

  // c [rows, NR] (+)= a [rows, k] strip [k, NR]; rows up to a multiple of LK_MR are written.
  static void product(const float* a, int64_t lda, const float* strip, int64_t rows, int64_t k,
                      float* c, int64_t ldc, bool accumulate) {
    for (int64_t i = 0; i < rows; i += LK_MR) {
      Vec sum[LK_MR][2];
#pragma GCC unroll 16
      for (int r = 0; r < LK_MR; ++r) sum[r][0] = sum[r][1] = Vec{};
      const float* row = a + i * lda;
      const float* b = strip;
      for (int64_t kk = 0; kk < k; ++kk, b += NR) {
        const Vec b0 = load(b), b1 = load(b + LK_LANES);
#pragma GCC unroll 16
        for (int r = 0; r < LK_MR; ++r) {
          const float x = row[r * lda + kk];
          sum[r][0] += x * b0;
          sum[r][1] += x * b1;
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < LK_MR; ++r) {
        float* out = c + (i + r) * ldc;
        // Added last, so that the rounding of a long sum grows with its blocks, not its terms.
        if (accumulate) {
          sum[r][0] += load(out);
          sum[r][1] += load(out + LK_LANES);
        }
        store_vec(out, sum[r][0]);
        store_vec(out + LK_LANES, sum[r][1]);
      }
    }
  }
};

}  // namespace
}  // namespace lora_kernels::attention
