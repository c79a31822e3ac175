// Operands and workspace of the forward on vectors, and the way of a sum to Y.
#pragma once

#include "../lora_linear/masks.h"
#include "vector_codes.h"

namespace lora_kernels::quant_linear {
namespace {

constexpr int64_t kPanelRows = 24, kBlockGroups = 4, kChunkRows = 128;
constexpr int kRowBlock = LK_LANES == 16 ? 3 : 2, kInputBlock = LK_LANES == 16 ? 4 : 2;

struct VectorShared {
  int64_t groups, rank_vectors;
  bool nibbles;
  float *x, *s;  // [m, groups, 8, kLanes], [m, rank_vectors, kLanes] scaled
  int64_t bytes;

  VectorShared(const FwdParams& p, void* base) {
    nibbles = VectorRows(*p.weight).nibbles();
    groups = round_up(p.weight->k, kColumns) / kColumns;
    rank_vectors = round_up(p.rank, kLanes) / kLanes;
    x = static_cast<float*>(base);
    s = x + p.m * groups * kColumns;
    bytes = (s - x + p.m * rank_vectors * kLanes) * static_cast<int64_t>(sizeof(float));
  }
};

struct VectorOwn {
  float *values, *factors, *scales, *sums, *b, *row;
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
    take(scales, kPanelRows * VectorRows::scratch_floats(*p.weight));
    take(factors, kPanelRows * kBlockGroups * kLanes);
    take(sums, kPanelRows * std::min(p.m, kChunkRows) * kLanes);
    take(b, kPanelRows * round_up(p.rank, kLanes));
    take(row, columns);
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
  store_vec(lane, v);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lane[i] = lane[i] + lane[i + half];
  }
  return lane[0];
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

// Y[row, n] from the sums of its lanes; b: row n of B, whole vectors. Not inlined, so that its
// arithmetic is one for every number of rows.
__attribute__((noinline)) inline void finish(const FwdParams& p, const VectorShared& shared,
                                             float factor, const float* b, const float* sums,
                                             int64_t row, int64_t n) {
  const int64_t width = shared.rank_vectors * kLanes;
  const float* s = shared.s + row * width;
  Vec total = load(sums) * splat(factor);
  for (int64_t v = 0; v < width; v += kLanes) total += load(s + v) * load(b + v);
  const float value = sum_of(total) + (p.bias == nullptr ? 0.0f : p.bias[n]);
  write_any(p.dtype, p.y, row * p.ldy + n, value);
}

inline void read_b(const FwdParams& p, int64_t n0, int64_t rows, int64_t width, float* b) {
  for (int64_t i = 0; i < rows && p.rank > 0; ++i) {
    read_row(p.b.dtype, p.b.data, n0 + i, p.b.ld, p.rank, b + i * width);
    std::fill(b + i * width + p.rank, b + (i + 1) * width, 0.0f);
  }
}

}  // namespace
}  // namespace lora_kernels::quant_linear
