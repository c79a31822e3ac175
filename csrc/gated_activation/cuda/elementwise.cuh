// The activations and their slopes in fp32, and chunks of 8 elements in registers.
//
// Formulas: lora_kernels/ops/gated_activation/reference.py. gelu_tanh: the polynomial is bounded
// where tanh is 1 in fp32, so that large arguments give no infinity times zero.
#pragma once

#include <cmath>

#include "../../common/convert.cuh"
#include "../../common/exponential.cuh"
#include "params.h"

namespace lora_kernels::gated_activation::cuda {

constexpr int kElements = 8;  // of a chunk: 16 bytes

// Elements [0, valid) of 8 at p, the others zero. kAligned: valid is 0 or 8, p a multiple of 16.
template <bool kAligned, class T>
LK_DEVICE void load_chunk(uint32_t (&v)[4], const T* p, int valid) {
  if constexpr (kAligned) {
    if (valid > 0) {
      const uint4 all = *reinterpret_cast<const uint4*>(p);
      v[0] = all.x, v[1] = all.y, v[2] = all.z, v[3] = all.w;
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = !kAligned && 2 * i < valid ? p[2 * i].bits : 0;
    const uint32_t high = !kAligned && 2 * i + 1 < valid ? p[2 * i + 1].bits : 0;
    v[i] = low | high << 16;
  }
}

template <bool kAligned, class T>
LK_DEVICE void store_chunk(T* p, const uint32_t (&v)[4], int valid) {
  if constexpr (kAligned) {
    if (valid > 0) *reinterpret_cast<uint4*>(p) = make_uint4(v[0], v[1], v[2], v[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < valid) p[i].bits = static_cast<uint16_t>(v[i / 2] >> (16 * (i % 2)));
    }
  }
}

template <class T>
LK_DEVICE float half_of(uint32_t pair, int half) {
  return widen(T{static_cast<uint16_t>(half != 0 ? pair >> 16 : pair & 0xffffu)});
}

LK_DEVICE float sigmoid_of(float g) { return 1.0f / (1.0f + exp2_of(-kLog2E * g)); }

LK_DEVICE float erf_of(float x) {
#if defined(LK_EMULATOR)
  return std::erf(x);
#else
  return erff(x);
#endif
}

constexpr float kRootHalf = 0.70710678118654752f, kDensity = 0.39894228040143268f;
constexpr float kTanhScale = 0.79788456080286536f, kTanhCubic = 0.044715f;

LK_DEVICE float bounded(float g) { return g > 10.0f ? 10.0f : g < -10.0f ? -10.0f : g; }

LK_DEVICE float tanh_inside(float b) {
  return tanh_of(kTanhScale * (b + kTanhCubic * b * b * b));
}

struct Activated {
  float value, slope;
};

LK_DEVICE Activated activate(float g, Kind kind) {
  switch (kind) {
    case Kind::kSilu: {
      const float s = sigmoid_of(g);
      return {g * s, s * (1.0f + g * (1.0f - s))};
    }
    case Kind::kGelu: {
      const float p = 0.5f * (1.0f + erf_of(g * kRootHalf));
      return {g * p, p + g * exp2_of(-0.5f * kLog2E * g * g) * kDensity};
    }
    case Kind::kGeluTanh: {
      const float b = bounded(g), t = tanh_inside(b);
      return {0.5f * g * (1.0f + t), 0.5f * (1.0f + t) + 0.5f * b * (1.0f - t * t) * kTanhScale *
                                                             (1.0f + 3.0f * kTanhCubic * b * b)};
    }
    case Kind::kRelu: {
      const float positive = g < 0.0f ? 0.0f : g;
      return {positive, g > 0.0f ? 1.0f : 0.0f};
    }
    default: {
      const float positive = g < 0.0f ? 0.0f : g;
      return {positive * positive, 2.0f * positive};
    }
  }
}

// h of a chunk; `gated`: times u.
template <class T>
LK_DEVICE void activate_chunk(uint32_t (&h)[4], const uint32_t (&g)[4], const uint32_t (&u)[4],
                              Kind kind, bool gated) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float v[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      v[e] = activate(half_of<T>(g[i], e), kind).value;
      if (gated) v[e] *= half_of<T>(u[i], e);
    }
    h[i] = pack2<T>(v[0], v[1]);
  }
}

// dg, and du where it is gated, of a chunk.
template <class T>
LK_DEVICE void gradients_chunk(uint32_t (&dg)[4], uint32_t (&du)[4], const uint32_t (&dh)[4],
                               const uint32_t (&g)[4], const uint32_t (&u)[4], Kind kind,
                               bool gated) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float of_gate[2], of_up[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float d = half_of<T>(dh[i], e);
      const Activated a = activate(half_of<T>(g[i], e), kind);
      of_up[e] = d * a.value;
      of_gate[e] = (gated ? d * half_of<T>(u[i], e) : d) * a.slope;
    }
    dg[i] = pack2<T>(of_gate[0], of_gate[1]);
    du[i] = pack2<T>(of_up[0], of_up[1]);
  }
}

}  // namespace lora_kernels::gated_activation::cuda
