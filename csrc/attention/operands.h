// From rows of the tensors to operands of the products, and back.
//
// A staged block is row-major, [rows][padded columns] of the engine's operand type, zero past the
// tensor's rows and columns, so that nothing after it has an edge.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attention.h"

namespace lora_kernels::attention {
namespace {

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class T>
const T* row_of(const Rows& r, int64_t b, int64_t s, int64_t h) {
  return static_cast<const T*>(r.data) + b * r.batch + s * r.row + h * r.head;
}
template <class T>
T* row_to(const Rows& r, int64_t b, int64_t s, int64_t h) {
  return static_cast<T*>(r.data) + b * r.batch + s * r.row + h * r.head;
}

// Hands out parts of a workspace; with a null base it only measures.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class V>
  V* take(int64_t count) {
    char* here = base_ + used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(V)), 64);
    return reinterpret_cast<V*>(here);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// dst [total][padded] = src [rows][columns], zero elsewhere.
template <class E>
void stage(const typename E::T* src, int64_t ld, int64_t rows, int64_t columns, int64_t total,
           int64_t padded, typename E::P* dst) {
  using P = typename E::P;
  for (int64_t i = 0; i < rows; ++i) {
    const auto* s = src + i * ld;
    P* d = dst + i * padded;
    if constexpr (std::is_same_v<P, typename E::T>) {
      std::memcpy(d, s, columns * sizeof(P));
    } else {
      int64_t j = 0;
      for (; j + LK_LANES <= columns; j += LK_LANES) store_vec(d + j, load(s + j));
      for (; j < columns; ++j) d[j] = to_float(s[j]);
    }
    std::memset(static_cast<void*>(d + columns), 0, (padded - columns) * sizeof(P));
  }
  std::memset(static_cast<void*>(dst + rows * padded), 0, (total - rows) * padded * sizeof(P));
}

// Transposes LANES x LANES words (fp32, or pairs of bf16) of a staged block.
template <class E>
void load_transposed(const typename E::P* block, int64_t padded, int64_t row, int64_t word,
                     Vec v[LK_LANES]) {
  constexpr int64_t kPerWord = 4 / sizeof(typename E::P);
  for (int l = 0; l < LK_LANES; ++l) {
    v[l] = load(reinterpret_cast<const float*>(block + (row + l) * padded + word * kPerWord));
  }
  transpose_lanes(v);
}

// One strip with the NR rows of a staged block as its columns: [padded][NR].
template <class E>
void pack_columns(const typename E::P* block, int64_t padded, typename E::P* strip) {
  const int64_t words = padded * static_cast<int64_t>(sizeof(typename E::P)) / 4;
  auto* out = reinterpret_cast<float*>(strip);
  for (int64_t row = 0; row < E::NR; row += LK_LANES) {
    for (int64_t word = 0; word < words; word += LK_LANES) {
      Vec v[LK_LANES];
      load_transposed<E>(block, padded, row, word, v);
      for (int l = 0; l < LK_LANES; ++l) store_vec(out + (word + l) * E::NR + row, v[l]);
    }
  }
}

// Rows k.. of the strips of [.., padded] from the `rows` (even) rows of a staged block.
template <class E>
void pack_rows(const typename E::P* block, int64_t padded, int64_t rows, int64_t k,
               int64_t strip_stride, typename E::P* strips) {
  for (int64_t c = 0; c < padded; c += E::NR, strips += strip_stride) {
    for (int64_t i = 0; i < rows; i += 2) {
      E::copy_b(strips, k + i, block + i * padded + c, block + (i + 1) * padded + c);
    }
  }
}

// dst [padded][ld] = block^T, of `rows` (a multiple of LANES) rows.
template <class E>
void transpose_block(const typename E::P* block, int64_t padded, int64_t rows, int64_t ld,
                     typename E::P* dst) {
  const int64_t words = padded * static_cast<int64_t>(sizeof(typename E::P)) / 4;
  for (int64_t row = 0; row < rows; row += LK_LANES) {
    for (int64_t word = 0; word < words; word += LK_LANES) {
      Vec v[LK_LANES];
      load_transposed<E>(block, padded, row, word, v);
      E::store_transposed(dst + row, ld, word, v);
    }
  }
}

// Elements [0, n) of dst = factor * src, rounded once; src has whole vectors.
template <class T>
void store_row(const float* src, int64_t n, float factor, T* dst) {
  int64_t j = 0;
  for (; j + LK_LANES <= n; j += LK_LANES) store_vec(dst + j, factor * load(src + j));
  for (; j < n; ++j) from_float(factor * src[j], dst[j]);
}

}  // namespace
}  // namespace lora_kernels::attention
