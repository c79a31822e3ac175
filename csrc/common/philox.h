// Philox4x32-7 and the dropout decision built on it (definition:
// lora_kernels/ops/_philox.py; Salmon et al., SC 2011). No torch headers.
#pragma once

#include <cstdint>

#include "host_device.h"

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace lora_kernels {

struct DropoutParams {
  uint32_t threshold = 0;  // keep <=> draw >= threshold; 0: no dropout
  uint32_t key[2] = {0, 0};
};

namespace {

// One call of the generator for counter (lane, row, stream, 0), where lane = 16 * (k / 128) +
// (k % 32) / 2: half k % 2 of words[(k % 128) / 32] is the draw of column k.
LK_HOST_DEVICE inline void philox_words(uint32_t key0, uint32_t key1, uint32_t lane, uint32_t row,
                                        uint32_t stream, uint32_t words[4]) {
  uint32_t c0 = lane, c1 = row, c2 = stream, c3 = 0;
  for (int round = 0; round < 7; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

#if defined(__AVX512BW__)

// High and low halves of the 16 products a * b.
inline void multiply_wide(__m512i a, __m512i b, __m512i& high, __m512i& low) {
  const __m512i even = _mm512_mul_epu32(a, b);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), b);
  high = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
  low = _mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
}

// Keep bits of the 128 columns [128 * block, 128 * block + 128) of one row: bit c of keep[c / 32].
inline void philox_keep_block(const DropoutParams& d, uint32_t row, uint32_t block,
                              uint32_t stream, uint32_t keep[4]) {
  if (d.threshold > 0xffffu) {
    keep[0] = keep[1] = keep[2] = keep[3] = 0;
    return;
  }
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i m0 = _mm512_set1_epi32(static_cast<int>(0xD2511F53u));
  const __m512i m1 = _mm512_set1_epi32(static_cast<int>(0xCD9E8D57u));
  __m512i c0 = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(16 * block)));
  __m512i c1 = _mm512_set1_epi32(static_cast<int>(row));
  __m512i c2 = _mm512_set1_epi32(static_cast<int>(stream));
  __m512i c3 = _mm512_setzero_si512();
  uint32_t k0 = d.key[0], k1 = d.key[1];
  for (int round = 0; round < 7; ++round) {
    __m512i high0, low0, high1, low1;
    multiply_wide(c0, m0, high0, low0);
    multiply_wide(c2, m1, high1, low1);
    constexpr int kXor3 = 0x96;
    c0 = _mm512_ternarylogic_epi32(high1, c1, _mm512_set1_epi32(static_cast<int>(k0)), kXor3);
    c2 = _mm512_ternarylogic_epi32(high0, c3, _mm512_set1_epi32(static_cast<int>(k1)), kXor3);
    c1 = low1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const __m512i threshold = _mm512_set1_epi16(static_cast<short>(d.threshold));
  keep[0] = _mm512_cmpge_epu16_mask(c0, threshold);
  keep[1] = _mm512_cmpge_epu16_mask(c1, threshold);
  keep[2] = _mm512_cmpge_epu16_mask(c2, threshold);
  keep[3] = _mm512_cmpge_epu16_mask(c3, threshold);
}

#else

// Keep bits of the 128 columns [128 * block, 128 * block + 128) of one row: bit c of keep[c / 32].
inline void philox_keep_block(const DropoutParams& d, uint32_t row, uint32_t block,
                              uint32_t stream, uint32_t keep[4]) {
  // Lane-major arrays of 16 counters: the loops below vectorise on every instruction set.
  uint32_t c0[16], c1[16], c2[16], c3[16];
  for (int l = 0; l < 16; ++l) {
    c0[l] = 16 * block + l;
    c1[l] = row;
    c2[l] = stream;
    c3[l] = 0;
  }
  uint32_t k0 = d.key[0], k1 = d.key[1];
  for (int round = 0; round < 7; ++round) {
    for (int l = 0; l < 16; ++l) {
      const uint64_t p0 = static_cast<uint64_t>(c0[l]) * 0xD2511F53u;
      const uint64_t p1 = static_cast<uint64_t>(c2[l]) * 0xCD9E8D57u;
      const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1[l] ^ k0;
      const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3[l] ^ k1;
      c1[l] = static_cast<uint32_t>(p1);
      c3[l] = static_cast<uint32_t>(p0);
      c0[l] = n0;
      c2[l] = n2;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const uint32_t* words[4] = {c0, c1, c2, c3};
  for (int w = 0; w < 4; ++w) {
    uint32_t bits = 0;
    for (int l = 0; l < 16; ++l) {
      bits |= static_cast<uint32_t>((words[w][l] & 0xffffu) >= d.threshold) << (2 * l);
      bits |= static_cast<uint32_t>((words[w][l] >> 16) >= d.threshold) << (2 * l + 1);
    }
    keep[w] = bits;
  }
}

#endif

}  // namespace
}  // namespace lora_kernels
