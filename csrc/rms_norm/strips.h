// Strips of rows: normalized, then multiplied by A^T on an engine of lora_linear (E).
#pragma once

#include "../lora_linear/product.h"
#include "rows.h"

namespace lora_kernels::rms_norm {
namespace {

using lora_linear::Arena;
using lora_linear::round_up;

template <class E>
struct StripBuffers {
  typename E::TA* strip;
  float* sums;

  StripBuffers(const ForwardParams& p, Arena& arena) {
    strip = arena.take<typename E::TA>(E::MR * round_up(p.columns, E::KR));
    sums = arena.take<float>(E::MR * round_up(p.ranks, E::NV));
  }
};

template <class E>
int64_t workspace(const ForwardParams& p) {
  if (p.a_packed == nullptr) return 0;
  Arena arena(nullptr);
  StripBuffers<E>(p, arena);
  return arena.used();
}

template <class E>
void forward(const ForwardParams& p, int64_t begin, int64_t end, void* workspace) {
  using T = typename E::T;
  Arena arena(workspace);
  const StripBuffers<E> buf(p, arena);
  if (p.a_packed != nullptr) E::enter();
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i * E::MR, rows = std::min<int64_t>(E::MR, p.rows - row);
    for (int64_t r = row; r < row + rows; ++r) forward_row<T>(p, r);
    if (p.a_packed == nullptr) continue;
    const T* y = static_cast<const T*>(p.y) + row * p.columns;
    E::pack_a(y, p.columns, rows, p.columns, buf.strip);
    const int64_t ld = round_up(p.ranks, E::NV);
    lora_linear::multiply_strip<E>(buf.strip, static_cast<const typename E::TB*>(p.a_packed),
                                   round_up(p.columns, E::KR), p.ranks, rows, buf.sums, ld);
    E::store(buf.sums, ld, rows, p.ranks, nullptr, static_cast<T*>(p.s) + row * p.ranks, p.ranks);
  }
  if (p.a_packed != nullptr) E::leave();
}

template <class E>
constexpr Kernels kernels_of() {
  return {E::MR, workspace<E>, forward<E>, backward<typename E::T>};
}

}  // namespace
}  // namespace lora_kernels::rms_norm
