// The row kernel, written once and compiled once per instruction set (LK_LANES).
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "../common/vector_math.h"
#include "linear_cross_entropy.h"

namespace lora_kernels::linear_cross_entropy {
namespace {

// Calls body(first column, count) for whole vectors, then once for the columns that remain.
template <class Body>
inline void for_vectors(int64_t n, const Body& body) {
  int64_t v = 0;
  for (; v + LK_LANES <= n; v += LK_LANES) body(v, std::integral_constant<bool, true>{}, LK_LANES);
  if (v < n) body(v, std::integral_constant<bool, false>{}, n - v);
}

// Columns [v, v + count); lanes past them are -infinity.
template <class T, bool kWhole>
inline Vec load_columns(const T* p, int64_t v, int64_t count) {
  if constexpr (kWhole) return load(p + v);
  Vec z = broadcast(-std::numeric_limits<float>::infinity());
  for (int64_t l = 0; l < count; ++l) z[l] = to_float(p[v + l]);
  return z;
}

template <class T, bool kCap>
void one_row(const RowsParams& p, int64_t r) {
  T* logits = static_cast<T*>(p.logits) + r * p.ld;
  const int64_t n = p.vocabulary, label = p.labels[r];
  if (label == p.ignore_index) {
    p.losses[r] = 0.0f;
    for (int64_t v = 0; p.coefficients != nullptr && v < n; ++v) from_float(0.0f, logits[v]);
    return;
  }
  const float cap = p.softcap, inverse = kCap ? 1.0f / cap : 0.0f;
  const auto capped = [&](Vec z) { return kCap ? cap * tanh_vec(z * inverse) : z; };
  const auto capped_scalar = [&](float z) { return kCap ? cap * std::tanh(z * inverse) : z; };
  // Softcap keeps the order, so the maximum is taken before it.
  Vec highest = broadcast(-std::numeric_limits<float>::infinity());
  for_vectors(n, [&](int64_t v, auto whole, int64_t count) {
    const Vec z = load_columns<T, whole.value>(logits, v, count);
    highest = choose((IVec)(z > highest), z, highest);
  });
  float max = highest[0];
  for (int l = 1; l < LK_LANES; ++l) max = highest[l] > max ? highest[l] : max;
  max = capped_scalar(max);
  // Sums of blocks, so that the rounding grows with the blocks, not with the vocabulary.
  constexpr int64_t kBlock = 32 * LK_LANES;
  Vec sum_vec = {}, total_vec = {}, block_sum = {}, block_total = {};
  for_vectors(n, [&](int64_t v, auto whole, int64_t count) {
    if (v % kBlock == 0) {
      sum_vec += block_sum;
      total_vec += block_total;
      block_sum = block_total = Vec{};
    }
    const Vec raw = load_columns<T, whole.value>(logits, v, count);
    Vec z = capped(raw), e = exp_vec(z - max);
    if constexpr (!whole.value) {
      for (int64_t l = count; l < LK_LANES; ++l) e[l] = z[l] = 0.0f;
    }
    block_sum += e;
    block_total += z;
  });
  sum_vec += block_sum;
  total_vec += block_total;
  const float lse = max + std::log(sum_lanes(sum_vec));
  const float at_label = capped_scalar(to_float(logits[label]));
  float loss = lse - (1.0f - p.smoothing) * at_label + p.z_loss * lse * lse;
  if (p.smoothing != 0.0f) loss -= p.smoothing * (sum_lanes(total_vec) / static_cast<float>(n));
  p.losses[r] = loss;
  if (p.coefficients == nullptr) return;
  const float g = p.coefficients[r];
  const float factor = g * (1.0f + 2.0f * p.z_loss * lse);
  const float even = g * p.smoothing / static_cast<float>(n);
  for_vectors(n, [&](int64_t v, auto whole, int64_t count) {
    const Vec z = capped(load_columns<T, whole.value>(logits, v, count));
    Vec d = factor * exp_vec(z - lse) - even;
    if constexpr (kCap) {
      const Vec t = z * inverse;
      d *= 1.0f - t * t;
    }
    if constexpr (whole.value) {
      store_vec(logits + v, d);
    } else {
      for (int64_t l = 0; l < count; ++l) from_float(d[l], logits[v + l]);
    }
  });
  float d = factor * std::exp(at_label - lse) - even - g * (1.0f - p.smoothing);
  if (kCap) d *= 1.0f - at_label * inverse * at_label * inverse;
  from_float(d, logits[label]);
}

template <class T>
void rows(const RowsParams& p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    if (p.softcap == 0.0f) {
      one_row<T, false>(p, r);
    } else {
      one_row<T, true>(p, r);
    }
  }
}

RowsKernel rows_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return &rows<float>;
    case Dtype::kBFloat16:
      return &rows<bf16>;
    case Dtype::kFloat16:
      return &rows<fp16>;
  }
  return nullptr;
}

}  // namespace
}  // namespace lora_kernels::linear_cross_entropy
