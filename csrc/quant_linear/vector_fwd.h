// Forward in fp32 on vectors of LK_LANES, for every dtype of X.
//
//   Y = X W^T + bias + s S B^T,   S = drop(X) A^T
//
// Dot products with columns in the lanes. A group is 8 vectors of columns; the codes of 4-bit rows
// are read as 32-bit words, one per lane, so vector s of a group holds nibble s of all words, and X
// and A are put into the same order. The products of a group are summed unscaled, then scaled: one
// multiplication by absmax per group and lane. Other layouts are decoded in natural order.
// Phases: (0) X widened and ordered; (1) S; (2) Y, split over rows of W.
// Numerics: fp32 throughout, S too, one rounding at the store; an element of Y is the same sum in
// the same order whatever the number of rows.
#pragma once

#include "../lora_linear/masks.h"
#include "decode.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace lora_kernels::quant_linear {
namespace {

constexpr int64_t kLanes = LK_LANES, kVectors = 8, kColumns = kLanes * kVectors;  // of a group
constexpr int64_t kPanelRows = 24, kBlockGroups = 4, kChunkRows = 128;
constexpr int kRowBlock = LK_LANES == 16 ? 3 : 2, kInputBlock = LK_LANES == 16 ? 4 : 2;

typedef float Vec __attribute__((vector_size(LK_LANES * 4)));
typedef float VecU __attribute__((vector_size(LK_LANES * 4), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const VecU*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<VecU*>(p) = v; }

// out[s][lane] = table[nibble s of word lane], LK_LANES words.
inline void look_up_words(const uint8_t* words, const float* table, float* out) {
#if LK_LANES == 16 && defined(__AVX512F__)
  const __m512 values = _mm512_loadu_ps(table);
  __m512i index = _mm512_loadu_si512(words);
  for (int s = 0; s < kVectors; ++s, index = _mm512_srli_epi32(index, 4)) {
    _mm512_storeu_ps(out + s * kLanes, _mm512_permutexvar_ps(index, values));
  }
#elif LK_LANES == 8 && defined(__AVX2__)
  const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
  __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
  for (int s = 0; s < kVectors; ++s, index = _mm256_srli_epi32(index, 4)) {
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    _mm256_storeu_ps(out + s * kLanes,
                     _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                      _mm256_permutevar8x32_ps(high, index), upper));
  }
#else
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    for (int64_t b = 0; b < 4; ++b) {
      const uint8_t byte = words[4 * lane + b];
      out[2 * b * kLanes + lane] = table[byte & 15];
      out[(2 * b + 1) * kLanes + lane] = table[byte >> 4];
    }
  }
#endif
}

// Rows of W, or of A, as groups.
class VectorRows {
 public:
  explicit VectorRows(const Weight& w) : w_(w) {
    if (w.layout == Layout::kFlat) nibbles_ = w.k % 8 == 0 && w.block % 8 == 0;
    if (w.layout == Layout::kInt4) {
      nibbles_ = w.group_of == nullptr && (w.block % 8 == 0 || w.scale_columns == 1);
    }
  }
  bool nibbles() const { return nibbles_; }

  // Column of lane `lane` of vector s.
  static int64_t column(bool nibbles, int64_t s, int64_t lane) {
    return nibbles ? 8 * lane + (s ^ 1) : s * kLanes + lane;
  }

  // Values [8][kLanes] of group g of row n, and the factors [kLanes] of their sum.
  void group(int64_t n, int64_t g, float* values, float* factors) const {
    const int64_t k0 = g * kColumns, count = std::min(kColumns, w_.k - k0);
    if (!nibbles_) {
      decode(w_, n, k0, count, values);
      std::fill(values + count, values + kColumns, 0.0f);
      std::fill(factors, factors + kLanes, 1.0f);
      return;
    }
    const bool flat = w_.layout == Layout::kFlat;
    const uint8_t* words = w_.codes + (flat ? (n * w_.k + k0) / 2 : n * w_.row_bytes + k0 / 2);
    uint8_t tail[kColumns / 2] = {};
    if (count < kColumns) {
      std::memcpy(tail, words, static_cast<size_t>((count + 1) / 2));
      words = tail;
    }
    if (flat) {
      look_up_words(words, w_.table, values);
    } else {
      static constexpr float kCodes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      look_up_words(words, kCodes, values);
    }
    float zeros[kLanes];
    const int64_t lanes = (count + 7) / 8;
    for (int64_t lane = 0; lane < lanes;) {
      const int64_t k = k0 + 8 * lane;
      int64_t block, stop;
      if (flat) {
        block = (n * w_.k + k) / w_.block;
        stop = (block + 1) * w_.block - n * w_.k;
      } else {
        const int64_t group = w_.scale_columns == 1 ? 0 : k / w_.block;
        block = n * w_.scale_columns + group;
        stop = w_.scale_columns == 1 ? w_.k : (group + 1) * w_.block;
      }
      const int64_t end = std::min(lanes, lane + (stop - k + 7) / 8);
      const float factor = flat ? flat_scale(w_, block) : w_.scale[block];
      const float zero = flat ? 0.0f : w_.zero[block];
      for (; lane < end; ++lane) {
        factors[lane] = factor;
        zeros[lane] = zero;
      }
    }
    std::fill(factors + lanes, factors + kLanes, 0.0f);
    if (!flat) {
      std::fill(zeros + lanes, zeros + kLanes, 0.0f);
      const Vec zero = load(zeros);
      for (int64_t s = 0; s < kVectors; ++s) {
        store(values + s * kLanes, load(values + s * kLanes) - zero);
      }
    }
  }

 private:
  const Weight& w_;
  bool nibbles_ = false;
};

struct VectorShared {
  int64_t groups, rank_vectors;
  bool nibbles;
  float *x, *a, *s;  // [m | rank, groups, 8, kLanes], [m, rank_vectors, kLanes] scaled
  int64_t bytes;

  VectorShared(const FwdParams& p, void* base) {
    nibbles = VectorRows(*p.weight).nibbles();
    groups = round_up(p.weight->k, kColumns) / kColumns;
    rank_vectors = round_up(p.rank, kLanes) / kLanes;
    x = static_cast<float*>(base);
    a = x + p.m * groups * kColumns;
    s = a + p.rank * groups * kColumns;
    bytes = (s - x + p.m * rank_vectors * kLanes) * static_cast<int64_t>(sizeof(float));
  }
};

struct VectorOwn {
  float *values, *factors, *sums, *b, *row, *ones, *shrunk;
  uint32_t* masks;
  int64_t bytes;

  VectorOwn(const FwdParams& p, void* base) {
    int64_t used = 0;
    const auto take = [&](auto*& piece, int64_t count) {
      piece = reinterpret_cast<std::remove_reference_t<decltype(piece)>>(static_cast<char*>(base) +
                                                                         used);
      used += round_up(count * static_cast<int64_t>(sizeof(*piece)), 64);
    };
    const int64_t columns = round_up(p.weight->k, kColumns);
    take(values, kPanelRows * kBlockGroups * kColumns);
    take(factors, kPanelRows * kBlockGroups * kLanes);
    take(sums, kPanelRows * std::min(p.m, kChunkRows) * kLanes);
    take(b, kPanelRows * round_up(p.rank, kLanes));
    take(row, 2 * columns);
    take(ones, p.rank > 0 ? columns / kVectors : 0);
    take(shrunk, p.rank * kLanes);
    take(masks, p.dropout.threshold != 0 ? lora_linear::mask_words(columns) : 0);
    bytes = used;
  }
};

// A row of `columns` elements in the order of the groups, zeros after it.
inline void order_row(const float* row, int64_t columns, bool nibbles, float* out) {
  const int64_t padded = round_up(columns, kColumns);
  if (!nibbles) {
    std::copy(row, row + columns, out);
    std::fill(out + columns, out + padded, 0.0f);
    return;
  }
  for (int64_t k0 = 0; k0 < padded; k0 += kColumns) {
    for (int64_t s = 0; s < kVectors; ++s) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t k = k0 + VectorRows::column(true, s, lane);
        out[k0 + s * kLanes + lane] = k < columns ? row[k] : 0.0f;
      }
    }
  }
}

inline void read_row(Dtype dtype, const void* data, int64_t row, int64_t ld, int64_t columns,
                     float* out) {
  switch (dtype) {
    case Dtype::kFloat32:
      return widen(static_cast<const float*>(data) + row * ld, columns, out);
    case Dtype::kBFloat16:
      return widen(static_cast<const bf16*>(data) + row * ld, columns, out);
    case Dtype::kFloat16:
      return widen(static_cast<const fp16*>(data) + row * ld, columns, out);
  }
}

inline float sum_of(Vec v) {
  float lane[kLanes];
  store(lane, v);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lane[i] = lane[i] + lane[i + half];
  }
  return lane[0];
}

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
    for (int j = 0; j < kInputs; ++j) store(sums + i * ldsums + j * kLanes, total[i][j]);
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
  const Span ranks = share(p.rank, thread, threads);
  for (int64_t r = ranks.begin; r < ranks.end; ++r) {
    read_row(p.a.dtype, p.a.data, r, p.a.ld, k, own.row);
    order_row(own.row, k, shared.nibbles, shared.a + r * shared.groups * kColumns);
  }
}

template <class T>
void write(float v, T* to) {
  from_float(v, *to);
}
inline void write_any(Dtype dtype, void* base, int64_t at, float v) {
  switch (dtype) {
    case Dtype::kFloat32:
      return write(v, static_cast<float*>(base) + at);
    case Dtype::kBFloat16:
      return write(v, static_cast<bf16*>(base) + at);
    case Dtype::kFloat16:
      return write(v, static_cast<fp16*>(base) + at);
  }
}

inline void shrink_rows(const FwdParams& p, const VectorShared& shared, const VectorOwn& own,
                        int thread, int threads) {
  const int64_t k = p.weight->k, padded = shared.groups * kColumns;
  float *plain = own.row, *dropped = own.row + padded;
  std::fill(own.ones, own.ones + shared.groups * kLanes, 1.0f);
  const Span rows = share(p.m, thread, threads);
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const float* x = shared.x + i * padded;
    if (p.dropout.threshold != 0) {
      lora_linear::make_masks(p.dropout, p.row0 + i, 1, k, 0, own.masks);
      read_row(p.dtype, p.x, i, p.ldx, k, plain);
      for (int64_t c = 0; c < k; ++c) {
        if (((own.masks[c / 32] >> (c % 32)) & 1u) == 0) plain[c] = 0.0f;
      }
      order_row(plain, k, shared.nibbles, dropped);
      x = dropped;
    }
    std::fill(own.shrunk, own.shrunk + p.rank * kLanes, 0.0f);
    for (int64_t r = 0; r < p.rank; r += kRowBlock) {
      const float* a = shared.a + r * padded;
      float* sums = own.shrunk + r * kLanes;
      if (p.rank - r >= kRowBlock) {
        add_dots<kRowBlock, 1>(a, own.ones, padded, 0, x, 0, shared.groups, sums, kLanes);
      } else {
        for (int64_t q = 0; q < p.rank - r; ++q) {
          add_dots<1, 1>(a + q * padded, own.ones, padded, 0, x, 0, shared.groups,
                         sums + q * kLanes, kLanes);
        }
      }
    }
    float* s = shared.s + i * shared.rank_vectors * kLanes;
    std::fill(s, s + shared.rank_vectors * kLanes, 0.0f);
    for (int64_t r = 0; r < p.rank; ++r) {
      const float value = sum_of(load(own.shrunk + r * kLanes)) * p.keep_scale;
      write_any(p.dtype, p.s, i * p.lds + r, value);
      s[r] = value * p.scaling;
    }
  }
}

inline void multiply_rows(const FwdParams& p, const VectorShared& shared, const VectorOwn& own,
                          int thread, int threads) {
  const VectorRows weight(*p.weight);
  const int64_t width = shared.rank_vectors * kLanes, ldx = shared.groups * kColumns;
  const Span rows = share(p.weight->n, thread, threads);
  constexpr int64_t kRowStride = kBlockGroups * kColumns, kFactorStride = kBlockGroups * kLanes;
  for (int64_t n0 = rows.begin; n0 < rows.end; n0 += kPanelRows) {
    const int64_t n = std::min(kPanelRows, rows.end - n0);
    for (int64_t i = 0; i < n && p.rank > 0; ++i) {
      read_row(p.b.dtype, p.b.data, n0 + i, p.b.ld, p.rank, own.b + i * width);
      std::fill(own.b + i * width + p.rank, own.b + (i + 1) * width, 0.0f);
    }
    for (int64_t m0 = 0; m0 < p.m; m0 += kChunkRows) {
      const int64_t m = std::min(kChunkRows, p.m - m0);
      std::fill(own.sums, own.sums + n * m * kLanes, 0.0f);
      for (int64_t g0 = 0; g0 < shared.groups; g0 += kBlockGroups) {
        const int64_t groups = std::min(kBlockGroups, shared.groups - g0);
        for (int64_t i = 0; i < n; ++i) {
          for (int64_t g = 0; g < groups; ++g) {
            weight.group(n0 + i, g0 + g, own.values + i * kRowStride + g * kColumns,
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
        const float* s = shared.s + (m0 + j) * width;
        for (int64_t i = 0; i < n; ++i) {
          Vec total = load(own.sums + (i * m + j) * kLanes);
          for (int64_t v = 0; v < width; v += kLanes) {
            total += load(s + v) * load(own.b + i * width + v);
          }
          const float value = sum_of(total) + (p.bias == nullptr ? 0.0f : p.bias[n0 + i]);
          write_any(p.dtype, p.y, (m0 + j) * p.ldy + n0 + i, value);
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
    multiply_rows(p, shared, own, thread, threads);
  }
}

Job<FwdParams> vector_fwd_job() {
  return {3, [](const FwdParams& p) { return VectorShared(p, nullptr).bytes; },
          [](const FwdParams& p) { return VectorOwn(p, nullptr).bytes; }, vector_fwd};
}

}  // namespace
}  // namespace lora_kernels::quant_linear
