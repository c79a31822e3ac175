// The loops over a row, written once and compiled once per instruction set (LK_LANES).
#pragma once

#include "activation.h"

namespace lora_kernels::gated_activation {
namespace {

inline void store_result(float* p, Vec v) { store_vec(p, v); }
inline void store_result(fp16* p, Vec v) { store_vec(p, v); }
inline void store_result(bf16* p, Vec v) {
#if LK_LANES == 16 && defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      reinterpret_cast<__m256i>(_mm512_cvtneps_pbh((__m512)v)));
#else
  store_vec(p, v);
#endif
}

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

template <class T, Kind kKind, bool kGated>
inline void forward_row(const T* gate, const T* up, T* h, int64_t n) {
  const auto one = [](Vec g, Vec u) {
    const Vec act = activation<T, kKind, false>(g, nullptr);
    return kGated ? act * u : act;
  };
  int64_t c = 0;
  for (; c + LK_LANES <= n; c += LK_LANES) {
    store_result(h + c, one(load(gate + c), kGated ? load(up + c) : Vec{}));
  }
  if (c == n) return;
  const Vec u = kGated ? load_some(up + c, n - c) : Vec{};
  store_some(h + c, one(load_some(gate + c, n - c), u), n - c);
}

template <class T, Kind kKind, bool kGated>
inline void backward_row(const T* dh, const T* gate, const T* up, T* dgate, T* dup, int64_t n) {
  const auto one = [](Vec d, Vec g, Vec u, Vec* dg, Vec* du) {
    Vec slope;
    const Vec act = activation<T, kKind, true>(g, &slope);
    *dg = kGated ? d * u * slope : d * slope;
    *du = d * act;
  };
  int64_t c = 0;
  Vec dg, du;
  for (; c + LK_LANES <= n; c += LK_LANES) {
    one(load(dh + c), load(gate + c), kGated ? load(up + c) : Vec{}, &dg, &du);
    store_result(dgate + c, dg);
    if constexpr (kGated) store_result(dup + c, du);
  }
  if (c == n) return;
  const int64_t rest = n - c;
  const Vec u = kGated ? load_some(up + c, rest) : Vec{};
  one(load_some(dh + c, rest), load_some(gate + c, rest), u, &dg, &du);
  store_some(dgate + c, dg, rest);
  if constexpr (kGated) store_some(dup + c, du, rest);
}

// Columns [column, column + n) of row r.
template <class T, Kind kKind, bool kGated>
inline void part_of_row(const RowsParams& p, int64_t r, int64_t column, int64_t n) {
  const T* gate = static_cast<const T*>(p.gate) + r * p.ldgate + column;
  const T* up = kGated ? static_cast<const T*>(p.up) + r * p.ldup + column : nullptr;
  const int64_t at = r * p.columns + column;
  if (p.dh == nullptr) {
    forward_row<T, kKind, kGated>(gate, up, static_cast<T*>(p.h) + at, n);
    return;
  }
  T* dup = kGated ? static_cast<T*>(p.dup) + at : nullptr;
  backward_row<T, kKind, kGated>(static_cast<const T*>(p.dh) + r * p.lddh + column, gate, up,
                                 static_cast<T*>(p.dgate) + at, dup, n);
}

template <class T, Kind kKind>
void rows(const RowsParams& p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    if (p.up == nullptr) {
      part_of_row<T, kKind, false>(p, r, 0, p.columns);
    } else {
      part_of_row<T, kKind, true>(p, r, 0, p.columns);
    }
  }
}

template <class T>
RowsKernel rows_of(Kind kind) {
  switch (kind) {
    case Kind::kSilu:
      return &rows<T, Kind::kSilu>;
    case Kind::kGelu:
      return &rows<T, Kind::kGelu>;
    case Kind::kGeluTanh:
      return &rows<T, Kind::kGeluTanh>;
    case Kind::kRelu:
      return &rows<T, Kind::kRelu>;
    case Kind::kReluSquared:
      return &rows<T, Kind::kReluSquared>;
  }
  return nullptr;
}

}  // namespace
}  // namespace lora_kernels::gated_activation
