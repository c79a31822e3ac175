// Philox4x32-7, scalar form, and the dropout decision built on it (definition:
// lora_kernels/ops/_philox.py; Salmon et al., SC 2011). No torch headers.
#pragma once

#include <cstdint>

namespace lora_kernels {

struct DropoutParams {
  uint32_t threshold = 0;  // keep <=> draw >= threshold; 0: no dropout
  uint32_t key[2] = {0, 0};
};

namespace {

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

}  // namespace
}  // namespace lora_kernels
