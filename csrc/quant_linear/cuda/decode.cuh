// From packed codes to fp32: the arithmetic of lora_kernels/ops/quant_linear/formats.py, every
// product rounded on its own (no fused multiply-add), so that the bits are those of reference.py.
#pragma once

#include "../../common/convert.cuh"
#include "params.h"

namespace lora_kernels::quant_linear::cuda {

LK_DEVICE float as_float(uint32_t bits) {
#if defined(LK_EMULATOR)
  return bits_to_float(bits);
#else
  return __uint_as_float(bits);
#endif
}

LK_DEVICE uint32_t as_bits(float value) {
#if defined(LK_EMULATOR)
  return float_to_bits(value);
#else
  return __float_as_uint(value);
#endif
}

LK_DEVICE float product(float a, float b) {
#if defined(LK_EMULATOR)
  return a * b;
#else
  return __fmul_rn(a, b);
#endif
}

LK_DEVICE float sum(float a, float b) {
#if defined(LK_EMULATOR)
  return a + b;
#else
  return __fadd_rn(a, b);
#endif
}

// 2^23 + u for u < 2^23: integers to fp32 without a conversion instruction.
LK_DEVICE float above_2_23(uint32_t u) { return as_float(0x4b000000u | u); }

// 2^23 + byte i of a word.
template <int i>
LK_DEVICE float byte_above_2_23(uint32_t word) {
#if defined(LK_EMULATOR)
  return above_2_23(word >> (8 * i) & 0xffu);
#else
  return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7540 + i));
#endif
}

// The fp32 with the sign, exponent and mantissa of e4m3fn byte i is 2^120 too small.
template <int i>
LK_DEVICE float from_e4m3(uint32_t word) {
  const uint32_t high = i == 3 ? word : word << (24 - 8 * i);
  const uint32_t bits = (high & 0x80000000u) | (high >> 4 & 0x07f00000u);
  const float value = product(as_float(bits), 0x1p120f);
  return (high & 0x7f000000u) == 0x7f000000u ? as_float(0x7fc00000u) : value;
}

// Four of them; exact, also by the instruction of compute capability 8.9 and newer.
LK_DEVICE void e4m3_values(uint32_t word, float (&v)[4]) {
#if !defined(LK_EMULATOR) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  asm("{\n.reg .b16 low, high, a, b;\n.reg .b32 ab;\n"
      "mov.b32 {low, high}, %4;\n"
      "cvt.rn.f16x2.e4m3x2 ab, low;\nmov.b32 {a, b}, ab;\n"
      "cvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\n"
      "cvt.rn.f16x2.e4m3x2 ab, high;\nmov.b32 {a, b}, ab;\n"
      "cvt.f32.f16 %2, a;\ncvt.f32.f16 %3, b;\n}\n"
      : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
      : "r"(word));
#else
  v[0] = from_e4m3<0>(word);
  v[1] = from_e4m3<1>(word);
  v[2] = from_e4m3<2>(word);
  v[3] = from_e4m3<3>(word);
#endif
}

// The values of the four bytes of a word of a row-wise format.
template <Layout kLayout>
LK_DEVICE void scaled_bytes(uint32_t word, float scale, float factor, float (&v)[4]) {
  if constexpr (kLayout == Layout::kInt8) {
    word ^= 0x80808080u;
    v[0] = sum(byte_above_2_23<0>(word), -8388736.0f);  // 2^23 + 128
    v[1] = sum(byte_above_2_23<1>(word), -8388736.0f);
    v[2] = sum(byte_above_2_23<2>(word), -8388736.0f);
    v[3] = sum(byte_above_2_23<3>(word), -8388736.0f);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = product(product(v[i], scale), factor);
  } else {
    e4m3_values(word, v);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = product(v[i], scale);
  }
}

LK_DEVICE float int4_value(uint32_t code, uint32_t zero, float scale) {
  return product(sum(above_2_23(code), -above_2_23(zero)), scale);
}

// The 16 values of nf4 or fp4, 32 times in shared memory: lane l reads bank l, whatever the code.
struct CodeTable {
  static constexpr int kFloats = 16 * 32;
  const unsigned char* table;  // the start of shared memory: a constant in every address
  uint32_t lane_byte;

  LK_DEVICE CodeTable(const unsigned char* shared, int lane)
      : table(shared), lane_byte(4u * static_cast<uint32_t>(lane)) {}

  template <int kThreads>
  LK_DEVICE static void fill(float* table, const float* code, int thread) {
    for (int i = thread; i < kFloats; i += kThreads) table[i] = code[i / 32];
  }

  // Value of the nibble whose lowest bit is bit `shift` of `word`.
  LK_DEVICE float at(uint32_t word, int shift) const {
    const uint32_t row = shift >= 7 ? word >> (shift - 7) : word << (7 - shift);
    return *reinterpret_cast<const float*>(table + ((row & 0x780u) | lane_byte));
  }
};

// Statistics as they lie in memory; loaded early, turned into a scale where it is used.
struct RawScale {
  float value;
  uint32_t code;  // nested statistics: index into nested_code; int4: the zero
};

LK_DEVICE RawScale flat_scale(const QuantWeight& w, uint32_t block) {
  if (w.nested_shift == 0) return {static_cast<const float*>(w.absmax)[block], 0u};
  return {w.nested_absmax[block >> w.nested_shift], static_cast<const uint8_t*>(w.absmax)[block]};
}

// nested_code, copied to shared memory, and offset.
LK_DEVICE float flat_absmax(const QuantWeight& w, const RawScale& raw, const float* nested_code,
                            float offset) {
  if (w.nested_shift == 0) return raw.value;
  return sum(product(nested_code[raw.code], raw.value), offset);
}

// Bits of column n % 8 in a word of eight int4 that are packed along n.
LK_DEVICE int column_shift(Layout layout, int64_t n) {
  const int column = static_cast<int>(n & 7);
  return 4 * (layout == Layout::kAwq ? column / 2 + 4 * (column & 1) : column);
}

LK_DEVICE RawScale int4_scale(const QuantWeight& w, int64_t group, int64_t n) {
  if (group < 0) group = 0;
  if (group >= w.groups) group = w.groups - 1;  // whatever g_idx holds, no other memory is read
  const uint32_t word = static_cast<uint32_t>(w.zeros[group * w.packed_n + n / 8]);
  const uint32_t zero = word >> column_shift(w.layout, n) & 15u;
  return {load_as_float(w.scales, group * w.n + n, w.scales_dtype),
          zero + static_cast<uint32_t>(w.zero_offset)};
}

LK_DEVICE float row_scale(const QuantWeight& w, int64_t n, int64_t k) {
  return w.scale[n / w.scale_rows * w.scale_ld + k / w.scale_columns];
}

}  // namespace lora_kernels::quant_linear::cuda
