// Engine for Intel AMX-BF16 with AVX-512 for everything around the tiles.
//
// Tiles: C 2x2 of 16x16 fp32 (tmm0-3), A 2 of 16 rows x 32 k (tmm4-5), B 2 of 16 k-pairs x 16
// columns (tmm6-7): one tile load per TDPBF16PS, the best ratio that eight tiles allow.
// Packed A strip (32 rows): per 32 k, two tiles of 1 KB, row-major [16][32].
// Packed B strip (width 32 or 16): per 32 k, width/16 tiles of 1 KB, [k/2][column][k%2].
// Numerics: bf16 products, fp32 accumulation over the whole k (x and LoRA term in one
// accumulator), one rounding at the store. TDPBF16PS flushes denormal inputs and results to zero.
#pragma once

#include <immintrin.h>

#include "../cpu/amx_config.h"
#include "lora_linear.h"

namespace lora_kernels::lora_linear {
namespace {

struct AmxEngine;

inline __m512i load_bf16x32(const bf16* src, int64_t n) {
  if (n >= 32) return _mm512_loadu_si512(src);
  return n <= 0 ? _mm512_setzero_si512()
                : _mm512_maskz_loadu_epi16((1u << n) - 1u, src);
}

inline __m512i load_bf16x32(const float* src, int64_t n) {
  const uint32_t keep = n >= 32 ? ~0u : (n <= 0 ? 0u : (1u << n) - 1u);
  const __m512 lo = _mm512_maskz_loadu_ps(static_cast<__mmask16>(keep), src);
  const __m512 hi = _mm512_maskz_loadu_ps(static_cast<__mmask16>(keep >> 16), src + 16);
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(hi, lo));
}

// dst[r * 16 + c] = src[c * ld + r] for a 16x16 block of 32-bit values; only `rows` source rows
// are read, of `columns` values each.
inline void transpose_16x16(__m512i v[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    v[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    v[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    v[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    v[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    v[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

struct AmxEngine {
  using T = bf16;
  using TA = bf16;
  using TB = bf16;
  static constexpr int MR = 32, NR = 32, NV = 16, KR = 32;
  static constexpr int ROWS = 256, COLUMNS = 512, K_BLOCK = 512;

  static void enter() { _tile_loadconfig(&cpu::kTileConfig); }
  static void leave() {
    _mm_sfence();  // orders the streamed results before whatever the caller does next
    _tile_release();
  }

  template <class Src>
  static void pack_rows(const Src* src, int64_t ld, int64_t rows, int64_t k, bf16* dst) {
    for (int64_t k0 = 0; k0 < k; k0 += 32, dst += 1024) {
      for (int64_t i = 0; i < rows; ++i) {
        _mm512_store_si512(dst + i * 32, load_bf16x32(src + i * ld + k0, k - k0));
      }
      for (int64_t i = rows; i < MR; ++i) {
        _mm512_store_si512(dst + i * 32, _mm512_setzero_si512());
      }
    }
  }
  static void pack_a(const bf16* src, int64_t ld, int64_t rows, int64_t k, bf16* dst) {
    pack_rows(src, ld, rows, k, dst);
  }
  static void pack_a_f32(const float* src, int64_t ld, int64_t rows, int64_t k, float factor,
                         bf16* dst) {
    const __m512 f = _mm512_set1_ps(factor);
    for (int64_t k0 = 0; k0 < k; k0 += 32, dst += 1024) {
      const uint32_t keep = k - k0 >= 32 ? ~0u : (1u << (k - k0)) - 1u;
      for (int64_t i = 0; i < MR; ++i) {
        __m512i v = _mm512_setzero_si512();
        if (i < rows) {
          const float* s = src + i * ld + k0;
          const __m512 lo = _mm512_maskz_loadu_ps(static_cast<__mmask16>(keep), s);
          const __m512 hi = _mm512_maskz_loadu_ps(static_cast<__mmask16>(keep >> 16), s + 16);
          v = reinterpret_cast<__m512i>(
              _mm512_cvtne2ps_pbh(_mm512_mul_ps(hi, f), _mm512_mul_ps(lo, f)));
        }
        _mm512_store_si512(dst + i * 32, v);
      }
    }
  }
  static void pack_a_scaled(const bf16* src, int64_t ld, int64_t rows, int64_t k, float factor,
                            bf16* dst) {
    const __m512 f = _mm512_set1_ps(factor);
    const auto scaled = [f](__m256i half) {
      const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
      return _mm512_mul_ps(reinterpret_cast<__m512>(wide), f);
    };
    for (int64_t k0 = 0; k0 < k; k0 += 32, dst += 1024) {
      for (int64_t i = 0; i < rows; ++i) {
        const __m512i v = load_bf16x32(src + i * ld + k0, k - k0);
        const __m512 lo = scaled(_mm512_castsi512_si256(v));
        const __m512 hi = scaled(_mm512_extracti64x4_epi64(v, 1));
        _mm512_store_si512(dst + i * 32, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(hi, lo)));
      }
      for (int64_t i = rows; i < MR; ++i) {
        _mm512_store_si512(dst + i * 32, _mm512_setzero_si512());
      }
    }
  }
  static void pack_a_t(const bf16* src, int64_t ld, int64_t rows, int64_t k, bf16* dst) {
    for (int64_t k0 = 0; k0 < k; k0 += 32, dst += 1024) {
      const int64_t kn = k - k0 < 32 ? k - k0 : 32;
      for (int64_t i = 0; i < MR * 32; i += 32) {
        _mm512_store_si512(dst + i, _mm512_setzero_si512());
      }
      for (int64_t kk = 0; kk < kn; ++kk) {
        const bf16* s = src + (k0 + kk) * ld;
        for (int64_t i = 0; i < rows; ++i) dst[i * 32 + kk] = s[i];
      }
    }
  }
  static void mask_a(const bf16* strip, int64_t rows, int64_t k, const uint32_t* masks,
                     int64_t ldmask, bf16* dst) {
    for (int64_t j = 0; j * 32 < k; ++j, strip += 1024, dst += 1024) {
      for (int64_t i = 0; i < MR; ++i) {
        const uint32_t keep = i < rows ? masks[i * ldmask + j] : 0u;
        _mm512_store_si512(dst + i * 32,
                           _mm512_maskz_mov_epi16(keep, _mm512_load_si512(strip + i * 32)));
      }
    }
  }

  // Rows k and k + 1 interleave into one tile row of 16 column pairs.
  template <class Src>
  static void pack_b_rows(const Src* src, int64_t ld, int64_t k, int64_t n, int64_t width,
                          const uint32_t* masks, int64_t n0, int64_t ldmask, bf16* dst) {
    alignas(64) static constexpr uint16_t kLow[32] = {
        0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    alignas(64) static constexpr uint16_t kHigh[32] = {
        16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
        24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    const __m512i low = _mm512_load_si512(kLow), high = _mm512_load_si512(kHigh);
    const int64_t tiles = width / 16;
    for (int64_t k0 = 0; k0 < k; k0 += 32, dst += 512 * tiles) {
      for (int64_t pair = 0; pair < 16; ++pair) {
        const int64_t r = k0 + 2 * pair;
        __m512i even = _mm512_setzero_si512(), odd = even;
        if (r < k) even = load_bf16x32(src + r * ld, n);
        if (r + 1 < k) odd = load_bf16x32(src + (r + 1) * ld, n);
        if (masks != nullptr) {
          if (r < k) even = _mm512_maskz_mov_epi16(masks[r * ldmask + n0 / 32], even);
          if (r + 1 < k) odd = _mm512_maskz_mov_epi16(masks[(r + 1) * ldmask + n0 / 32], odd);
        }
        _mm512_store_si512(dst + pair * 32, _mm512_permutex2var_epi16(even, low, odd));
        if (tiles == 2) {
          _mm512_store_si512(dst + 512 + pair * 32, _mm512_permutex2var_epi16(even, high, odd));
        }
      }
    }
  }
  template <class Src>
  static void pack_b_cols(const Src* src, int64_t ld, int64_t k, int64_t n, int64_t width,
                          bf16* dst) {
    for (int64_t k0 = 0; k0 < k; k0 += 32) {
      for (int64_t c0 = 0; c0 < width; c0 += 16, dst += 512) {
        __m512i v[16];
        for (int64_t c = 0; c < 16; ++c) {
          v[c] = c0 + c < n ? load_bf16x32(src + (c0 + c) * ld + k0, k - k0)
                            : _mm512_setzero_si512();
        }
        transpose_16x16(v);
        for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(dst + i * 32, v[i]);
      }
    }
  }

  // Conversion and store of the previous tile, done a row at a time under the tile products of
  // the next one: done at once it would leave the tile unit idle for an eighth of the time.
  struct Tail {
    float* tiles[2];
    int current = 0;
    int64_t row = 0;
    Output<AmxEngine> output{};
  };
  static void step(Tail& tail) {
    const Output<AmxEngine>& o = tail.output;
    const int64_t i = tail.row++;
    const float* c = tail.tiles[tail.current] + i * NR;
    const uint32_t keep = o.n >= 32 ? ~0u : (1u << o.n) - 1u;
    __m512 lo = _mm512_load_ps(c), hi = _mm512_load_ps(c + 16);
    if (o.extra != nullptr) {
      lo = _mm512_add_ps(lo, _mm512_load_ps(o.extra + i * NR));
      hi = _mm512_add_ps(hi, _mm512_load_ps(o.extra + i * NR + 16));
    }
    if (o.bias != nullptr) {
      lo = _mm512_add_ps(lo, _mm512_maskz_loadu_ps(static_cast<__mmask16>(keep), o.bias));
      hi = _mm512_add_ps(hi, _mm512_maskz_loadu_ps(static_cast<__mmask16>(keep >> 16), o.bias + 16));
    }
    const __m512i v = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(hi, lo));
    if (o.stream && o.n == NR) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(o.dst + i * o.ld), v);
    } else {
      _mm512_mask_storeu_epi16(o.dst + i * o.ld, keep, v);
    }
  }
  static void flush(Tail& tail) {
    while (tail.row < tail.output.rows) step(tail);
    tail.output.rows = 0;
  }
  static void micro_then(const Segment<AmxEngine>* segments, int count, int64_t width,
                         const float* sum, Tail& tail, const Output<AmxEngine>& output, Ahead ahead) {
    float* c = tail.tiles[tail.current ^ 1];
    if (output.rows > 16) {
      if (width > 16) {
        micro_tiles<2, 2>(segments, count, sum, c, NR, ahead, &tail);
      } else {
        micro_tiles<2, 1>(segments, count, sum, c, NR, ahead, &tail);
      }
    } else if (width > 16) {
      micro_tiles<1, 2>(segments, count, sum, c, NR, ahead, &tail);
    } else {
      micro_tiles<1, 1>(segments, count, sum, c, NR, ahead, &tail);
    }
    flush(tail);
    tail.current ^= 1;
    tail.row = 0;
    tail.output = output;
  }

  // c = sum + A B over the segments; `sum` (null: zero) has the row stride of c.
  template <int MT, int NT>
  static void micro_tiles(const Segment<AmxEngine>* segments, int count, const float* sum, float* c,
                          int64_t ldc, Ahead ahead, Tail* tail) {
    const int64_t stride = ldc * 4;
    const int64_t pending_rows = tail == nullptr ? 0 : tail->output.rows - tail->row;
    int64_t steps = 0;
    for (int s = 0; s < count; ++s) steps += segments[s].k / 32;
    int64_t pending = pending_rows;
    const int64_t per_step = (pending_rows + steps - 1) / steps;
    // More lines than this a step would fill the miss buffers that the tile loads need.
    const int64_t lines = std::min<int64_t>((ahead.bytes / 64 + steps - 1) / steps, 8);
    const char* const ahead_end = ahead.data + ahead.bytes;
    if (sum != nullptr) {
      _tile_loadd(0, sum, stride);
      if constexpr (NT == 2) _tile_loadd(1, sum + 16, stride);
      if constexpr (MT == 2) _tile_loadd(2, sum + 16 * ldc, stride);
      if constexpr (MT == 2 && NT == 2) _tile_loadd(3, sum + 16 * ldc + 16, stride);
    } else {
      _tile_zero(0);
      if constexpr (NT == 2) _tile_zero(1);
      if constexpr (MT == 2) _tile_zero(2);
      if constexpr (MT == 2 && NT == 2) _tile_zero(3);
    }
    for (int s = 0; s < count; ++s) {
      const bf16* a = segments[s].a;
      const bf16* b = segments[s].b;
      for (int64_t k = segments[s].k; k > 0; k -= 32) {
        _tile_stream_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (NT == 2) {
          _tile_loadd(7, b + 512, 64);
          _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (MT == 2) {
          _tile_stream_loadd(5, a + 512, 64);
          _tile_dpbf16ps(2, 5, 6);
          if constexpr (NT == 2) _tile_dpbf16ps(3, 5, 7);
        }
        for (int64_t i = lines; i > 0 && ahead.data < ahead_end; --i, ahead.data += 64) {
          _mm_prefetch(ahead.data, _MM_HINT_T1);
        }
        for (int64_t i = per_step; i > 0 && pending > 0; --i, --pending) step(*tail);
        a += 1024;
        b += 512 * NT;
      }
    }
    _tile_stored(0, c, stride);
    if constexpr (NT == 2) _tile_stored(1, c + 16, stride);
    if constexpr (MT == 2) _tile_stored(2, c + 16 * ldc, stride);
    if constexpr (MT == 2 && NT == 2) _tile_stored(3, c + 16 * ldc + 16, stride);
  }
  static void micro(const Segment<AmxEngine>* segments, int count, int64_t rows, int64_t width,
                    float* c, int64_t ldc, bool accumulate, Ahead ahead = {}) {
    const float* sum = accumulate ? c : nullptr;
    if (rows > 16) {
      if (width > 16) {
        micro_tiles<2, 2>(segments, count, sum, c, ldc, ahead, nullptr);
      } else {
        micro_tiles<2, 1>(segments, count, sum, c, ldc, ahead, nullptr);
      }
    } else if (width > 16) {
      micro_tiles<1, 2>(segments, count, sum, c, ldc, ahead, nullptr);
    } else {
      micro_tiles<1, 1>(segments, count, sum, c, ldc, ahead, nullptr);
    }
  }

  static void add_masked(const float* lora, int64_t rows, int64_t width, const uint32_t* masks,
                         int64_t ldmask, int64_t k0, float* c) {
    for (int64_t i = 0; i < rows; ++i) {
      const uint32_t keep = masks[i * ldmask + k0 / 32];
      for (int64_t j = 0; j < width; j += 16) {
        const __m512 sum = _mm512_load_ps(c + i * NR + j);
        _mm512_store_ps(c + i * NR + j,
                        _mm512_mask_add_ps(sum, static_cast<__mmask16>(keep >> j), sum,
                                           _mm512_load_ps(lora + i * NR + j)));
      }
    }
  }
  static void store(const float* c, int64_t ldc, int64_t rows, int64_t n, const float* bias,
                    bf16* dst, int64_t ld) {
    for (int64_t j = 0; j < n; j += 32) {
      const uint32_t keep = n - j >= 32 ? ~0u : (1u << (n - j)) - 1u;
      const __mmask16 keep_lo = static_cast<__mmask16>(keep);
      const __mmask16 keep_hi = static_cast<__mmask16>(keep >> 16);
      __m512 add_lo = _mm512_setzero_ps(), add_hi = add_lo;
      if (bias != nullptr) {
        add_lo = _mm512_maskz_loadu_ps(keep_lo, bias + j);
        add_hi = _mm512_maskz_loadu_ps(keep_hi, bias + j + 16);
      }
      for (int64_t i = 0; i < rows; ++i) {
        const float* row = c + i * ldc + j;
        const __m512 lo = _mm512_add_ps(_mm512_maskz_loadu_ps(keep_lo, row), add_lo);
        const __m512 hi = _mm512_add_ps(_mm512_maskz_loadu_ps(keep_hi, row + 16), add_hi);
        _mm512_mask_storeu_epi16(dst + i * ld + j, keep,
                                 reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(hi, lo)));
      }
    }
  }
};

}  // namespace
}  // namespace lora_kernels::lora_linear
