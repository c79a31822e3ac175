// Vectors of LK_LANES fp32 values in the compiler's portable vector types, and their loads and
// stores from every element type. The including file sets LK_LANES to what its target holds.
#pragma once

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "dtype.h"

namespace lora_kernels {
namespace {

typedef float Vec __attribute__((vector_size(LK_LANES * 4)));
typedef float VecU __attribute__((vector_size(LK_LANES * 4), aligned(4), may_alias));
typedef uint32_t UVec __attribute__((vector_size(LK_LANES * 4)));
typedef int32_t IVec __attribute__((vector_size(LK_LANES * 4)));
typedef uint16_t HVec __attribute__((vector_size(LK_LANES * 2)));
typedef uint16_t HVecU __attribute__((vector_size(LK_LANES * 2), aligned(2), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const VecU*>(p); }
// gcc 12 makes two halves and an insertion of a conversion in vector types.
inline Vec load(const bf16* p) {
#if LK_LANES == 16 && defined(__AVX512F__)
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
#elif LK_LANES == 8 && defined(__AVX2__)
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16);
#else
  const HVec h = *reinterpret_cast<const HVecU*>(p);
  return (Vec)(__builtin_convertvector(h, UVec) << 16);
#endif
}
inline Vec load(const fp16* p) {
#if LK_LANES == 16 && defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif LK_LANES == 8 && defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec v;
  for (int l = 0; l < LK_LANES; ++l) v[l] = to_float(p[l]);
  return v;
#endif
}
inline void store_vec(float* p, Vec v) { *reinterpret_cast<VecU*>(p) = v; }

// Past the cache; p is aligned to the vector.
inline void stream_vec(float* p, Vec v) {
#if LK_LANES == 16 && defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif LK_LANES == 8 && defined(__AVX__)
  _mm256_stream_ps(p, (__m256)v);
#else
  store_vec(p, v);
#endif
}

// All-ones lanes where bit (first + lane) of `bits` is set.
inline IVec lanes_of(uint32_t bits, int first) {
  IVec lane;
  for (int l = 0; l < LK_LANES; ++l) lane[l] = l;
  const UVec spread = (bits >> first) - UVec{};
  return -(IVec)((spread >> (UVec)lane) & 1u);
}
inline Vec select(IVec keep, Vec v) { return (Vec)((IVec)v & keep); }

inline void store_vec(bf16* p, Vec v) {
  const UVec u = (UVec)v;
  const UVec rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const UVec quiet = (u >> 16) | 0x40u;
  const UVec nan = (UVec)((u & 0x7fffffffu) > 0x7f800000u);
  const UVec bits = (quiet & nan) | (rounded & ~nan);
#if LK_LANES == 16 && defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)bits));
#else
  *reinterpret_cast<HVecU*>(p) = __builtin_convertvector(bits, HVec);
#endif
}
inline void store_vec(fp16* p, Vec v) {
#if LK_LANES == 16 && defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif LK_LANES == 8 && defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int l = 0; l < LK_LANES; ++l) from_float(v[l], p[l]);
#endif
}

}  // namespace
}  // namespace lora_kernels
