// The row kernel, written once and compiled once per instruction set (LK_LANES).
#pragma once

#include "../common/vector_math.h"
#include "gated_activation.h"

namespace lora_kernels::gated_activation {
namespace {

// Sums of exponents below overflow: 1 / (1 + e^88) is 0 to every dtype.
inline Vec sigmoid_vec(Vec x) {
  const Vec most = broadcast(88.0f);
  const Vec negated = -x;
  return 1.0f / (1.0f + exp_vec(choose(negated > most, most, negated)));
}

// act(g), and act'(g) where it is asked for.
template <Kind kKind>
inline Vec activation(Vec g, Vec* slope) {
  if constexpr (kKind == Kind::kSilu) {
    const Vec s = sigmoid_vec(g);
    if (slope != nullptr) *slope = s * (1.0f + g * (1.0f - s));
    return g * s;
  } else if constexpr (kKind == Kind::kGeluTanh) {
    constexpr float c = 0.797884560802865356f, a = 0.044715f;
    // (1 + tanh(x)) / 2 is a sigmoid of 2 x, without the difference that cancels.
    const Vec square = g * g;
    const Vec s = sigmoid_vec(2.0f * c * g * (1.0f + a * square));
    if (slope != nullptr) {
      // g * (1 - s) has no infinity times 0: s is exactly 1 or 0 long before g overflows.
      const Vec rise = choose(square > broadcast(1e4f), Vec{}, s * (1.0f - s) * 2.0f * c *
                                                                  (1.0f + 3.0f * a * square));
      *slope = s + g * rise;
    }
    return g * s;
  } else {
    const Vec positive = choose(g < Vec{}, Vec{}, g);  // NaN stays
    if constexpr (kKind == Kind::kRelu) {
      if (slope != nullptr) *slope = choose(g > Vec{}, broadcast(1.0f), Vec{});
      return positive;
    } else {
      if (slope != nullptr) *slope = 2.0f * positive;
      return positive * positive;
    }
  }
}

template <class T>
inline Vec load_some(const T* p, int64_t count) {
  if (count >= LK_LANES) return load(p);
  Vec v{};
  for (int64_t l = 0; l < count; ++l) v[l] = to_float(p[l]);
  return v;
}
template <class T>
inline void store_some(T* p, Vec v, int64_t count) {
  if (count >= LK_LANES) return store_vec(p, v);
  for (int64_t l = 0; l < count; ++l) from_float(v[l], p[l]);
}

template <class T, Kind kKind>
void rows(const RowsParams& p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T* gate = static_cast<const T*>(p.gate) + r * p.ldgate;
    const T* up = p.up == nullptr ? nullptr : static_cast<const T*>(p.up) + r * p.ldup;
    const T* dh = p.dh == nullptr ? nullptr : static_cast<const T*>(p.dh) + r * p.lddh;
    for (int64_t c = 0; c < p.columns; c += LK_LANES) {
      const int64_t count = p.columns - c;
      const Vec g = load_some(gate + c, count);
      const Vec u = up == nullptr ? broadcast(1.0f) : load_some(up + c, count);
      if (dh == nullptr) {
        const Vec h = activation<kKind>(g, nullptr) * u;
        store_some(static_cast<T*>(p.h) + r * p.columns + c, h, count);
        continue;
      }
      Vec slope;
      const Vec act = activation<kKind>(g, &slope), d = load_some(dh + c, count);
      store_some(static_cast<T*>(p.dgate) + r * p.columns + c, d * u * slope, count);
      if (up != nullptr) {
        store_some(static_cast<T*>(p.dup) + r * p.columns + c, d * act, count);
      }
    }
  }
}

template <class T>
RowsKernel rows_of(Kind kind) {
  switch (kind) {
    case Kind::kSilu:
      return &rows<T, Kind::kSilu>;
    case Kind::kGeluTanh:
      return &rows<T, Kind::kGeluTanh>;
    case Kind::kRelu:
      return &rows<T, Kind::kRelu>;
    case Kind::kReluSquared:
      return &rows<T, Kind::kReluSquared>;
  }
  return nullptr;
}

RowsKernel rows_of(Dtype dtype, Kind kind) {
  switch (dtype) {
    case Dtype::kFloat32:
      return rows_of<float>(kind);
    case Dtype::kBFloat16:
      return rows_of<bf16>(kind);
    case Dtype::kFloat16:
      return rows_of<fp16>(kind);
  }
  return nullptr;
}

}  // namespace
}  // namespace lora_kernels::gated_activation
