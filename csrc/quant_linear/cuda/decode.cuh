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

LK_DEVICE float from_int8(uint32_t byte) {
  return sum(above_2_23(byte ^ 0x80u), -8388736.0f);  // 2^23 + 128
}

// Exponent and mantissa of e4m3fn as those of an fp32 that is 2^120 too small.
LK_DEVICE float from_e4m3(uint32_t byte) {
  const uint32_t magnitude = byte & 0x7fu;
  const float value = product(as_float((byte & 0x80u) << 24 | magnitude << 20), 0x1p120f);
  return magnitude == 0x7fu ? as_float(0x7fc00000u) : value;
}

LK_DEVICE float from_byte(uint32_t byte, Layout layout) {
  return layout == Layout::kInt8 ? from_int8(byte) : from_e4m3(byte);
}

// Value of one byte of the row-wise formats.
LK_DEVICE float scaled_byte(uint32_t byte, const QuantWeight& w, float scale) {
  if (w.layout == Layout::kInt8) return product(product(from_int8(byte), scale), w.factor);
  return product(from_e4m3(byte), scale);
}

LK_DEVICE float int4_value(uint32_t code, uint32_t zero, float scale) {
  return product(sum(above_2_23(code), -above_2_23(zero)), scale);
}

// The 16 values of nf4 or fp4, 32 times in shared memory: lane l reads bank l, whatever the code.
struct CodeTable {
  static constexpr int kFloats = 16 * 32;
  const unsigned char* lane;

  LK_DEVICE CodeTable(const float* table, int lane_index)
      : lane(reinterpret_cast<const unsigned char*>(table + lane_index)) {}

  template <int kThreads>
  LK_DEVICE static void fill(float* table, const float* code, int thread) {
    for (int i = thread; i < kFloats; i += kThreads) table[i] = code[i / 32];
  }

  // Value of the nibble whose lowest bit is bit `shift` of `word`.
  LK_DEVICE float at(uint32_t word, int shift) const {
    const uint32_t row = (shift >= 7 ? word >> (shift - 7) : word << (7 - shift)) & 0x780u;
    return *reinterpret_cast<const float*>(lane + row);
  }
};

// Statistics as they lie in memory; loaded early, turned into a scale where it is used.
struct RawScale {
  float value;
  uint32_t code;  // nested statistics: index into nested_code; int4: the zero
};

LK_DEVICE RawScale flat_scale(const QuantWeight& w, int64_t element) {
  const int64_t block = element >> w.block_shift;
  if (w.nested_block == 0) return {static_cast<const float*>(w.absmax)[block], 0u};
  const uint32_t nested = static_cast<uint32_t>(block) / static_cast<uint32_t>(w.nested_block);
  return {w.nested_absmax[nested], static_cast<const uint8_t*>(w.absmax)[block]};
}

// nested_code, copied to shared memory, and offset.
LK_DEVICE float flat_absmax(const QuantWeight& w, const RawScale& raw, const float* nested_code,
                            float offset) {
  if (w.nested_block == 0) return raw.value;
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
  const uint32_t zero = (word >> column_shift(w.layout, n) & 15u) + static_cast<uint32_t>(w.zero_offset);
  return {load_as_float(w.scales, group * w.n + n, w.scales_dtype), zero};
}

LK_DEVICE float row_scale(const QuantWeight& w, int64_t n, int64_t k) {
  return w.scale[n / w.scale_rows * w.scale_ld + k / w.scale_columns];
}

}  // namespace lora_kernels::quant_linear::cuda
