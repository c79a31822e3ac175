// Warp-wide instructions in plain C++, from the fragment layouts that mma.cuh states.
#pragma once

#include <cstring>

#include "../dtype.h"
#include "scheduler.h"

namespace lora_kernels::emulator {

template <class T>
inline float element(uint32_t pair, int half) {
  return to_float(T{static_cast<uint16_t>(half ? pair >> 16 : pair & 0xffffu)});
}

struct MmaOperands {
  float d[4];
  uint32_t a[4], b[2];
};

// Products are exact in fp32; sums run over k in order.
template <class T>
void mma_warp(const void* const* in, void* const* out) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& o = *static_cast<const MmaOperands*>(in[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int h = 0; h < 2; ++h) {
      for (int i = 0; i < 4; ++i)
        a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + h] = element<T>(o.a[i], h);
      for (int i = 0; i < 2; ++i) b[2 * t + 8 * i + h][g] = element<T>(o.b[i], h);
    }
  }
  float d[16][8] = {};
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& o = *static_cast<const MmaOperands*>(in[lane]);
    auto* result = static_cast<float*>(out[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) result[i] = o.d[i] + d[g + 8 * (i / 2)][2 * t + i % 2];
  }
}

template <class T>
void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaOperands operands;
  std::memcpy(operands.d, d, sizeof d);
  std::memcpy(operands.a, a, sizeof a);
  operands.b[0] = b0;
  operands.b[1] = b1;
  warp_collective("mma", mma_warp<T>, &operands, d);
}

template <int kMatrices, bool kTrans>
void ldmatrix_warp(const void* const* in, void* const* out) {
  for (int matrix = 0; matrix < kMatrices; ++matrix) {
    unsigned banks = 0;  // groups of four, i.e. 16 bytes
    for (int row = 0; row < 8; ++row) {
      const void* address = *static_cast<const void* const*>(in[8 * matrix + row]);
      banks |= 1u << (reinterpret_cast<uintptr_t>(address) / 16 % 8);
    }
    ++shared_phases().all;
    shared_phases().conflicting += banks != 0xffu;
  }
  uint16_t m[kMatrices][8][8];
  for (int row = 0; row < 8 * kMatrices; ++row) {
    std::memcpy(m[row / 8][row % 8], *static_cast<const void* const*>(in[row]), 16);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const int i = lane / 4, j = 2 * (lane % 4);
    for (int r = 0; r < kMatrices; ++r) {
      const uint32_t low = kTrans ? m[r][j][i] : m[r][i][j];
      const uint32_t high = kTrans ? m[r][j + 1][i] : m[r][i][j + 1];
      static_cast<uint32_t*>(out[lane])[r] = low | high << 16;
    }
  }
}

template <int kMatrices, bool kTrans>
void ldmatrix(uint32_t (&r)[kMatrices], const void* row) {
  check_shared(row, 16, 16);
  warp_collective("ldmatrix", ldmatrix_warp<kMatrices, kTrans>, &row, r);
}

struct Shuffle {
  uint32_t value;
  int mask;
};

inline void shuffle_xor_warp(const void* const* in, void* const* out) {
  uint32_t results[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& s = *static_cast<const Shuffle*>(in[lane]);
    results[lane] = static_cast<const Shuffle*>(in[lane ^ s.mask])->value;
  }
  for (int lane = 0; lane < kWarp; ++lane) *static_cast<uint32_t*>(out[lane]) = results[lane];
}

inline uint32_t shuffle_xor(uint32_t value, int mask) {
  const Shuffle s{value, mask};
  uint32_t result;
  warp_collective("shuffle", shuffle_xor_warp, &s, &result);
  return result;
}

}  // namespace lora_kernels::emulator
