// dA_g = dS_g^T drop_g(X) for all members of a group, with one read of X.
//
// Math      da[c, k] = sum_m ds[m, c] keep_g(m, k) x[m, k]       (dS carries 1 / P(keep) already)
// Shapes    X [M, K] row stride ldx, dS [M, padded columns of the group] row stride ldds, dA_g
//           [rank, K] in a dtype of its own.
// Grid      x: 256 columns of X, y: RN padded columns of dS, z: share of M in steps of 32 rows.
//           Eight warps of 32 columns each; the product is formed as [K, rank] = X^T dS, with X as
//           the A operand read by transposing loads.
// Bytes     X once (once per RN columns beyond 64), dS once per 256 columns from L2; per share of M
//           4 bytes per element of the padded dA written, and read once.
// Numerics  fp32 accumulation; shares added in order by da_sum_kernel; one rounding to the dtype
//           of dA.
// Dropout   a masked copy of the tile is made in shared memory, one generator call per row and
//           eight columns; a group makes one copy per member.
// Resources (ptxas 13.0, sm_80) at RN = 16, 32, 64: 116, 134, 184 registers; 68, 72, 80 KiB of
//           shared memory, 16 more with dropout; 1 block per SM by registers. No spills.
// Limits    16-bit T, rank <= 256, members <= 8; M < 2^31 rows, K < 2^31.
#pragma once

#include "../../common/barrier.cuh"
#include "../../common/mma.cuh"
#include "../../common/tile.cuh"
#include "dropout.cuh"
#include "split.h"

namespace lora_kernels::lora_linear::cuda {

struct DaArgs {
  DaParams p;
  int columns;  // padded, of the whole group
  int splits;
  int64_t rows_per_split;  // multiple of 32
  int64_t elements;        // sum of rank * K over the members whose dA is wanted
  float* partials;         // [splits, columns, K]
};

template <int RN>
struct DaShape {
  static constexpr int kRows = 32, kColumns = 256, kThreads = 256;
  static constexpr int kStages = 4;
  static constexpr int kTileX = kRows * kColumns, kTileS = kRows * RN;
  static constexpr size_t shared(bool drops) {
    return (kStages * (kTileX + kTileS) + (drops ? kTileX : 0)) * 2;
  }
};

template <class T, int RN, bool kAligned>
struct DaBlock {
  using Shape = DaShape<RN>;
  static constexpr int kRows = Shape::kRows, kColumns = Shape::kColumns;

  const DaArgs& args;
  const DaParams& p;
  T* shared;
  int thread, lane, warp;
  int64_t k0, column0, m_begin, m_end;
  float acc[2][RN / 8][4];

  LK_DEVICE DaBlock(const DaArgs& args_, unsigned char* memory)
      : args(args_), p(args_.p), shared(reinterpret_cast<T*>(memory)), thread(threadIdx.x) {
    lane = thread % 32;
    warp = thread / 32;
    k0 = static_cast<int64_t>(blockIdx.x) * kColumns;
    column0 = static_cast<int64_t>(blockIdx.y) * RN;
    m_begin = static_cast<int64_t>(blockIdx.z) * args.rows_per_split;
    m_end = m_begin + args.rows_per_split < p.m ? m_begin + args.rows_per_split : p.m;
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < RN / 8; ++j) {
        for (int e = 0; e < 4; ++e) acc[i][j][e] = 0.0f;
      }
    }
  }

  LK_DEVICE T* tile_x(int stage) const { return shared + stage * (Shape::kTileX + Shape::kTileS); }
  LK_DEVICE T* tile_s(int stage) const { return tile_x(stage) + Shape::kTileX; }
  LK_DEVICE T* masked() const { return tile_x(Shape::kStages); }

  LK_DEVICE void load(int i, int stage) const {
    const int64_t m = m_begin + static_cast<int64_t>(i) * kRows;
    const int rows = static_cast<int>(m_end - m < kRows ? m_end - m : kRows);
    const int cols = static_cast<int>(p.k - k0 < kColumns ? p.k - k0 : kColumns);
    const int64_t ranks = args.columns - column0;
    load_tile<kRows, kColumns, Shape::kThreads, kAligned>(
        tile_x(stage), static_cast<const T*>(p.x) + m * p.ldx + k0, p.ldx, rows, cols, thread);
    load_tile<kRows, RN, Shape::kThreads, kAligned>(
        tile_s(stage), static_cast<const T*>(p.ds) + m * p.ldds + column0, p.ldds, rows,
        static_cast<int>(ranks < RN ? ranks : RN), thread);
  }

  // acc[., j] += X^T dS for the column blocks j of 8 in [first, last).
  LK_DEVICE void multiply(const T* x, const T* s_tile, int first, int last) {
#pragma unroll
    for (int kk = 0; kk < kRows / 16; ++kk) {
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = 16 * kk + lane % 8 + lane / 16 * 8;
        ldmatrix_x4<true>(a[i], x + tile_offset<kColumns>(row, 4 * warp + 2 * i + lane / 8 % 2));
      }
#pragma unroll
      for (int j = 0; j < RN / 8; j += 2) {
        if (j + 1 < first || j >= last) continue;
        uint32_t b[4];
        ldmatrix_x4<true>(b, s_tile + tile_offset<RN>(16 * kk + lane % 16, j + lane / 16));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (j >= first) mma_16816<T>(acc[i][j], a[i], b[0], b[1]);
          if (j + 1 < last) mma_16816<T>(acc[i][j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }

  // masked() = tile * keep mask of member g. A warp takes rows r and r + 4, whose swizzles put the
  // same columns into different banks.
  LK_DEVICE void mask_tile(const T* x, int64_t m, int g, const DropoutKey& key) const {
    const int pair = lane % 16;
#pragma unroll 2
    for (int i = 0; i < kRows / 16; ++i) {
      const int row = 16 * i + warp % 4 + 4 * (lane / 16) + 8 * (warp / 4);
#pragma unroll
      for (int block = 0; block < kColumns / 128; ++block) {
        uint32_t w[4];
        key.words(m + row, static_cast<int>(k0 / 128) + block, pair, g, w);
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          const int chunk = 16 * block + 4 * step + pair / 4;
          const int at = tile_offset<kColumns>(row, chunk) + 2 * (pair % 4);
          const uint32_t value = *reinterpret_cast<const uint32_t*>(x + at);
          *reinterpret_cast<uint32_t*>(masked() + at) = key.keep(value, w[step]);
        }
      }
    }
  }

  LK_DEVICE void consume_dropped(int i, int stage, const DropoutKey& key) {
    const int64_t m = m_begin + static_cast<int64_t>(i) * kRows;
    for (int g = 0; g < p.members; ++g) {
      const int64_t begin = p.member[g].padded_column - column0;
      const int64_t end = begin + padded_rank(p.member[g].rank);
      if (end <= 0 || begin >= RN || p.member[g].da == nullptr) continue;
      __syncthreads();  // the previous copy has been read
      mask_tile(tile_x(stage), m, g, key);
      __syncthreads();
      multiply(masked(), tile_s(stage), begin < 0 ? 0 : static_cast<int>(begin / 8),
               static_cast<int>((end < RN ? end : RN) / 8));
    }
  }

  LK_DEVICE void store() const {
    float* out = args.partials + static_cast<int64_t>(blockIdx.z) * args.columns * p.k;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < RN / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int64_t k = k0 + 32 * warp + 16 * i + lane / 4 + 8 * (e / 2);
          const int64_t column = column0 + 8 * j + 2 * (lane % 4) + e % 2;
          if (k < p.k && column < args.columns) out[column * p.k + k] = acc[i][j][e];
        }
      }
    }
  }
};

template <class T, int RN, bool kAligned>
__global__ void __launch_bounds__(DaShape<RN>::kThreads, 1)
    da_kernel(const __grid_constant__ DaArgs args) {
  using Shape = DaShape<RN>;
  constexpr int kStages = Shape::kStages;
  LK_DYNAMIC_SHARED(shared);
  DaBlock<T, RN, kAligned> block(args, shared);
  const DropoutKey key(args.p.dropout);
  const int steps =
      static_cast<int>((block.m_end - block.m_begin + Shape::kRows - 1) / Shape::kRows);
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) block.load(s, s);
    cp_async_commit();
  }
  for (int s = 0; s < steps; ++s) {
    cp_async_wait<kStages - 2>();
    pipeline_barrier();
    const int next = s + kStages - 1, stage = s % kStages;
    if (next < steps) block.load(next, next % kStages);
    cp_async_commit();
    if (args.p.dropout.threshold == 0) {
      block.multiply(block.tile_x(stage), block.tile_s(stage), 0, RN / 8);
    } else if (!key.drops_all) {
      block.consume_dropped(s, stage, key);
    }
  }
  block.store();
}

// One thread per element of the dAs.
__global__ void __launch_bounds__(256) da_sum_kernel(const __grid_constant__ DaArgs args) {
  const DaParams& p = args.p;
  int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= args.elements) return;
  int g = 0;
  for (; g < p.members; ++g) {
    if (p.member[g].da == nullptr) continue;
    const int64_t count = p.member[g].rank * p.k;
    if (i < count) break;
    i -= count;
  }
  const DaMember& w = p.member[g];
  const int64_t c = i / p.k, k = i % p.k;
  const float* in = args.partials + (w.padded_column + c) * p.k + k;
  float sum = 0.0f;
  for (int z = 0; z < args.splits; ++z) sum += in[z * args.columns * p.k];
  store_from_float(w.da, c * w.ldda + k, w.da_dtype, sum);
}

}  // namespace lora_kernels::lora_linear::cuda
