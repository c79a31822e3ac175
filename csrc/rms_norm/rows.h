// Norms of rows and their gradients, written once and compiled once per instruction set (LK_LANES).
#pragma once

#include <algorithm>
#include <cmath>

#include "../common/vector_math.h"
#include "rms_norm.h"

namespace lora_kernels::rms_norm {
namespace {

template <class T>
inline Vec load_some(const T* p, int64_t count) {
  Vec v{};
  for (int64_t l = 0; l < count; ++l) v[l] = to_float(p[l]);
  return v;
}
template <class T>
inline void store_some(T* p, Vec v, int64_t count) {
  for (int64_t l = 0; l < count; ++l) from_float(v[l], p[l]);
}

// Calls at(c, load, store) for every vector of a row; the last one may be a part.
template <class Body>
inline void each_vector(int64_t columns, const Body& body) {
  int64_t c = 0;
  for (; c + LK_LANES <= columns; c += LK_LANES) {
    body(c, [](const auto* p) { return load(p); }, [](auto* p, Vec v) { store_vec(p, v); });
  }
  const int64_t rest = columns - c;
  if (rest > 0) {
    body(c, [rest](const auto* p) { return load_some(p, rest); },
         [rest](auto* p, Vec v) { store_some(p, v, rest); });
  }
}

// Sum over a row of term(c, load), a vector at column c, in four interleaved sums.
template <class Term>
inline float sum_row(int64_t columns, const Term& term) {
  constexpr int64_t kStep = 4 * LK_LANES;
  const auto whole = [](const auto* p) { return load(p); };
  Vec sums[4] = {};
  int64_t c = 0;
  for (; c + kStep <= columns; c += kStep) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) sums[u] += term(c + u * LK_LANES, whole);
  }
  for (; c + LK_LANES <= columns; c += LK_LANES) sums[0] += term(c, whole);
  const int64_t rest = columns - c;
  if (rest > 0) {
    sums[1] += term(c, [rest](const auto* p) { return load_some(p, rest); });
  }
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
void forward_row(const ForwardParams& p, int64_t r) {
  const T* x = static_cast<const T*>(p.x) + r * p.ldx;
  T* y = static_cast<T*>(p.y) + r * p.columns;
  const float squares = sum_row(p.columns, [&](int64_t c, const auto& get) {
    const Vec v = get(x + c);
    return v * v;
  });
  const float rstd = 1.0f / std::sqrt(squares / static_cast<float>(p.columns) + p.eps);
  p.rstd[r] = rstd;
  each_vector(p.columns, [&](int64_t c, const auto& get, const auto& put) {
    const Vec n = get(x + c) * rstd;
    put(y + c, p.gain == nullptr ? n : n * get(p.gain + c));
  });
}

// dx of a row; dy n is added to `dweight` where that is not null.
template <class T>
void backward_row(const BackwardParams& p, int64_t r, float* dweight) {
  const T* x = static_cast<const T*>(p.x) + r * p.ldx;
  const T* dy = static_cast<const T*>(p.dy) + r * p.lddy;
  T* dx = static_cast<T*>(p.dx) + r * p.columns;
  const float rstd = p.rstd[r];
  const auto scaled = [&](int64_t c, Vec d, const auto& get) {
    return p.gain == nullptr ? d : d * get(p.gain + c);
  };
  const float sum = sum_row(p.columns, [&](int64_t c, const auto& get) {
    return scaled(c, get(dy + c), get) * (get(x + c) * rstd);
  });
  const float mean = sum / static_cast<float>(p.columns);
  each_vector(p.columns, [&](int64_t c, const auto& get, const auto& put) {
    const Vec n = get(x + c) * rstd, d = get(dy + c);
    put(dx + c, (scaled(c, d, get) - n * mean) * rstd);
    if (dweight != nullptr) put(dweight + c, get(dweight + c) + d * n);
  });
}

template <class T>
void backward(const BackwardParams& p, int64_t begin, int64_t end, float* workspace) {
  if (p.dweights == nullptr) {
    for (int64_t r = begin; r < end; ++r) backward_row<T>(p, r, nullptr);
    return;
  }
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    float* slot = p.dweights + chunk * p.columns;
    std::fill_n(slot, p.columns, 0.0f);
    const int64_t last = std::min(p.rows, (chunk + 1) * p.chunk_rows);
    for (int64_t r0 = chunk * p.chunk_rows; r0 < last; r0 += kBlockRows) {
      std::fill_n(workspace, p.columns, 0.0f);
      const int64_t r1 = std::min(last, r0 + kBlockRows);
      for (int64_t r = r0; r < r1; ++r) backward_row<T>(p, r, workspace);
      for (int64_t c = 0; c < p.columns; ++c) slot[c] += workspace[c];
    }
  }
}

}  // namespace
}  // namespace lora_kernels::rms_norm
