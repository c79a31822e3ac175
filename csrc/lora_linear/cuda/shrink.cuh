// Shrink: S_g = drop_g(X) A_g^T / P(keep) for all members g of a group, with one read of X.
//
// Math      s[m, c] = keep_scale * sum_k keep_g(m, k) x[m, k] a_g[c - column_g, k]
// Shapes    X [M, K] row stride ldx; A_g [rank_g, K] row stride lda. The ranks lie side by side in
//           "padded columns": member g owns padded_rank(rank_g) columns from padded_column. S is
//           written without padding, scaled_s with it (zeros).
// Grid      x: 64 rows of X, y: RN padded columns, z: share of K in blocks of 128. Four warps, 16
//           rows each; a warp holds all RN columns, so X goes through shared memory once.
// Bytes     X once (once per RN columns beyond 128), A once per 64 rows from L2, S. With a split,
//           4 bytes per column and share on top, written and read once.
// Numerics  fp32 accumulation in k order per share; shares added in order by shrink_sum_kernel;
//           one rounding to T for S, another for scaled_s, which is made from S as it is stored:
//           a caller that has S gets the same bits.
// Dropout   registers of X are masked between ldmatrix and mma: one generator call per row and
//           eight columns, nothing stored. A group repeats the products per member, since each
//           member has its own mask.
// Resources (ptxas 13.0, sm_80) at RN = 16, 32, 64, 128: 87, 96, 115, 166 registers; 80, 72,
//           96, 145 KiB of shared memory; 2, 2, 1, 1 blocks per SM of 164 KiB. No spills.
// Limits    16-bit T, rank <= 256, members <= 8; M < 2^31 rows, K < 2^31.
#pragma once

#include "../../common/barrier.cuh"
#include "../../common/mma.cuh"
#include "../../common/tile.cuh"
#include "dropout.cuh"
#include "split.h"

namespace lora_kernels::lora_linear::cuda {

struct ShrinkArgs {
  ShrinkParams p;
  int columns;      // padded, of the whole group
  int k_per_split;  // multiple of kBlockK
  float* partials;  // [splits, M, columns], or null without a split
};

template <int RN>
struct ShrinkShape {
  static constexpr int kRows = 64, kBlockK = 128, kThreads = 128;
  static constexpr int kStages = RN <= 16 ? 4 : 3;
  static constexpr int kTileX = kRows * kBlockK, kTileA = RN * kBlockK;  // elements
  static constexpr size_t kRowTable = RN * sizeof(void*);
  static_assert(kRows * (RN + 2) * 4 <= kStages * (kTileX + kTileA) * 2);  // staged results
  static constexpr size_t kShared = kStages * (kTileX + kTileA) * 2 + kRowTable;
};

// Member that owns padded column c, or -1.
LK_DEVICE int shrink_member(const ShrinkParams& p, int64_t c) {
  for (int g = 0; g < p.members; ++g) {
    const int64_t first = p.member[g].padded_column;
    if (c >= first && c < first + padded_rank(p.member[g].rank)) return g;
  }
  return -1;
}

// Both results of one element; `sum` is before keep_scale.
template <class T>
LK_DEVICE void store_shrink(const ShrinkParams& p, int64_t row, int64_t column, float sum) {
  const int g = shrink_member(p, column);
  if (g < 0) return;
  const ShrinkMember& w = p.member[g];
  const int64_t c = column - w.padded_column;
  T s;
  narrow(c < w.rank ? sum * p.keep_scale : 0.0f, s);
  if (p.s != nullptr && c < w.rank) static_cast<T*>(p.s)[row * p.lds + w.s_column + c] = s;
  if (p.scaled_s != nullptr) {
    narrow(w.scaling * widen(s), static_cast<T*>(p.scaled_s)[row * p.ld_scaled + column]);
  }
}

template <class T, int RN, bool kAligned>
struct ShrinkBlock {
  using Shape = ShrinkShape<RN>;
  static constexpr int kBlockK = Shape::kBlockK;

  const ShrinkArgs& args;
  const ShrinkParams& p;
  T* tiles;
  const T** row_of_a;  // start of each padded column's row of A, null where there is none
  int thread, lane, warp;
  int64_t row0, column0, k_begin, k_end;
  float acc[RN / 8][4];

  LK_DEVICE ShrinkBlock(const ShrinkArgs& args_, unsigned char* shared)
      : args(args_), p(args_.p), tiles(reinterpret_cast<T*>(shared)), thread(threadIdx.x) {
    constexpr size_t kTiles = Shape::kStages * (Shape::kTileX + Shape::kTileA) * sizeof(T);
    row_of_a = reinterpret_cast<const T**>(shared + kTiles);
    lane = thread % 32;
    warp = thread / 32;
    row0 = static_cast<int64_t>(blockIdx.x) * Shape::kRows;
    column0 = static_cast<int64_t>(blockIdx.y) * RN;
    k_begin = static_cast<int64_t>(blockIdx.z) * args.k_per_split;
    k_end = k_begin + args.k_per_split < p.k ? k_begin + args.k_per_split : p.k;
    for (int i = 0; i < RN / 8; ++i) {
      for (int j = 0; j < 4; ++j) acc[i][j] = 0.0f;
    }
    for (int c = thread; c < RN; c += Shape::kThreads) {
      const int g = shrink_member(p, column0 + c);
      const int64_t r = g < 0 ? 0 : column0 + c - p.member[g].padded_column;
      const bool exists = g >= 0 && r < p.member[g].rank;
      row_of_a[c] = exists ? static_cast<const T*>(p.member[g].a) + r * p.member[g].lda : nullptr;
    }
  }

  LK_DEVICE T* tile_x(int stage) const { return tiles + stage * (Shape::kTileX + Shape::kTileA); }
  LK_DEVICE T* tile_a(int stage) const { return tile_x(stage) + Shape::kTileX; }

  LK_DEVICE void load(int64_t k, int stage) const {
    const T* x = static_cast<const T*>(p.x) + row0 * p.ldx + k;
    const int64_t rows = p.m - row0, cols = k_end - k;
    load_tile<Shape::kRows, kBlockK, Shape::kThreads, kAligned>(
        tile_x(stage), x, p.ldx, static_cast<int>(rows < Shape::kRows ? rows : Shape::kRows),
        static_cast<int>(cols < kBlockK ? cols : kBlockK), thread);
    constexpr int kChunks = kBlockK / kChunk, kStep = Shape::kThreads / kChunks;
    const int first = thread / kChunks, chunk = thread % kChunks;
    const int valid =
        clamp_chunk(static_cast<int>(cols < kBlockK ? cols : kBlockK) - chunk * kChunk);
#pragma unroll
    for (int i = 0; i < RN / kStep; ++i) {
      const T* a = row_of_a[first + i * kStep];
      const bool inside = a != nullptr && valid > 0;
      copy_chunk<kAligned>(tile_a(stage) + tile_offset<kBlockK>(first + i * kStep, chunk),
                           inside ? a + k + chunk * kChunk : static_cast<const T*>(p.x),
                           inside ? valid : 0);
    }
  }

  // A fragment of X for columns [16 * kk, 16 * kk + 16) of the tile.
  LK_DEVICE void load_x(const T* x, int kk, uint32_t (&a)[4]) const {
    ldmatrix_x4<false>(a, x + tile_offset<kBlockK>(16 * warp + lane % 16, 2 * kk + lane / 16));
  }

  // acc[j] += a * A^T for the column blocks j of 8 in [first, last).
  LK_DEVICE void multiply(const T* tile, int kk, const uint32_t (&a)[4], int first, int last) {
#pragma unroll
    for (int j = 0; j < RN / 8; j += 2) {
      if (j + 1 < first || j >= last) continue;
      uint32_t b[4];
      ldmatrix_x4<false>(
          b, tile + tile_offset<kBlockK>(8 * j + lane % 8 + lane / 16 * 8, 2 * kk + lane / 8 % 2));
      if (j >= first) mma_16816<T>(acc[j], a, b[0], b[1]);
      if (j + 1 < last) mma_16816<T>(acc[j + 1], a, b[2], b[3]);
    }
  }

  LK_DEVICE void consume(int stage) {
    const T *x = tile_x(stage), *a_tile = tile_a(stage);
#pragma unroll
    for (int kk = 0; kk < kBlockK / 16; ++kk) {
      uint32_t a[4];
      load_x(x, kk, a);
      multiply(a_tile, kk, a, 0, RN / 8);
    }
  }

  // The same with each member's columns from X under its mask. `block`: k / 128.
  LK_DEVICE void consume_dropped(int stage, int block, const DropoutKey& key) {
    const T *x = tile_x(stage), *a_tile = tile_a(stage);
    const int64_t row = row0 + 16 * warp + lane / 4;
    for (int g = 0; g < p.members; ++g) {
      const int64_t begin = p.member[g].padded_column - column0;
      const int64_t end = begin + padded_rank(p.member[g].rank);
      if (end <= 0 || begin >= RN) continue;
      const int first = begin < 0 ? 0 : static_cast<int>(begin / 8);
      const int last = static_cast<int>((end < RN ? end : RN) / 8);
#pragma unroll 1
      for (int odd = 0; odd < 2; ++odd) {  // k16 steps odd, odd + 2, odd + 4, odd + 6
        uint32_t w[4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          // Register i of the fragment: row + 8 (i % 2), pair + 4 (i / 2).
          key.words(row + 8 * (i % 2), block, 8 * odd + lane % 4 + 4 * (i / 2), g, w[i]);
        }
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          uint32_t a[4];
          load_x(x, 2 * step + odd, a);
#pragma unroll
          for (int i = 0; i < 4; ++i) a[i] = key.keep(a[i], w[i][step]);
          multiply(a_tile, 2 * step + odd, a, first, last);
        }
      }
    }
  }

  // Through shared memory to whole rows, after the last use of the tiles.
  LK_DEVICE void store() const {
    constexpr int kRow = RN + 2;  // floats of a staged row; 8 rows of one fragment in other banks
    float* staged = reinterpret_cast<float*>(tiles);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < RN / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * warp + lane / 4 + 8 * (i / 2);
        staged[row * kRow + 8 * j + 2 * (lane % 4) + i % 2] = acc[j][i];
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int e = thread; e < Shape::kRows * RN; e += Shape::kThreads) {
      const int64_t row = row0 + e / RN, column = column0 + e % RN;
      if (row >= p.m || column >= args.columns) continue;
      const float sum = staged[e / RN * kRow + e % RN];
      if (args.partials != nullptr) {
        args.partials[(blockIdx.z * p.m + row) * args.columns + column] = sum;
      } else {
        store_shrink<T>(p, row, column, sum);
      }
    }
  }
};

template <class T, int RN, bool kAligned>
__global__ void __launch_bounds__(ShrinkShape<RN>::kThreads, 1)
    shrink_kernel(const __grid_constant__ ShrinkArgs args) {
  using Shape = ShrinkShape<RN>;
  constexpr int kStages = Shape::kStages;
  LK_DYNAMIC_SHARED(shared);
  ShrinkBlock<T, RN, kAligned> block(args, shared);
  const DropoutKey key(args.p.dropout);
  const int64_t length = block.k_end - block.k_begin;
  const int steps = static_cast<int>((length + Shape::kBlockK - 1) / Shape::kBlockK);
  __syncthreads();  // row_of_a
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) block.load(block.k_begin + static_cast<int64_t>(s) * Shape::kBlockK, s);
    cp_async_commit();
  }
  for (int s = 0; s < steps; ++s) {
    cp_async_wait<kStages - 2>();
    pipeline_barrier();
    const int next = s + kStages - 1;
    if (next < steps) {
      block.load(block.k_begin + static_cast<int64_t>(next) * Shape::kBlockK, next % kStages);
    }
    cp_async_commit();
    if (args.p.dropout.threshold == 0) {
      block.consume(s % kStages);
    } else if (!key.drops_all) {
      const int64_t k = block.k_begin + static_cast<int64_t>(s) * Shape::kBlockK;
      block.consume_dropped(s % kStages, static_cast<int>(k / 128), key);
    }
  }
  cp_async_wait<0>();
  block.store();
}

// One thread per padded element: the shares in order.
template <class T>
__global__ void __launch_bounds__(256) shrink_sum_kernel(const __grid_constant__ ShrinkArgs args) {
  const int64_t count = args.p.m * args.columns;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= count) return;
  float sum = 0.0f;
  for (int z = 0; z < args.p.splits; ++z) sum += args.partials[z * count + i];
  store_shrink<T>(args.p, i / args.columns, i % args.columns, sum);
}

}  // namespace lora_kernels::lora_linear::cuda
