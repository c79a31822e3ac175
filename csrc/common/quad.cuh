// Reductions over the four lanes that share a row of an mma accumulator (lane / 4).
#pragma once

#include "mma.cuh"

namespace lora_kernels {

LK_DEVICE float shuffle_xor(float value, int mask) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = shuffle_xor(bits, mask);
  memcpy(&value, &bits, 4);
  return value;
}

// The larger one; a NaN loses against a number.
LK_DEVICE float larger(float a, float b) {
#if defined(LK_EMULATOR)
  return a > b || b != b ? a : b;
#else
  return fmaxf(a, b);
#endif
}

LK_DEVICE float quad_max(float value) {
  value = larger(value, shuffle_xor(value, 1));
  return larger(value, shuffle_xor(value, 2));
}

LK_DEVICE float quad_sum(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}

}  // namespace lora_kernels
