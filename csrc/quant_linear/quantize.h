// Quantization, in the formats' own order of operations (formats.py): nearest code, ties to the
// lower value; statistics in fp32.
#pragma once

#include <cmath>

#include "decode.h"

namespace lora_kernels::quant_linear {
namespace {

inline float largest(const float* v, int64_t n) {
  float m = 0.0f;
  for (int64_t i = 0; i < n; ++i) m = std::max(m, std::fabs(v[i]));
  return m;
}

template <class T>
void quantize_flat_from(const QuantizeFlatParams& p, int64_t first, int64_t last) {
  constexpr int64_t kPiece = 256;
  const T* w = static_cast<const T*>(p.w);
  float v[kPiece];
  int32_t rank[kPiece];
  for (int64_t b = first; b < last; ++b) {
    const int64_t begin = b * p.block, end = std::min(p.n, begin + p.block);
    float absmax = 0.0f;
    for (int64_t e = begin; e < end; e += kPiece) {
      const int64_t count = std::min(kPiece, end - e);
      widen(w + e, count, v);
      absmax = std::max(absmax, largest(v, count));
    }
    p.absmax[b] = absmax;
    const float limited = std::max(absmax, p.min_absmax), inverse = 1.0f / limited;
    const bool partial = end - begin < p.block;
    for (int64_t e = begin; e < end; e += kPiece) {
      const int64_t count = std::min(kPiece, end - e);
      widen(w + e, count, v);
      if (partial) {
        for (int64_t i = 0; i < count; ++i) v[i] = v[i] / limited;
      } else {
        for (int64_t i = 0; i < count; ++i) v[i] = v[i] * inverse;
      }
      if (count % 2 != 0) v[count] = 0.0f;  // the padding of an odd tail; kPiece is even
      const int64_t even = (count + 1) / 2 * 2;
      for (int64_t i = 0; i < even; ++i) rank[i] = 0;
      for (int j = 0; j < 15; ++j) {
        const float middle = p.midpoint[j];
        for (int64_t i = 0; i < even; ++i) rank[i] += v[i] > middle ? 1 : 0;
      }
      for (int64_t i = 0; i < even; i += 2) {
        p.codes[(e + i) / 2] =
            static_cast<uint8_t>(p.code[rank[i]] << 4 | p.code[rank[i + 1]]);
      }
    }
  }
}

template <class T>
void quantize_rows_from(const QuantizeRowsParams& p, int64_t first, int64_t last) {
  constexpr int64_t kPiece = 256;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, half to even
  float v[kPiece];
  for (int64_t n = first; n < last; ++n) {
    const T* w = static_cast<const T*>(p.w) + n * p.k;
    float scale = 0.0f;
    for (int64_t k = 0; k < p.k; k += kPiece) {
      const int64_t count = std::min(kPiece, p.k - k);
      widen(w + k, count, v);
      scale = std::max(scale, largest(v, count));
    }
    p.scale[n] = scale;
    const float inverse = 1.0f / (scale == 0.0f ? 1.0f : scale);
    const float factor = std::min(inverse * 127.0f, 0x1.fffffep127f);
    for (int64_t k = 0; k < p.k; k += kPiece) {
      const int64_t count = std::min(kPiece, p.k - k);
      widen(w + k, count, v);
      for (int64_t i = 0; i < count; ++i) {
        const float scaled = std::min(127.0f, std::max(-127.0f, v[i] * factor));
        p.codes[n * p.k + k + i] = static_cast<int8_t>((scaled + kRound) - kRound);
      }
    }
  }
}

void quantize_flat(const QuantizeFlatParams& p, int64_t first, int64_t last) {
  switch (p.dtype) {
    case Dtype::kFloat32:
      return quantize_flat_from<float>(p, first, last);
    case Dtype::kBFloat16:
      return quantize_flat_from<bf16>(p, first, last);
    case Dtype::kFloat16:
      return quantize_flat_from<fp16>(p, first, last);
  }
}

void quantize_rows(const QuantizeRowsParams& p, int64_t first, int64_t last) {
  switch (p.dtype) {
    case Dtype::kFloat32:
      return quantize_rows_from<float>(p, first, last);
    case Dtype::kBFloat16:
      return quantize_rows_from<bf16>(p, first, last);
    case Dtype::kFloat16:
      return quantize_rows_from<fp16>(p, first, last);
  }
}

}  // namespace
}  // namespace lora_kernels::quant_linear
