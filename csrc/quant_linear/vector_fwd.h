// Forward in fp32 on vectors of LK_LANES, for every dtype of X.
//
//   Y = X W^T + bias + s S B^T,   S = drop(X) A^T
//
// Dot products with columns in the lanes, in groups of 8 vectors (vector_codes.h), X in the order
// of the groups. The products of a group are summed unscaled, then scaled: one multiplication per
// group and lane. S is made in the columns' own order.
// Phases: (0) X widened and ordered; (1) S; (2) Y, split over rows of W: a few rows of X straight
// from the codes (vector_few.h), more over panels of decoded groups.
// Numerics: fp32 throughout, S too, one rounding at the store; an element of Y is the same sum in
// the same order whatever the number of rows.
#pragma once

#include "vector_few.h"

namespace lora_kernels::quant_linear {
namespace {

// sums[i][j] += factors * (values . x) over `groups` groups, for kRows rows of W and kInputs of X.
template <int kRows, int kInputs>
void add_dots(const float* values, const float* factors, int64_t row_stride, int64_t factor_stride,
              const float* x, int64_t ldx, int64_t groups, float* sums, int64_t ldsums) {
  Vec total[kRows][kInputs];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kInputs; ++j) total[i][j] = load(sums + i * ldsums + j * kLanes);
  }
  for (int64_t g = 0; g < groups; ++g) {
    Vec part[kRows][kInputs] = {};
    const float* w = values + g * kColumns;
    const float* in = x + g * kColumns;
#pragma GCC unroll 8
    for (int s = 0; s < kVectors; ++s) {
      Vec xv[kInputs];
#pragma GCC unroll 4
      for (int j = 0; j < kInputs; ++j) xv[j] = load(in + j * ldx + s * kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const Vec wv = load(w + i * row_stride + s * kLanes);
#pragma GCC unroll 4
        for (int j = 0; j < kInputs; ++j) part[i][j] += wv * xv[j];
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const Vec factor = load(factors + i * factor_stride + g * kLanes);
#pragma GCC unroll 4
      for (int j = 0; j < kInputs; ++j) total[i][j] += part[i][j] * factor;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kInputs; ++j) store_vec(sums + i * ldsums + j * kLanes, total[i][j]);
  }
}

template <int kRows>
inline void add_dots_for(int inputs, const float* values, const float* factors, int64_t row_stride,
                         int64_t factor_stride, const float* x, int64_t ldx, int64_t groups,
                         float* sums, int64_t ldsums) {
  const auto call = [&](auto count) {
    add_dots<kRows, decltype(count)::value>(values, factors, row_stride, factor_stride, x, ldx,
                                            groups, sums, ldsums);
  };
  if (inputs == 1) return call(std::integral_constant<int, 1>{});
  if (inputs == 2) return call(std::integral_constant<int, 2>{});
  if constexpr (kInputBlock > 2) {
    if (inputs == 3) return call(std::integral_constant<int, 3>{});
    call(std::integral_constant<int, 4>{});
  }
}

inline void widen_inputs(const FwdParams& p, const VectorShared& shared, const VectorOwn& own,
                         int thread, int threads) {
  const int64_t k = p.weight->k;
  const Span rows = share(p.m, thread, threads);
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    read_row(p.dtype, p.x, i, p.ldx, k, own.row);
    order_row(own.row, k, shared.nibbles, shared.x + i * shared.groups * kColumns);
  }
}

// Columns in the lanes, four sums in turn, in natural order.
template <class T>
inline float dot(const float* x, const T* a, int64_t columns) {
  constexpr int64_t kStep = 4 * kLanes;
  Vec sum[4] = {};
  int64_t k = 0;
  for (; k + kStep <= columns; k += kStep) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum[i] += load(x + k + i * kLanes) * load(a + k + i * kLanes);
  }
  for (; k + kLanes <= columns; k += kLanes) sum[0] += load(x + k) * load(a + k);
  float rest = 0.0f;
  for (; k < columns; ++k) rest += x[k] * to_float(a[k]);
  return sum_of((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}
inline float dot(const float* x, const Adapter& a, int64_t row, int64_t columns) {
  switch (a.dtype) {
    case Dtype::kFloat32:
      return dot(x, static_cast<const float*>(a.data) + row * a.ld, columns);
    case Dtype::kBFloat16:
      return dot(x, static_cast<const bf16*>(a.data) + row * a.ld, columns);
    case Dtype::kFloat16:
      return dot(x, static_cast<const fp16*>(a.data) + row * a.ld, columns);
  }
  return 0.0f;
}

inline void shrink_rows(const FwdParams& p, const VectorShared& shared, const VectorOwn& own,
                        int thread, int threads) {
  const int64_t k = p.weight->k, width = shared.rank_vectors * kLanes;
  const Span rows = share(p.m, thread, threads);
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    read_row(p.dtype, p.x, i, p.ldx, k, own.row);
    if (p.dropout.threshold != 0) {
      lora_linear::make_masks(p.dropout, p.row0 + i, 1, k, 0, own.masks);
      for (int64_t c = 0; c < k; ++c) {
        if (((own.masks[c / 32] >> (c % 32)) & 1u) == 0) own.row[c] = 0.0f;
      }
    }
    float* s = shared.s + i * width;
    std::fill(s, s + width, 0.0f);
    for (int64_t r = 0; r < p.rank; ++r) {
      const float value = dot(own.row, p.a, r, k) * p.keep_scale;
      write_any(p.dtype, p.s, i * p.lds + r, value);
      s[r] = value * p.scaling;
    }
  }
}

inline void multiply_rows(const FwdParams& p, const VectorShared& shared, const VectorOwn& own,
                          const VectorRows& weight, Span rows) {
  const int64_t width = shared.rank_vectors * kLanes, ldx = shared.groups * kColumns;
  const int64_t scales = VectorRows::scratch_floats(*p.weight);
  constexpr int64_t kRowStride = kBlockGroups * kColumns, kFactorStride = kBlockGroups * kLanes;
  for (int64_t n0 = rows.begin; n0 < rows.end; n0 += kPanelRows) {
    const int64_t n = std::min(kPanelRows, rows.end - n0);
    read_b(p, n0, n, width, own.b);
    CodeRow code_rows[kPanelRows];
    for (int64_t i = 0; i < n; ++i) code_rows[i] = weight.row(n0 + i, own.scales + i * scales);
    for (int64_t m0 = 0; m0 < p.m; m0 += kChunkRows) {
      const int64_t m = std::min(kChunkRows, p.m - m0);
      std::fill(own.sums, own.sums + n * m * kLanes, 0.0f);
      for (int64_t g0 = 0; g0 < shared.groups; g0 += kBlockGroups) {
        const int64_t groups = std::min(kBlockGroups, shared.groups - g0);
        for (int64_t i = 0; i < n; ++i) {
          for (int64_t g = 0; g < groups; ++g) {
            weight.group(n0 + i, code_rows[i], g0 + g, own.values + i * kRowStride + g * kColumns,
                         own.factors + i * kFactorStride + g * kLanes);
          }
        }
        for (int64_t j = 0; j < m; j += kInputBlock) {
          const int inputs = static_cast<int>(std::min<int64_t>(kInputBlock, m - j));
          const float* x = shared.x + (m0 + j) * ldx + g0 * kColumns;
          for (int64_t i = 0; i < n; i += kRowBlock) {
            const float* values = own.values + i * kRowStride;
            const float* factors = own.factors + i * kFactorStride;
            float* sums = own.sums + (i * m + j) * kLanes;
            const int64_t ld = m * kLanes;
            if (n - i == 1) {
              add_dots_for<1>(inputs, values, factors, kRowStride, kFactorStride, x, ldx, groups,
                              sums, ld);
            } else if (n - i == 2 || kRowBlock == 2) {
              add_dots_for<2>(inputs, values, factors, kRowStride, kFactorStride, x, ldx, groups,
                              sums, ld);
            } else {
              add_dots_for<kRowBlock>(inputs, values, factors, kRowStride, kFactorStride, x, ldx,
                                      groups, sums, ld);
            }
          }
        }
      }
      for (int64_t j = 0; j < m; ++j) {
        for (int64_t i = 0; i < n; ++i) {
          finish(p, shared, weight.factor(), own.b + i * width, own.sums + (i * m + j) * kLanes,
                 m0 + j, n0 + i);
        }
      }
    }
  }
}

void vector_fwd(const FwdParams& p, int phase, int thread, int threads, void* shared_memory,
                void* own_memory) {
  const VectorShared shared(p, shared_memory);
  const VectorOwn own(p, own_memory);
  if (phase == 0) {
    widen_inputs(p, shared, own, thread, threads);
  } else if (phase == 1) {
    if (p.rank > 0) shrink_rows(p, shared, own, thread, threads);
  } else {
    const VectorRows weight(*p.weight);
    const Span rows = share(p.weight->n, thread, threads);
    if (p.m <= kFewInputs && weight.codes() != Codes::kDecoded) {
      multiply_few(p, shared, own, weight, rows);
    } else {
      multiply_rows(p, shared, own, weight, rows);
    }
  }
}

Job<FwdParams> vector_fwd_job() {
  return {3, [](const FwdParams& p) { return VectorShared(p, nullptr).bytes; },
          [](const FwdParams& p) { return VectorOwn(p, nullptr).bytes; }, vector_fwd};
}

}  // namespace
}  // namespace lora_kernels::quant_linear
