// Products of a block by multiply-adds, any dtype: everything as fp32.
//
// taken [kBlockRows][kPanel]; packed operand [columns][rank]; S [kBlockRows][rank]; sums of dB
// [columns][rank], ranks padded. 8 x LK_LANES accumulators from 0 per block, then one addition: a
// sum over M rows is a chain of kBlockRows and one of M / kBlockRows.
#pragma once

#include "blocks.h"

namespace lora_kernels::gated_activation {
namespace {

// c[i][0 : rank] += sum over k of a[i * step_i + k * step_k] * b[k][0 : rank], i < m (of 8).
inline void add_product(const float* a, int64_t step_i, int64_t step_k, const float* b, int64_t m,
                        int64_t depth, int64_t rank, float* c) {
  for (int64_t j = 0; j < rank; j += LK_LANES) {
    for (int64_t i0 = 0; i0 < m; i0 += 8) {
      Vec sum[8] = {};
      const float* left = a + i0 * step_i;
      for (int64_t k = 0; k < depth; ++k, left += step_k) {
        const Vec right = load(b + k * rank + j);
#pragma GCC unroll 8
        for (int64_t i = 0; i < 8; ++i) sum[i] += left[i * step_i] * right;
      }
#pragma GCC unroll 8
      for (int64_t i = 0; i < 8; ++i) {
        float* out = c + (i0 + i) * rank + j;
        store_vec(out, load(out) + sum[i]);
      }
    }
  }
}

template <class T>
struct FmaEngine {
  using Element = float;
  struct Turned {};
  static constexpr int64_t kSummedRows = INT64_MAX;

  static void enter() {}
  static void leave() {}

  static void pack(const void* src, int64_t stride_n, int64_t stride_r, int64_t columns,
                   int64_t rank, void* dst) {
    const int64_t padded = padded_rank(rank), wide = padded_columns(columns);
    const T* from = static_cast<const T*>(src);
    float* to = static_cast<float*>(dst);
    std::memset(to, 0, wide * padded * sizeof(float));
    for (int64_t n = 0; n < columns; ++n) {
      for (int64_t r = 0; r < rank; ++r) {
        to[n * padded + r] = to_float(from[n * stride_n + r * stride_r]);
      }
    }
  }

  static void pack_s(const T* s, int64_t lds, int64_t rows, int64_t rank, float* dst) {
    const int64_t padded = padded_rank(rank);
    std::memset(dst, 0, kBlockRows * padded * sizeof(float));
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t r = 0; r < rank; ++r) dst[i * padded + r] = to_float(s[i * lds + r]);
    }
  }

  static void take(const T* row, int64_t n, float* dst) {
    int64_t c = 0;
    for (; c + LK_LANES <= n; c += LK_LANES) store_vec(dst + c, load(row + c));
    for (; c < n; ++c) dst[c] = to_float(row[c]);
    for (; c < kPanel; ++c) dst[c] = 0.0f;
  }

  static void shrink(const float* taken, const float* packed, int64_t rank, float* products) {
    add_product(taken, kPanel, 1, packed, kBlockRows, kPanel, rank, products);
  }

  static void outer(const float* taken, Turned&, const float* s, int64_t rank, int64_t rows,
                    int64_t c0, int64_t, float* sums) {
    add_product(taken, 1, kPanel, s, kPanel, rows, rank, sums + c0 * rank);
  }

  static void finish(const float* sums, int64_t slots, int64_t stride, int64_t, int64_t rank,
                     float scaling, int64_t begin, int64_t end, float* dst) {
    const int64_t padded = padded_rank(rank);
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t r = 0; r < rank; ++r) {
        float total = sums[n * padded + r];
        for (int64_t slot = 1; slot < slots; ++slot) total += sums[slot * stride + n * padded + r];
        dst[n * rank + r] = scaling * total;
      }
    }
  }
};

}  // namespace
}  // namespace lora_kernels::gated_activation
