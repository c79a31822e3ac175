// Products of a block by AMX-BF16 tiles (16 x 16 fp32 sums, 32 deep).
//
// Packed operand: per 32 columns and 16 ranks a tile [16 pairs of columns][16 ranks][2].
// taken [kBlockRows][kPanel] is a left operand as it lies. For dB it is turned into a right one:
// rows 2 i and 2 i + 1 interleaved, [kBlockRows / 2][kPanel][2]; S is the left one, per 16 ranks
// and 32 rows a tile [16 ranks][32 rows]. Sums of dB: per 16 ranks and 16 columns a tile
// [16 ranks][16 columns].
// Numerics: products of bf16 are exact in fp32, sums in fp32, denormals flushed. Sums of dB go
// through partial sums of kSummedRows rows, so that no chain grows with M.
#pragma once

#include <immintrin.h>

#include "../cpu/amx_config.h"
#include "blocks.h"

namespace lora_kernels::gated_activation {
namespace {

struct AmxEngine {
  using Element = bf16;
  struct Turned {
    bf16 pairs[kBlockRows * kPanel];
  };
  static constexpr int64_t kSummedRows = 512;

  static void enter() { _tile_loadconfig(&cpu::kTileConfig); }
  static void leave() { _tile_release(); }

  static void pack(const void* src, int64_t stride_n, int64_t stride_r, int64_t columns,
                   int64_t rank, void* dst) {
    const int64_t padded = padded_rank(rank), wide = padded_columns(columns);
    const bf16* from = static_cast<const bf16*>(src);
    bf16* to = static_cast<bf16*>(dst);
    std::memset(to, 0, wide * padded * sizeof(bf16));
    for (int64_t n = 0; n < columns; ++n) {
      bf16* tile = to + n / 32 * (padded / 16) * 512 + n % 32 / 2 * 32 + n % 2;
      for (int64_t r0 = 0; r0 < rank; r0 += 16, tile += 512) {
        const bf16* line = from + n * stride_n + r0 * stride_r;
        const int64_t some = std::min<int64_t>(16, rank - r0);
        for (int64_t r = 0; r < some; ++r) tile[2 * r] = line[r * stride_r];
      }
    }
  }

  static void pack_s(const bf16* s, int64_t lds, int64_t rows, int64_t rank, bf16* dst) {
    const int64_t padded = padded_rank(rank);
    std::memset(dst, 0, kBlockRows * padded * sizeof(bf16));
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t r = 0; r < rank; ++r) {
        const int64_t tile = r / 16 * (kBlockRows / 32) + i / 32;
        dst[tile * 512 + r % 16 * 32 + i % 32] = s[i * lds + r];
      }
    }
  }

  static void take(const bf16* row, int64_t n, bf16* dst) {
    for (int64_t c = 0; c < kPanel; c += 32) {
      const int64_t left = n - c;
      const __mmask32 keep = left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1u;
      _mm512_store_si512(dst + c, _mm512_maskz_loadu_epi16(keep, row + c));
    }
  }

  static void shrink(const bf16* taken, const bf16* packed, int64_t rank, float* products) {
    const int64_t tiles = rank / 16, line = kPanel * sizeof(bf16), out = rank * sizeof(float);
    for (int64_t t = 0; t < tiles; ++t) {
      float* c = products + t * 16;
      _tile_loadd(0, c, out);
      _tile_loadd(1, c + 16 * rank, out);
      _tile_loadd(2, c + 32 * rank, out);
      _tile_loadd(3, c + 48 * rank, out);
      for (int64_t k = 0; k < kPanel / 32; ++k) {
        const bf16* a = taken + k * 32;
        _tile_loadd(6, packed + (k * tiles + t) * 512, 64);
        _tile_loadd(4, a, line);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, a + 16 * kPanel, line);
        _tile_dpbf16ps(1, 5, 6);
        _tile_loadd(4, a + 32 * kPanel, line);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(5, a + 48 * kPanel, line);
        _tile_dpbf16ps(3, 5, 6);
      }
      _tile_stored(0, c, out);
      _tile_stored(1, c + 16 * rank, out);
      _tile_stored(2, c + 32 * rank, out);
      _tile_stored(3, c + 48 * rank, out);
    }
  }

  static void turn(const bf16* taken, bf16* pairs) {
    alignas(64) static constexpr uint16_t kLow[32] = {
        0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kLow);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t i = 0; i < kBlockRows; i += 2, taken += 2 * kPanel, pairs += 2 * kPanel) {
      for (int64_t c = 0; c < kPanel; c += 32) {
        const __m512i a = _mm512_load_si512(taken + c), b = _mm512_load_si512(taken + kPanel + c);
        _mm512_store_si512(pairs + 2 * c, _mm512_permutex2var_epi16(a, low, b));
        _mm512_store_si512(pairs + 2 * c + 32, _mm512_permutex2var_epi16(a, high, b));
      }
    }
  }

  static void outer(const bf16* taken, Turned& turned, const bf16* s, int64_t rank, int64_t,
                    int64_t c0, int64_t wide, float* sums) {
    turn(taken, turned.pairs);
    const int64_t line = 2 * kPanel * sizeof(bf16);
    for (int64_t t = 0; t < rank / 16; ++t) {
      for (int64_t c = 0; c < kPanel; c += 64) {
        float* out = sums + (t * (wide / 16) + (c0 + c) / 16) * 256;
        _tile_loadd(0, out, 64);
        _tile_loadd(1, out + 256, 64);
        _tile_loadd(2, out + 512, 64);
        _tile_loadd(3, out + 768, 64);
        for (int64_t k = 0; k < kBlockRows / 32; ++k) {
          const bf16* b = turned.pairs + k * 32 * kPanel + 2 * c;
          _tile_loadd(6, s + (t * (kBlockRows / 32) + k) * 512, 64);
          _tile_loadd(4, b, line);
          _tile_dpbf16ps(0, 6, 4);
          _tile_loadd(5, b + 32, line);
          _tile_dpbf16ps(1, 6, 5);
          _tile_loadd(4, b + 64, line);
          _tile_dpbf16ps(2, 6, 4);
          _tile_loadd(5, b + 96, line);
          _tile_dpbf16ps(3, 6, 5);
        }
        _tile_stored(0, out, 64);
        _tile_stored(1, out + 256, 64);
        _tile_stored(2, out + 512, 64);
        _tile_stored(3, out + 768, 64);
      }
    }
  }

  static void finish(const float* sums, int64_t slots, int64_t stride, int64_t columns,
                     int64_t rank, float scaling, int64_t begin, int64_t end, float* dst) {
    const int64_t tiles = padded_columns(columns) / 16;
    for (int64_t n0 = begin; n0 < end; n0 += 16) {
      const int64_t some = std::min<int64_t>(16, end - n0);
      for (int64_t r = 0; r < rank; ++r) {
        const float* at = sums + (r / 16 * tiles + n0 / 16) * 256 + r % 16 * 16;
        Vec total = load(at);
        for (int64_t slot = 1; slot < slots; ++slot) total += load(at + slot * stride);
        total *= scaling;
        for (int64_t n = 0; n < some; ++n) dst[(n0 + n) * rank + r] = total[n];
      }
    }
  }
};

}  // namespace
}  // namespace lora_kernels::gated_activation
