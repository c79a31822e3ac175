// act(g) and act'(g) of a vector, and the elementary functions that they are made of.
//
// For bf16 results exp has a polynomial of degree 4 and a reciprocal the 14 bits of the
// instruction; both errors are below a tenth of the rounding to bf16.
#pragma once

// GCC 12 takes the operands that its own AVX-512 header leaves undefined on purpose for mistakes.
#pragma GCC diagnostic ignored "-Wuninitialized"

#include <type_traits>

#include "../common/vector_math.h"
#include "gated_activation.h"

namespace lora_kernels::gated_activation {
namespace {

template <class T>
constexpr bool kCoarse = std::is_same_v<T, bf16>;

// min(x, most); NaN stays.
inline Vec at_most(Vec x, float most) {
#if LK_LANES == 16 && defined(__AVX512F__)
  return (Vec)_mm512_min_ps(_mm512_set1_ps(most), (__m512)x);
#else
  const Vec m = broadcast(most);
  return choose(x > m, m, x);
#endif
}

// exp(x) for x <= 88; 0 or a subnormal where that is smaller than the least normal; NaN stays.
template <class T>
inline Vec exponential(Vec x) {
#if LK_LANES == 16 && defined(__AVX512F__)
  const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-120.0f), (__m512)x);
  const __m512 log2e = _mm512_set1_ps(kLog2E);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(bounded, log2e),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 f = _mm512_fmsub_ps(bounded, log2e, n);
  if constexpr (!kCoarse<T>) {
    f = _mm512_fmadd_ps(bounded, _mm512_set1_ps(1.925963033e-8f), f);  // log2 e - fp32 of it
  }
  return (Vec)_mm512_scalef_ps((__m512)exp2_fraction<kCoarse<T> ? 4 : 6>((Vec)f), n);
#else
  return exp_vec(x);
#endif
}

// 1 / d for 1 <= d < infinity.
template <class T>
inline Vec reciprocal(Vec d) {
#if LK_LANES == 16 && defined(__AVX512F__)
  const __m512 r = _mm512_rcp14_ps((__m512)d);
  if constexpr (kCoarse<T>) return (Vec)r;
  return (Vec)_mm512_fmadd_ps(r, _mm512_fnmadd_ps((__m512)d, r, _mm512_set1_ps(1.0f)), r);
#else
  return 1.0f / d;
#endif
}

// Exponents below overflow: 1 / (1 + e^88) is 0 to every dtype.
template <class T>
inline Vec sigmoid(Vec x) {
  return reciprocal<T>(1.0f + exponential<T>(at_most(-x, 88.0f)));
}

// (erfc(|g| / sqrt 2)) / 2, and e^(-g^2 / 2), which it contains: Abramowitz and Stegun, Handbook of
// Mathematical Functions, 7.1.26 (absolute error below 1.5e-7 of erfc).
template <class T>
inline Vec normal_tail(Vec g, Vec* bell) {
  const Vec z = at_most(absolute(g), 30.0f);  // the tail is 0 long before
  *bell = exponential<T>(z * z * -0.5f);
  const Vec t = reciprocal<T>(1.0f + z * (0.3275911f * 0.707106781186547524f));
  Vec q = t * (0.5f * 1.061405429f) + (0.5f * -1.453152027f);
  q = q * t + 0.5f * 1.421413741f;
  q = q * t + 0.5f * -0.284496736f;
  q = q * t + 0.5f * 0.254829592f;
  return q * t * *bell;
}

// act(g), and act'(g) where it is asked for.
template <class T, Kind kKind, bool kSlope>
inline Vec activation(Vec g, Vec* slope) {
  if constexpr (kKind == Kind::kSilu) {
    const Vec s = sigmoid<T>(g);
    if constexpr (kSlope) *slope = s * (1.0f + g * (1.0f - s));
    return g * s;
  } else if constexpr (kKind == Kind::kGelu) {
    Vec bell;
    const Vec tail = normal_tail<T>(g, &bell);
    const Vec p = choose(g > Vec{}, 1.0f - tail, tail);
    if constexpr (kSlope) {
      *slope = p + choose(bell > Vec{}, g * bell, bell) * 0.398942280401432678f;
    }
    return g * p;
  } else if constexpr (kKind == Kind::kGeluTanh) {
    constexpr float c = 0.797884560802865356f, a = 0.044715f;
    // (1 + tanh(x)) / 2 is a sigmoid of 2 x, without the difference that cancels.
    const Vec square = g * g;
    const Vec s = sigmoid<T>(2.0f * c * g * (1.0f + a * square));
    if constexpr (kSlope) {
      // g * (1 - s) has no infinity times 0: s is exactly 1 or 0 long before g overflows.
      const Vec rise = choose(square > broadcast(1e4f), Vec{}, s * (1.0f - s) * 2.0f * c *
                                                                  (1.0f + 3.0f * a * square));
      *slope = s + g * rise;
    }
    return g * s;
  } else {
    const Vec positive = choose(g < Vec{}, Vec{}, g);  // NaN stays
    if constexpr (kKind == Kind::kRelu) {
      if constexpr (kSlope) *slope = choose(g > Vec{}, broadcast(1.0f), Vec{});
      return positive;
    } else {
      if constexpr (kSlope) *slope = 2.0f * positive;
      return positive * positive;
    }
  }
}

}  // namespace
}  // namespace lora_kernels::gated_activation
