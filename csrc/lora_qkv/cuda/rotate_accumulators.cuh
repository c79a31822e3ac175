// Bias and rotation of whole heads in the accumulators of wgmma.
//
// A warpgroup has 64 rows of a tile: thread t holds rows 16 (t / 32) + t % 32 / 4 + 8 h and columns
// 8 b + 2 (t % 4) + e as register 4 b + 2 h + e. Channels i and i + D / 2 of a head are
// D / 16 blocks of columns apart, so the same thread holds both, D / 4 registers apart.
#pragma once

#include "../../rope/cuda/tables.cuh"
#include "heads.h"

namespace lora_kernels::lora_qkv::cuda {

// A tile in the matrix: its first row and column, and where the rows end.
struct TileCorner {
  int row, column, rows;
};

// Thread 0..127 of a warpgroup; `r` rotates all D channels, half-rotated; column % D == 0.
template <int D, int kRegisters>
LK_DEVICE void rotate_accumulators(const rope::cuda::Rotation& r, const HeadsOfProblem& problem,
                                   const TileCorner& tile, int thread, float (&d)[kRegisters]) {
  constexpr int kOfHead = D / 2, kApart = D / 4, kHeads = kRegisters / kOfHead;
  static_assert(kHeads * kOfHead == kRegisters && D % 16 == 0);
  const int lane = thread % 32, first_head = tile.column / D;
  bool exists[2];
  rope::cuda::TableRow at[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = tile.row + 16 * (thread / 32) + lane / 4 + 8 * h;
    exists[h] = row < tile.rows;
    at[h] = exists[h] ? rope::cuda::table_row(r, static_cast<uint32_t>(row))
                      : rope::cuda::TableRow{0, 0, true};
  }
#pragma unroll
  for (int block = 0; block < D / 16; ++block) {
    const int channel = 8 * block + 2 * (lane % 4);
    if (problem.bias != nullptr) {
#pragma unroll
      for (int head = 0; head < kHeads; ++head) {
        const int column = tile.column + head * D + channel;
        if (column >= problem.n) continue;  // whole heads exist or do not
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float one = load_as_float(problem.bias, column + e, problem.bias_dtype);
          const float two = load_as_float(problem.bias, column + e + D / 2, problem.bias_dtype);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            d[head * kOfHead + 4 * block + 2 * h + e] += one;
            d[head * kOfHead + 4 * block + 2 * h + e + kApart] += two;
          }
        }
      }
    }
    if (first_head >= problem.rotated) continue;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (!exists[h]) continue;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int one = channel + e, two = one + D / 2;
        const rope::cuda::PairFactors f = rope::cuda::pair_factors(
            load_channel(r.cos, at[h].cos, one), load_channel(r.cos, at[h].cos, two),
            load_channel(r.sin, at[h].sin, one), load_channel(r.sin, at[h].sin, two), false);
#pragma unroll
        for (int head = 0; head < kHeads; ++head) {
          if (first_head + head >= problem.rotated) continue;
          float& first = d[head * kOfHead + 4 * block + 2 * h + e];
          float& second = d[head * kOfHead + 4 * block + 2 * h + e + kApart];
          const float y1 = first, y2 = second;
          first = at[h].known ? y1 * f.c1 + y2 * f.s1 : rope::cuda::not_a_number();
          second = at[h].known ? y2 * f.c2 + y1 * f.s2 : rope::cuda::not_a_number();
        }
      }
    }
  }
}

}  // namespace lora_kernels::lora_qkv::cuda
