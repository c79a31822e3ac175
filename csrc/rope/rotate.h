// The kernel of a range of positions, written once and compiled once per instruction set (LK_LANES).
#pragma once

#include <cstring>

#include "../common/vector_math.h"
#include "rope.h"

namespace lora_kernels::rope {
namespace {

// Keeps the compiler from contracting a product with the sum that follows.
inline Vec rounded(Vec v) {
#if defined(__x86_64__) && defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#endif
  return v;
}

// A whole vector, widened by one instruction where there is one.
template <class T>
inline Vec wide(const T* p) {
  return load(p);
}
#if LK_LANES == 16 && defined(__AVX512F__)
inline Vec wide(const bf16* p) {
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
}
#elif LK_LANES == 8 && defined(__AVX2__)
inline Vec wide(const bf16* p) {
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16);
}
#endif

template <class T>
inline Vec load_some(const T* p, int64_t count) {
  if (count >= LK_LANES) return load(p);
  Vec v{};
  for (int64_t l = 0; l < count; ++l) v[l] = to_float(p[l]);
  return v;
}
template <class T>
inline void store_some(T* p, Vec v, int64_t count) {
  if (count >= LK_LANES) return store_vec(p, v);
  for (int64_t l = 0; l < count; ++l) from_float(v[l], p[l]);
}

template <class T>
void widen(const T* p, int64_t stride, int64_t count, float* out) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; i += LK_LANES) {
      store_some(out + i, load_some(p + i, count - i), count - i);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(p[i * stride]);
  }
}

// The row of a table in fp32: where it lies, or in `scratch`.
inline const float* row_of(const Table& t, int64_t at, int64_t count, float* scratch) {
  switch (t.dtype) {
    case TableDtype::kFloat32: {
      const float* p = static_cast<const float*>(t.data) + at;
      if (t.channel == 1) return p;
      widen(p, t.channel, count, scratch);
      break;
    }
    case TableDtype::kBFloat16:
      widen(static_cast<const bf16*>(t.data) + at, t.channel, count, scratch);
      break;
    case TableDtype::kFloat16:
      widen(static_cast<const fp16*>(t.data) + at, t.channel, count, scratch);
      break;
    case TableDtype::kFloat64: {
      const double* p = static_cast<const double*>(t.data) + at;
      for (int64_t i = 0; i < count; ++i) scratch[i] = static_cast<float>(p[i * t.channel]);
      break;
    }
  }
  return scratch;
}

// `count` of a vector's channels; kWhole: all, without a branch.
template <bool kWhole, class T>
inline Vec read(const T* p, int64_t count) {
  if constexpr (kWhole) return wide(p);
  return load_some(p, count);
}
template <bool kWhole, class T>
inline void write(T* p, Vec v, int64_t count) {
  if constexpr (kWhole) return store_vec(p, v);
  store_some(p, v, count);
}

// Channel i with i + half.
template <bool kWhole, bool kInverse, class T>
inline void half_rotated(const T* x, T* y, const float* c, const float* s, int64_t half,
                         int64_t count) {
  const Vec x1 = read<kWhole>(x, count), x2 = read<kWhole>(x + half, count);
  const Vec c1 = read<kWhole>(c, count), c2 = read<kWhole>(c + half, count);
  const Vec s1 = read<kWhole>(s, count), s2 = read<kWhole>(s + half, count);
  const Vec own1 = rounded(x1 * c1), own2 = rounded(x2 * c2);
  const Vec y1 = kInverse ? own1 + rounded(x2 * s2) : own1 - rounded(x2 * s1);
  const Vec y2 = kInverse ? own2 - rounded(x1 * s1) : own2 + rounded(x1 * s2);
  write<kWhole>(y, y1, count);
  write<kWhole>(y + half, y2, count);
}

// Channel 2 i with 2 i + 1: a vector holds whole pairs.
template <bool kWhole, bool kInverse, class T>
inline void interleaved(const T* x, T* y, const float* c, const float* s, int64_t count) {
  IVec beside, even;
  for (int l = 0; l < LK_LANES; ++l) {
    beside[l] = l ^ 1;
    even[l] = l % 2 == 0 ? INT32_MIN : 0;  // the sign
  }
  const Vec v = read<kWhole>(x, count);
  const Vec cosines = read<kWhole>(c, count), sines = read<kWhole>(s, count);
  const Vec own = rounded(v * cosines);
  if constexpr (kInverse) {
    const Vec other = __builtin_shuffle(rounded(v * sines), beside);
    write<kWhole>(y, own - (Vec)((IVec)other ^ even), count);
  } else {
    const Vec other = rounded(__builtin_shuffle(v, beside) * sines);
    write<kWhole>(y, own + (Vec)((IVec)other ^ even), count);
  }
}

template <class T, bool kInterleaved, bool kInverse>
inline void rotate_head(const T* x, T* y, const float* c, const float* s, int64_t channels) {
  const int64_t half = channels / 2, end = kInterleaved ? channels : half;
  int64_t i = 0;
  for (; i + LK_LANES <= end; i += LK_LANES) {
    if constexpr (kInterleaved) {
      interleaved<true, kInverse>(x + i, y + i, c + i, s + i, LK_LANES);
    } else {
      half_rotated<true, kInverse>(x + i, y + i, c + i, s + i, half, LK_LANES);
    }
  }
  if (i == end) return;
  if constexpr (kInterleaved) {
    interleaved<false, kInverse>(x + i, y + i, c + i, s + i, end - i);
  } else {
    half_rotated<false, kInverse>(x + i, y + i, c + i, s + i, half, end - i);
  }
}

template <class T, bool kInterleaved, bool kInverse>
void rotate(const RopeParams& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t rotated = p.rotated, rest = p.channels - rotated;
  for (int64_t place = begin; place < end; ++place) {
    const int64_t b = place / p.positions, n = place % p.positions;
    int64_t row = n;
    if (p.ids != nullptr) {
      const int64_t at = b * p.ids_batch + n * p.ids_row;
      row = p.wide_ids ? static_cast<const int64_t*>(p.ids)[at]
                       : static_cast<const int32_t*>(p.ids)[at];
    }
    const float* c = row_of(p.cos, b * p.cos.batch + row * p.cos.row, rotated, scratch);
    const float* s =
        row_of(p.sin, b * p.sin.batch + row * p.sin.row, rotated, scratch + rotated);
    for (int g = 0; g < p.tensors; ++g) {
      const Heads& heads = p.heads[g];
      const T* x = static_cast<const T*>(heads.x) + b * heads.xb + n * heads.xs;
      T* y = static_cast<T*>(heads.y) + b * heads.yb + n * heads.ys;
      for (int64_t h = 0; h < heads.count; ++h, x += heads.xh, y += heads.yh) {
        rotate_head<T, kInterleaved, kInverse>(x, y, c, s, rotated);
        if (rest > 0 && x != y) {
          std::memcpy(y + rotated, x + rotated, static_cast<size_t>(rest) * sizeof(T));
        }
      }
    }
  }
}

template <class T>
RotateKernel rotate_of(bool is_interleaved, bool inverse) {
  if (is_interleaved) return inverse ? &rotate<T, true, true> : &rotate<T, true, false>;
  return inverse ? &rotate<T, false, true> : &rotate<T, false, false>;
}

RotateKernel rotate_of(Dtype dtype, bool is_interleaved, bool inverse) {
  switch (dtype) {
    case Dtype::kFloat32:
      return rotate_of<float>(is_interleaved, inverse);
    case Dtype::kBFloat16:
      return rotate_of<bf16>(is_interleaved, inverse);
    case Dtype::kFloat16:
      return rotate_of<fp16>(is_interleaved, inverse);
  }
  return nullptr;
}

}  // namespace
}  // namespace lora_kernels::rope
