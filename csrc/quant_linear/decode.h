// Rows of a quantized weight to fp32, bf16 or fp16, in the formats' own order of operations: every
// product is rounded, one last rounding to the result's type.
#pragma once

// GCC 12 takes the undefined operand of its own intrinsics for a variable that is not set.
#pragma GCC diagnostic ignored "-Wuninitialized"

#include <algorithm>
#include <type_traits>

#if defined(__SSSE3__)
#include <immintrin.h>
#endif

#include "quant_linear.h"

namespace lora_kernels::quant_linear {
namespace {

struct Span {
  int64_t begin, end;
};
inline Span share(int64_t count, int part, int parts) {
  return {count * part / parts, count * (part + 1) / parts};
}
inline int64_t round_up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }

// A product that is not to be fused with the sum that follows it.
inline float rounded(float v) {
#if defined(__x86_64__)
  asm("" : "+x"(v));
#else
  asm("" : "+m"(v));
#endif
  return v;
}

inline float flat_scale(const Weight& w, int64_t block) {
  if (w.scale != nullptr) return w.scale[block];
  return rounded(w.nested_map[w.scale_codes[block]] * w.nested_scale[block / w.nested_block]) +
         w.nested_offset;
}

// out[i] = scale of block first + i.
inline void flat_scales(const Weight& w, int64_t first, int64_t count, float* out) {
  int64_t i = 0;
#if defined(__AVX512F__)
  if (w.scale == nullptr && w.nested_block % 16 == 0) {
    const __m512 offset = _mm512_set1_ps(w.nested_offset);
    while (i < count && (first + i) % 16 != 0) {
      out[i] = flat_scale(w, first + i);
      ++i;
    }
    for (; i + 16 <= count; i += 16) {
      const __m512i code = _mm512_cvtepu8_epi32(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.scale_codes + first + i)));
      __m512 v = _mm512_mul_ps(_mm512_i32gather_ps(code, w.nested_map, 4),
                               _mm512_set1_ps(w.nested_scale[(first + i) / w.nested_block]));
      asm("" : "+v"(v));
      _mm512_storeu_ps(out + i, _mm512_add_ps(v, offset));
    }
  }
#endif
  for (; i < count; ++i) out[i] = flat_scale(w, first + i);
}

inline void narrow(const float* in, int64_t n, float* out) { std::copy(in, in + n, out); }
inline void narrow(const float* in, int64_t n, bf16* out) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t u = float_to_bits(in[i]);
    const uint32_t even = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    out[i].bits = static_cast<uint16_t>(nan ? (u >> 16) | 0x40u : even);
  }
}
inline void narrow(const float* in, int64_t n, fp16* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + i), 0));
  }
#endif
  for (; i < n; ++i) from_float(in[i], out[i]);
}

inline void widen(const float* in, int64_t n, float* out) { std::copy(in, in + n, out); }
inline void widen(const bf16* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(in[i]);
}
inline void widen(const fp16* in, int64_t n, float* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(
                                  _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  }
#endif
  for (; i < n; ++i) out[i] = to_float(in[i]);
}

// out[i] = table[nibble i], high nibbles first.
template <class T>
inline void look_up(const uint8_t* codes, int64_t count, const T* table, T* out, bool stream) {
  int64_t i = 0;
#if defined(__AVX512BW__)
  if constexpr (sizeof(T) == 2) {
    const __m512i values =
        _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)));
    const bool past = stream && reinterpret_cast<uintptr_t>(out) % 64 == 0;
    for (; i + 32 <= count; i += 32) {
      const __m512i pair =
          _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2)));
      const __m512i index =
          _mm512_or_si512(_mm512_srli_epi32(pair, 4), _mm512_slli_epi32(pair, 16));
      const __m512i v = _mm512_permutexvar_epi16(index, values);  // bit 4 picks an equal half
      if (past) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), v);
      } else {
        _mm512_storeu_si512(out + i, v);
      }
    }
  } else {
    const __m512 values = _mm512_loadu_ps(table);
    const bool past = stream && reinterpret_cast<uintptr_t>(out) % 64 == 0;
    for (; i + 16 <= count; i += 16) {
      const __m512i pair =
          _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i / 2)));
      const __m512i index =
          _mm512_or_si512(_mm512_srli_epi64(pair, 4), _mm512_slli_epi64(pair, 32));
      const __m512 v = _mm512_permutexvar_ps(index, values);
      if (past) {
        _mm512_stream_ps(out + i, v);
      } else {
        _mm512_storeu_ps(out + i, v);
      }
    }
  }
#elif defined(__AVX2__)
  (void)stream;
  if constexpr (sizeof(T) == 2) {
    const __m128i even = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m128i odd = _mm_setr_epi8(1, 3, 5, 7, 9, 11, 13, 15, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 8));
    const __m128i low =
        _mm_unpacklo_epi64(_mm_shuffle_epi8(first, even), _mm_shuffle_epi8(second, even));
    const __m128i high =
        _mm_unpacklo_epi64(_mm_shuffle_epi8(first, odd), _mm_shuffle_epi8(second, odd));
    const __m128i nibble = _mm_set1_epi8(15);
    for (; i + 32 <= count; i += 32) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2));
      const __m128i e = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble);
      const __m128i o = _mm_and_si128(bytes, nibble);
      const __m128i index[2] = {_mm_unpacklo_epi8(e, o), _mm_unpackhi_epi8(e, o)};
      for (int h = 0; h < 2; ++h) {
        const __m128i l = _mm_shuffle_epi8(low, index[h]), u = _mm_shuffle_epi8(high, index[h]);
        auto* to = reinterpret_cast<__m128i*>(out + i + 16 * h);
        _mm_storeu_si128(to, _mm_unpacklo_epi8(l, u));
        _mm_storeu_si128(to + 1, _mm_unpackhi_epi8(l, u));
      }
    }
  } else {
    const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
    for (; i + 8 <= count; i += 8) {
      int32_t four;
      std::memcpy(&four, codes + i / 2, 4);
      const __m256i pair = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
      const __m256i index =
          _mm256_or_si256(_mm256_srli_epi64(pair, 4), _mm256_slli_epi64(pair, 32));
      const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
      _mm256_storeu_ps(out + i, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                                 _mm256_permutevar8x32_ps(high, index), upper));
    }
  }
#else
  (void)stream;
#endif
  for (; i + 2 <= count; i += 2) {
    const uint8_t byte = codes[i / 2];
    out[i] = table[byte >> 4];
    out[i + 1] = table[byte & 15];
  }
  if (i < count) out[i] = table[codes[i / 2] >> 4];
}

// Elements [first, first + count) of a run of nibbles that starts with element 0 at `codes`.
template <class T>
inline void look_up_at(const uint8_t* codes, int64_t first, int64_t count, const float* scaled,
                       T* out, bool stream) {
  T table[16];
  narrow(scaled, 16, table);
  if (first % 2 != 0 && count > 0) {
    *out++ = table[codes[first / 2] & 15];
    ++first;
    --count;
  }
  look_up(codes + first / 2, count, table, out, stream);
}

#if defined(__AVX512BW__)
// Rounded to nearest even, subnormals kept; NaN stays NaN.
inline __m256i narrow_lanes(__m512 v, bf16) {
  const __m512i u = _mm512_castps_si512(v), one = _mm512_set1_epi32(1);
  const __m512i upper = _mm512_srli_epi32(u, 16);
  const __m512i round = _mm512_add_epi32(_mm512_and_si512(upper, one), _mm512_set1_epi32(0x7fff));
  const __m512i even = _mm512_srli_epi32(_mm512_add_epi32(u, round), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_or_epi32(even, nan, upper, _mm512_set1_epi32(0x40)));
}
inline __m256i narrow_lanes(__m512 v, fp16) { return _mm512_cvtps_ph(v, 0); }

// `blocks` whole blocks of 32 m elements at `codes`, to 16-bit results.
template <class T>
inline void decode_blocks(const float* table, const float* scales, int64_t blocks, int64_t block,
                          const uint8_t* codes, T* out, bool stream) {
  const __m512 codebook = _mm512_loadu_ps(table);
  stream = stream && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const __m512i values = _mm512_broadcast_i64x4(
        narrow_lanes(_mm512_mul_ps(codebook, _mm512_set1_ps(scales[b])), T{}));
    for (int64_t i = 0; i < block; i += 32, codes += 16, out += 32) {
      const __m512i pair =
          _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
      const __m512i index =
          _mm512_or_si512(_mm512_srli_epi32(pair, 4), _mm512_slli_epi32(pair, 16));
      const __m512i v = _mm512_permutexvar_epi16(index, values);  // bit 4 picks an equal half
      if (stream) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(out), v);
      } else {
        _mm512_storeu_si512(out, v);
      }
    }
  }
}
#endif

// Without a subnormal operand, which would cost a microcode assist, and without a branch.
inline float fp8_to_float(uint8_t code) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x80u) << 24, magnitude = code & 0x7fu;
  const float normal = bits_to_float((magnitude << 20) + (120u << 23));
  const float small = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9f;
  const uint32_t value = float_to_bits(magnitude < 8u ? small : normal);
  return bits_to_float((magnitude == 0x7fu ? 0x7fc00000u : value) | sign);
}
#if defined(__AVX512F__)
inline __m512 fp8_lanes(__m128i codes) {
  const __m512i code = _mm512_cvtepu8_epi32(codes), sign = _mm512_set1_epi32(0x80);
  const __m512i magnitude = _mm512_andnot_si512(sign, code);
  const __m512i shifted = _mm512_slli_epi32(magnitude, 20);
  const __m512 normal =
      _mm512_castsi512_ps(_mm512_add_epi32(shifted, _mm512_set1_epi32(120 << 23)));
  const __mmask16 small = _mm512_cmplt_epu32_mask(magnitude, _mm512_set1_epi32(8));
  const __m512 v = _mm512_mask_mul_ps(normal, small, _mm512_cvtepi32_ps(magnitude),
                                      _mm512_set1_ps(0x1p-9f));
  const __mmask16 nan = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7f));
  const __m512i bits =
      _mm512_mask_mov_epi32(_mm512_castps_si512(v), nan, _mm512_set1_epi32(0x7fc00000));
  constexpr int kOrAnd = 0xf8;  // a | (b & c)
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
      bits, _mm512_slli_epi32(code, 24), _mm512_set1_epi32(static_cast<int>(0x80000000u)), kOrAnd));
}
#endif

// Elements [begin, end) of the flattened W, kFlat.
template <class T>
void decode_flat(const Weight& w, int64_t begin, int64_t end, T* out, bool stream) {
  constexpr int64_t kScales = 128;
  float scales[kScales];
  int64_t ready = 0, first = 0;
  while (begin < end) {
    const int64_t block = begin / w.block, stop = std::min(end, (block + 1) * w.block);
    if (block >= first + ready) {
      first = block;
      ready = std::min<int64_t>(kScales, (end - 1) / w.block - block + 1);
      flat_scales(w, first, ready, scales);
    }
#if defined(__AVX512BW__)
    if constexpr (sizeof(T) == 2) {
      const int64_t whole = begin % w.block == 0 && w.block % 32 == 0
                                ? std::min(first + ready - block, (end - begin) / w.block)
                                : 0;
      if (whole > 0) {
        decode_blocks(w.table, scales + (block - first), whole, w.block, w.codes + begin / 2, out,
                      stream);
        out += whole * w.block;
        begin += whole * w.block;
        continue;
      }
    }
#endif
    float scaled[16];
    for (int i = 0; i < 16; ++i) scaled[i] = w.table[i] * scales[block - first];
    look_up_at(w.codes, begin, stop - begin, scaled, out, stream);
    out += stop - begin;
    begin = stop;
  }
}

// Columns [k0, k0 + count) of row n.
template <class T>
void decode(const Weight& w, int64_t n, int64_t k0, int64_t count, T* out, bool stream = false) {
  if (w.layout == Layout::kFlat) {
    decode_flat(w, n * w.k + k0, n * w.k + k0 + count, out, stream);
    return;
  }
  constexpr int64_t kPiece = 256;
  float wide[kPiece];
  const int64_t end = k0 + count;
  while (k0 < end) {
    int64_t stop = std::min(end, k0 + kPiece);
    if (w.layout == Layout::kInt8) {
      const auto* q = reinterpret_cast<const int8_t*>(w.codes) + n * w.k;
      const float scale = w.scale[n], factor = w.factor;
      for (int64_t k = k0; k < stop; ++k) {
        wide[k - k0] = (static_cast<float>(q[k]) * scale) * factor;
      }
    } else if (w.layout == Layout::kFp8) {
      stop = std::min(stop, (k0 / w.block + 1) * w.block);
      const float scale = w.scale[n / w.block_rows * w.scale_columns + k0 / w.block];
      for (int64_t k = k0; k < stop; ++k) {
        wide[k - k0] = fp8_to_float(w.codes[n * w.k + k]) * scale;
      }
    } else {
      const uint8_t* codes = w.codes + n * w.row_bytes;
      const float* scale = w.scale + n * w.scale_columns;
      const float* zero = w.zero + n * w.scale_columns;
      if (w.group_of == nullptr) {
        const int64_t g = k0 / w.block;
        stop = std::min(end, (g + 1) * w.block);
        float scaled[16];
        for (int i = 0; i < 16; ++i) scaled[i] = (static_cast<float>(i) - zero[g]) * scale[g];
        look_up_at(codes, k0, stop - k0, scaled, out, stream);
        out += stop - k0;
        k0 = stop;
        continue;
      }
      int64_t k = k0;
#if defined(__AVX512F__)
      for (; w.position != nullptr && k + 16 <= stop; k += 16) {
        const __m512i at = _mm512_loadu_si512(w.position + k);
        const __m512i g = _mm512_loadu_si512(w.group_of + k);
        const __m512i word = _mm512_i32gather_epi32(_mm512_srli_epi32(at, 3), codes, 4);
        // The even element of a byte is its high nibble.
        const __m512i bits = _mm512_and_si512(
            _mm512_slli_epi32(_mm512_xor_si512(at, _mm512_set1_epi32(1)), 2),
            _mm512_set1_epi32(28));
        const __m512i q = _mm512_and_si512(_mm512_srlv_epi32(word, bits), _mm512_set1_epi32(15));
        const __m512 less = _mm512_sub_ps(_mm512_cvtepi32_ps(q), _mm512_i32gather_ps(g, zero, 4));
        _mm512_storeu_ps(wide + (k - k0), _mm512_mul_ps(less, _mm512_i32gather_ps(g, scale, 4)));
      }
#endif
      for (; k < stop; ++k) {
        const int32_t g = w.group_of[k], at = w.position == nullptr ? k : w.position[k];
        const int q = at % 2 ? codes[at / 2] & 15 : codes[at / 2] >> 4;
        wide[k - k0] = (static_cast<float>(q) - zero[g]) * scale[g];
      }
    }
    narrow(wide, stop - k0, out);
    out += stop - k0;
    k0 = stop;
  }
}

template <class T>
void dequantize_to(const Weight& w, T* dst, int64_t begin, int64_t end, bool stream) {
  if (w.layout == Layout::kFlat) {
    decode_flat(w, begin, end, dst + begin, stream);
  } else {
    while (begin < end) {
      const int64_t n = begin / w.k, stop = std::min(end, (n + 1) * w.k);
      decode(w, n, begin - n * w.k, stop - begin, dst + begin, stream);
      begin = stop;
    }
  }
#if defined(__AVX__)
  _mm_sfence();  // orders the streamed results before whatever the caller does next
#endif
}

void dequantize(const Weight& w, Dtype dtype, void* dst, int64_t begin, int64_t end, bool stream) {
  switch (dtype) {
    case Dtype::kFloat32:
      return dequantize_to(w, static_cast<float*>(dst), begin, end, stream);
    case Dtype::kBFloat16:
      return dequantize_to(w, static_cast<bf16*>(dst), begin, end, stream);
    case Dtype::kFloat16:
      return dequantize_to(w, static_cast<fp16*>(dst), begin, end, stream);
  }
}

}  // namespace
}  // namespace lora_kernels::quant_linear
