// Elementary functions, transposes and reductions of the vectors of vector.h (LK_LANES).
#pragma once

#include <cmath>
#include <limits>

#include "vector.h"

namespace lora_kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896341f;

inline Vec broadcast(float f) { return f - Vec{}; }
inline Vec choose(IVec mask, Vec yes, Vec no) {
  return (Vec)(((IVec)yes & mask) | ((IVec)no & ~mask));
}
inline Vec absolute(Vec v) { return (Vec)((IVec)v & 0x7fffffff); }

// The larger of the two; `b` where one of them is NaN.
inline Vec maximum(Vec a, Vec b) {
#if LK_LANES == 16 && defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif LK_LANES == 8 && defined(__AVX__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return choose((IVec)(a > b), a, b);
#endif
}

inline IVec lane_numbers() {
  IVec lane;
  for (int l = 0; l < LK_LANES; ++l) lane[l] = l;
  return lane;
}

// All-ones lanes l with from <= l < to.
inline IVec lanes_between(int64_t from, int64_t to) {
  const int32_t low = static_cast<int32_t>(from < 0 ? 0 : from);
  const int32_t high = static_cast<int32_t>(to > LK_LANES ? LK_LANES : to < 0 ? 0 : to);
  const IVec lane = lane_numbers();
  return (IVec)(lane >= low) & (IVec)(lane < high);
}

// 2^f for |f| <= 1/2 by a minimax polynomial (fitted to the relative error): 1.9e-9 at degree 6,
// 2.6e-6 at degree 4, which is plenty for a weight that becomes bf16.
template <int kDegree>
inline Vec exp2_fraction(Vec f) {
  static_assert(kDegree == 4 || kDegree == 6, "two polynomials are fitted");
  if constexpr (kDegree == 4) {
    Vec p = f * 0.00957010128f + 0.0559178591f;
    p = p * f + 0.240247443f;
    p = p * f + 0.693121791f;
    return p * f + 0.999999285f;
  }
  Vec p = f * 0.000153458124f + 0.00133999309f;
  p = p * f + 0.00961848907f;
  p = p * f + 0.0555032864f;
  p = p * f + 0.240226462f;
  p = p * f + 0.693147182f;
  return p * f + 1.0f;
}

// 2^x for x < 128, of one ulp at degree 6, 0 or a subnormal below -126; NaN stays NaN.
template <int kDegree>
inline Vec exp2_vec(Vec x) {
#if LK_LANES == 16 && defined(__AVX512F__)
  const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-200.0f), (__m512)x);
  const __m512 n = _mm512_roundscale_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (Vec)_mm512_scalef_ps((__m512)exp2_fraction<kDegree>((Vec)_mm512_sub_ps(bounded, n)), n);
#else
  const IVec tiny = (IVec)(x < broadcast(-126.0f));
  const Vec bounded = choose(tiny, Vec{}, x);
  const Vec shifted = bounded + 12582912.0f;  // an integer in the low bits
  const Vec p = exp2_fraction<kDegree>(bounded - (shifted - 12582912.0f));
  const Vec scale = (Vec)(((IVec)shifted - (0x4b400000 - 127)) << 23);
  return select(~tiny, p * scale);
#endif
}

// exp(x) for x <= 88, error below 2 ulp; 0 below -87.3 (no subnormals), NaN stays NaN.
// x = n ln 2 + f with |f| <= ln 2 / 2, Taylor to f^7 / 7!, 2^n added to the exponent.
inline Vec exp_vec(Vec x) {
  const IVec tiny = (IVec)(x < broadcast(-87.3f));
  const Vec bounded = choose(tiny, Vec{}, x);
  const Vec shifted = bounded * 1.44269504f + 12582912.0f;  // an integer in the low bits
  const Vec n = shifted - 12582912.0f;
  const Vec f = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = f * (1.0f / 5040) + (1.0f / 720);
  p = p * f + (1.0f / 120);
  p = p * f + (1.0f / 24);
  p = p * f + (1.0f / 6);
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  const Vec scale = (Vec)(((IVec)shifted - (0x4b400000 - 127)) << 23);
  return select(~tiny, p * scale);
}

// tanh(x) = 1 - 2 / (exp(2 x) + 1); a series near 0, where the difference would cancel.
inline Vec tanh_vec(Vec x) {
  const Vec square = x * x;
  Vec series = square * (-17.0f / 315) + (2.0f / 15);
  series = series * square + (-1.0f / 3);
  series = x + x * square * series;
  const Vec bounded = choose(x > broadcast(10.0f), broadcast(10.0f), x);  // 1 to fp32 from 9.01 on
  const Vec ratio = 1.0f - 2.0f / (exp_vec(bounded + bounded) + 1.0f);
  return choose(square < broadcast(0.01f), series, ratio);
}

inline float sum_lanes(Vec v) {
  for (int step = LK_LANES / 2; step > 0; step /= 2) {
    for (int l = 0; l < step; ++l) v[l] += v[l + step];
  }
  return v[0];
}
inline float max_lanes(Vec v) {
#if LK_LANES == 16 && defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float top = v[0];
  for (int l = 1; l < LK_LANES; ++l) top = v[l] > top ? v[l] : top;
  return top;
#endif
}

// v[i] lane j <-> v[j] lane i, by rounds of perfect shuffles.
inline void transpose_lanes(Vec v[LK_LANES]) {
  IVec low, high;
  for (int l = 0; l < LK_LANES; ++l) {
    low[l] = l / 2 + (l % 2) * LK_LANES;
    high[l] = low[l] + LK_LANES / 2;
  }
#pragma GCC unroll 4
  for (int round = 1; round < LK_LANES; round *= 2) {
    Vec t[LK_LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LK_LANES / 2; ++i) {
      t[2 * i] = __builtin_shuffle(v[i], v[i + LK_LANES / 2], low);
      t[2 * i + 1] = __builtin_shuffle(v[i], v[i + LK_LANES / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LK_LANES; ++i) v[i] = t[i];
  }
}

}  // namespace
}  // namespace lora_kernels
