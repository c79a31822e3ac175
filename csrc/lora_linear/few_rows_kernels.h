// few_rows.h for one instruction set; the including file sets LK_LANES.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../common/vector.h"
#include "few_rows.h"

namespace lora_kernels::lora_linear {
namespace {

constexpr int64_t kLanes = LK_LANES;

template <class T>
inline Vec load_head(const T* p, int64_t count) {
  T padded[kLanes] = {};
  for (int64_t l = 0; l < count; ++l) padded[l] = p[l];
  return load(padded);
}

inline float lane_sum(Vec v) {
  float sum = 0.0f;
  for (int l = 0; l < kLanes; ++l) sum += v[l];
  return sum;
}

constexpr int kParts = 2;  // chains of additions of one sum, the same for every problem

// Rows of the matrix that share the loads of x, as many as there are registers for their sums.
constexpr int rows_beside(int inputs) {
  return inputs == 1 ? 4 : inputs == 2 ? (LK_LANES == 16 ? 4 : 2) : (LK_LANES == 16 ? 2 : 1);
}

// out[i * kInputs + j] = rows[i] . x[j] over k; x is fp32, padded with zeros to whole vectors. Rows
// are too short for the machine's own prefetching: those `ahead` elements further are asked for.
template <int kRows, int kInputs, class T>
inline void dots(const T* const* rows, int64_t ahead, const float* x, int64_t ldx, int64_t k,
                 float* out) {
  Vec sum[kParts][kRows][kInputs] = {};
  int64_t at = 0;
  for (; at + kParts * kLanes <= k; at += kParts * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      for (int64_t line = 0; line < static_cast<int64_t>(kParts * kLanes * sizeof(T)); line += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(rows[i] + ahead + at) + line);
      }
    }
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const Vec w = load(rows[i] + at + part * kLanes);
#pragma GCC unroll 4
        for (int j = 0; j < kInputs; ++j) {
          sum[part][i][j] += w * load(x + j * ldx + at + part * kLanes);
        }
      }
    }
  }
  for (; at < k; at += kLanes) {
    for (int i = 0; i < kRows; ++i) {
      const Vec w = at + kLanes <= k ? load(rows[i] + at) : load_head(rows[i] + at, k - at);
      for (int j = 0; j < kInputs; ++j) sum[0][i][j] += w * load(x + j * ldx + at);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kInputs; ++j) {
      out[i * kInputs + j] = lane_sum(sum[0][i][j] + sum[1][i][j]);
    }
  }
}

// out [rows, m] of `count` rows of a matrix.
template <int kInputs, class T>
void dots_of(const T* matrix, int64_t ld, int64_t count, const float* x, int64_t ldx, int64_t k,
             float* out) {
  constexpr int kRows = rows_beside(kInputs);
  int64_t i = 0;
  for (; i + kRows <= count; i += kRows) {
    const T* rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = matrix + (i + r) * ld;
    dots<kRows, kInputs>(rows, kRows * ld, x, ldx, k, out + i * kInputs);
  }
  for (; i < count; ++i) {
    const T* rows[1] = {matrix + i * ld};
    dots<1, kInputs>(rows, ld, x, ldx, k, out + i * kInputs);
  }
}

template <class T>
void dots_of(int64_t inputs, const T* matrix, int64_t ld, int64_t count, const float* x,
             int64_t ldx, int64_t k, float* out) {
  switch (inputs) {
    case 1:
      return dots_of<1>(matrix, ld, count, x, ldx, k, out);
    case 2:
      return dots_of<2>(matrix, ld, count, x, ldx, k, out);
    case 3:
      return dots_of<3>(matrix, ld, count, x, ldx, k, out);
    default:
      return dots_of<4>(matrix, ld, count, x, ldx, k, out);
  }
}

constexpr int64_t kBlock = 64;  // columns whose sums are held before they are stored

template <class T>
struct FewKernels {
  static int64_t padded(int64_t k) { return (k + kLanes - 1) / kLanes * kLanes; }

  // X in fp32 [m, padded K], S in fp32 [m, padded ranks of each member], sums.
  static int64_t ranks_padded(const FewParams& p) {
    int64_t sum = 0;
    for (int g = 0; g < p.members; ++g) sum += padded(p.member[g].rank);
    return sum;
  }
  static int64_t workspace(const FewParams& p) {
    int64_t most = kBlock;
    for (int g = 0; g < p.members; ++g) most = std::max(most, p.member[g].rank);
    return 4 * (p.m * (padded(p.k) + ranks_padded(p)) + 2 * kFewRows * most);
  }

  static void shrink(const FewParams& p, const FewMember& w, const float* x, float* sums) {
    const int64_t ldx = padded(p.k);
    if (w.a_dtype == Dtype::kFloat32) {
      dots_of(p.m, static_cast<const float*>(w.a), w.lda, w.rank, x, ldx, p.k, sums);
    } else {
      dots_of(p.m, static_cast<const T*>(w.a), w.lda, w.rank, x, ldx, p.k, sums);
    }
  }

  static void expand(const FewParams& p, const FewMember& w, int64_t first, int64_t count,
                     const float* s, int64_t lds, float* sums) {
    if (w.b_dtype == Dtype::kFloat32) {
      dots_of(p.m, static_cast<const float*>(w.b) + first * w.ldb, w.ldb, count, s, lds, w.rank,
              sums);
    } else {
      dots_of(p.m, static_cast<const T*>(w.b) + first * w.ldb, w.ldb, count, s, lds, w.rank, sums);
    }
  }

  static void fwd(const FewParams& p, int64_t begin, int64_t end, void* workspace) {
    const int64_t m = p.m, ldx = padded(p.k), lds = ranks_padded(p);
    float* x = static_cast<float*>(workspace);
    float* s = x + m * ldx;
    float* sums = s + m * lds;
    for (int64_t j = 0; j < m; ++j) {
      const T* row = static_cast<const T*>(p.x) + j * p.ldx;
      float* out = x + j * ldx;
      int64_t at = 0;
      for (; at + kLanes <= p.k; at += kLanes) store_vec(out + at, load(row + at));
      if (at < p.k) store_vec(out + at, load_head(row + at, p.k - at));
    }
    std::fill(s, s + m * lds, 0.0f);
    int64_t column = 0, s_at = 0;
    for (int g = 0; g < p.members; ++g) {
      const FewMember& w = p.member[g];
      const int64_t from = std::max<int64_t>(begin - column, 0), to = std::min(end - column, w.n);
      if (w.rank > 0 && (from < to || begin == 0)) {
        if (p.given_s == nullptr) shrink(p, w, x, sums);
        for (int64_t j = 0; j < m; ++j) {
          for (int64_t r = 0; r < w.rank; ++r) {
            T rounded;
            if (p.given_s == nullptr) {
              from_float(sums[r * m + j], rounded);
            } else {
              rounded = static_cast<const T*>(p.given_s)[j * p.lds + w.s_column + r];
            }
            s[j * lds + s_at + r] = to_float(rounded);
            if (begin == 0 && p.s != nullptr) {
              static_cast<T*>(p.s)[j * p.ranks + w.s_column + r] = rounded;
            }
          }
        }
      }
      for (int64_t n0 = from; n0 < to; n0 += kBlock) {
        columns(p, w, n0, std::min(kBlock, to - n0), x, s + s_at, lds, sums);
      }
      column += w.n;
      s_at += padded(w.rank);
    }
  }

  static void columns(const FewParams& p, const FewMember& w, int64_t n0, int64_t count,
                      const float* x, const float* s, int64_t lds, float* sums) {
    const int64_t m = p.m;
    float* updates = sums + kFewRows * kBlock;
    dots_of(m, static_cast<const T*>(w.w) + n0 * w.ldw, w.ldw, count, x, padded(p.k), p.k, sums);
    if (w.rank > 0) {
      expand(p, w, n0, count, s, lds, updates);
    } else {
      std::fill(updates, updates + m * count, 0.0f);
    }
    for (int64_t j = 0; j < m; ++j) {
      T* y = static_cast<T*>(w.y) + j * w.n + n0;
      for (int64_t i = 0; i < count; ++i) {
        float value = sums[i * m + j] + w.scaling * updates[i * m + j];
        if (w.bias != nullptr) value += w.bias[n0 + i];
        from_float(value, y[i]);
      }
    }
  }
};

const FewRows* few_rows_of(Dtype dtype) {
  static const FewRows f32{FewKernels<float>::workspace, FewKernels<float>::fwd};
  static const FewRows bfloat{FewKernels<bf16>::workspace, FewKernels<bf16>::fwd};
  static const FewRows half{FewKernels<fp16>::workspace, FewKernels<fp16>::fwd};
  return dtype == Dtype::kFloat32 ? &f32 : dtype == Dtype::kBFloat16 ? &bfloat : &half;
}

}  // namespace
}  // namespace lora_kernels::lora_linear
