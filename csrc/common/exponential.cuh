// Exponential and tanh of fp32 values by the special function unit.
//
// exp2: ex2.approx, 2 ulp; exp2_of(-inf) = 0, exp2_of(+inf) = +inf, NaN stays NaN.
// tanh: 1 - 2 / (e^2x + 1), absolute error below 3e-7. tanh.approx errs 5e-4 times its result, which
// a softcap of 50 would turn into an error of 0.02 in a score.
#pragma once

#include <cmath>

#include "gpu.h"

namespace lora_kernels {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

LK_DEVICE float exp2_of(float x) {
#if defined(LK_EMULATOR)
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

LK_DEVICE float tanh_of(float x) {
  const float e = exp2_of(2.0f * kLog2E * x);
#if defined(LK_EMULATOR)
  return 1.0f - 2.0f / (e + 1.0f);
#else
  return 1.0f - __fdividef(2.0f, e + 1.0f);
#endif
}

}  // namespace lora_kernels
