// Conversions between fp32 and the 16-bit element types, round to nearest even.
#pragma once

#include "gpu.h"

namespace lora_kernels {

template <class T>
struct is_bf16 {
  static constexpr bool value = false;
};
template <>
struct is_bf16<bf16> {
  static constexpr bool value = true;
};

LK_DEVICE float widen(float v) { return v; }
LK_DEVICE float widen(bf16 v) {
#if defined(LK_EMULATOR)
  return to_float(v);
#else
  return __uint_as_float(static_cast<uint32_t>(v.bits) << 16);
#endif
}
LK_DEVICE float widen(fp16 v) {
#if defined(LK_EMULATOR)
  return to_float(v);
#else
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
#endif
}

LK_DEVICE void narrow(float f, float& out) { out = f; }
LK_DEVICE void narrow(float f, bf16& out) {
#if defined(LK_EMULATOR)
  from_float(f, out);
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(f));
#endif
}
LK_DEVICE void narrow(float f, fp16& out) {
#if defined(LK_EMULATOR)
  from_float(f, out);
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(f));
#endif
}

// Two elements in one register, `low` first in memory.
template <class T>
LK_DEVICE uint32_t pack2(float low, float high) {
#if defined(LK_EMULATOR)
  T l, h;
  from_float(low, l);
  from_float(high, h);
  return l.bits | static_cast<uint32_t>(h.bits) << 16;
#else
  uint32_t r;
  if constexpr (is_bf16<T>::value) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  }
  return r;
#endif
}

// Element i of an array of run-time type.
LK_DEVICE float load_as_float(const void* data, int64_t i, Dtype dtype) {
  if (dtype == Dtype::kFloat32) return static_cast<const float*>(data)[i];
  if (dtype == Dtype::kBFloat16) return widen(static_cast<const bf16*>(data)[i]);
  return widen(static_cast<const fp16*>(data)[i]);
}
LK_DEVICE void store_from_float(void* data, int64_t i, Dtype dtype, float value) {
  if (dtype == Dtype::kFloat32) {
    static_cast<float*>(data)[i] = value;
  } else if (dtype == Dtype::kBFloat16) {
    narrow(value, static_cast<bf16*>(data)[i]);
  } else {
    narrow(value, static_cast<fp16*>(data)[i]);
  }
}

}  // namespace lora_kernels
