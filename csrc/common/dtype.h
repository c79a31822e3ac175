// Element types of kernel operands and their conversions to and from fp32. No torch headers.
#pragma once

#include <cstdint>
#include <cstring>

namespace lora_kernels {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// Internal linkage on purpose: these are compiled once per instruction set, and the linker must
// not merge an AVX-512 copy into the baseline object.
namespace {

inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) { return bits_to_float(static_cast<uint32_t>(v.bits) << 16); }

inline float to_float(fp16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t magnitude = v.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x0400u) return bits_to_float(sign | ((magnitude + 0x1c000u) << 13));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return bits_to_float(sign | float_to_bits(subnormal));
}

// Round to nearest even; NaN stays NaN.
inline void from_float(float f, float& out) { out = f; }

inline void from_float(float f, bf16& out) {
  const uint32_t u = float_to_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) {
    out.bits = static_cast<uint16_t>((u >> 16) | 0x40u);
  } else {
    out.bits = static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
}

inline void from_float(float f, fp16& out) {
  const uint32_t u = float_to_bits(f);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    out.bits = static_cast<uint16_t>(sign | 0x7e00u);
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    out.bits = static_cast<uint16_t>(sign | 0x7c00u);
  } else if (magnitude >= 0x38800000u) {  // normal
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    out.bits = static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
  } else {  // subnormal: the addition rounds to a multiple of 2^-24
    const float shifted = bits_to_float(magnitude) + 0.5f;
    out.bits = static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u));
  }
}

}  // namespace
}  // namespace lora_kernels
