// dX = dY W + keep (scale U A), U = u_scale dY B, for 1 to 128 rows of dY; W is read packed.
//
// Math      dx[m, k] = sum_n dy[m, n] w[n, k] + keep(m, k) scale sum_r u[m, r] a[r, k]
//           The product is formed as dX^T = W^T dY^T: columns of W are the operand of 16 rows,
//           decoded in registers (packed_columns.cuh) and rounded to T as dequantize rounds them.
//           U and its term: skinny_low_rank.cuh, in the same two launches.
// Shapes    dY [M, N] row stride ldz, zeros in columns N up to the next multiple of 8; W as it is
//           packed; dX [M, K] contiguous.
// Grid      x: 256 columns of dX, behind them 16 ranks of U each; y: 8 MT rows of dY; z: share of
//           N in steps of 128. A warp owns 64 columns and all rows of its block; warps share the
//           tile of dY. Up to 16 rows: MT 2. More: MT 8.
// Main loop a ring of three tiles of 64 n (cp.async): codes, and dY. Statistics are loaded a tile
//           ahead, turned into one fp32 scale per row and run of 32 columns, and read from shared
//           memory by all lanes that need them.
// Bytes     W and its statistics once per block of rows; dY once per 256 columns, from L2; per
//           share of N 4 bytes per element of dX written, and read once.
// Numerics  fp32, n in a fixed order per share; shares added in order, then the low-rank term; one
//           rounding to T. The shares depend on N, K, the rank and the number of multiprocessors,
//           not on M: a row of dX has the same bits for every M up to 16, and for 17 to 128.
// Shared    chunks are exchanged so that lanes that read together read different banks.
// Resources (ptxas 13.0, sm_90; flat, int8, fp8, gptq, awq) up to 16 rows: 128, 159, 152, 124, 118
//           registers, 37, 58, 58, 38, 38 KiB of shared memory (U: 39). More rows: 240, 254, 250,
//           226, 236 registers, 55, 76, 76, 56, 56 KiB (U: 78). No spills.
// Limits    those of skinny_gemm.cuh; any N.
#pragma once

#include "packed_columns.cuh"
#include "skinny_low_rank.cuh"

namespace lora_kernels::quant_linear::cuda {

template <class Reader_, int MT_>
struct DgradShape {
  using Reader = Reader_;
  static constexpr int MT = MT_, kThreads = kColumnsThreads, kRows = 8 * MT, kStages = 3;
  // By registers; fewer for int8 and fp8, which shared memory limits too.
  static constexpr int kBlocksPerSm = MT > 2 ? 2 : Reader::kStage > 8192 ? 3 : 4;
  static constexpr int kRuns = kColumnsK / kRunK;                       // of a tile
  static constexpr int kOwn = kRuns * kColumnsN / kThreads;             // statistics per thread
  static constexpr size_t kTileY = static_cast<size_t>(kRows) * kColumnsN * 2;  // bytes
  static constexpr size_t kStage = kTileY + Reader::kStage;
  static constexpr size_t kStatistics = static_cast<size_t>(kRuns) * kColumnsN * 4;
  static constexpr size_t kOfTile = (Reader::kZeros ? 2 : 1) * kStatistics;
  static constexpr size_t kShared = Reader::kTables + 2 * kOfTile + kStages * kStage;
};

template <class T, class S>
struct DgradBlock {
  static constexpr int MT = S::MT;
  using Reader = typename S::Reader;

  const SkinnyArgs& args;
  const SkinnyParams& p;
  unsigned char* shared;  // tables, statistics of two tiles, stages
  int thread, lane, warp, rows;
  int64_t m0, k0;
  float acc[4][MT][4];

  LK_DEVICE DgradBlock(const SkinnyArgs& args_, unsigned char* memory)
      : args(args_), p(args_.p), shared(memory), thread(threadIdx.x) {
    lane = thread % 32;
    warp = thread / 32;
    m0 = static_cast<int64_t>(blockIdx.y) * S::kRows;
    k0 = static_cast<int64_t>(blockIdx.x) * kColumnsK;
    rows = static_cast<int>(p.m - m0 < S::kRows ? p.m - m0 : S::kRows);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int i = 0; i < MT; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[j][i][e] = 0.0f;
      }
    }
  }

  LK_DEVICE unsigned char* tile_y(int stage) const {
    return shared + Reader::kTables + 2 * S::kOfTile + stage * S::kStage;
  }
  LK_DEVICE float* scales(int tile) const {
    return reinterpret_cast<float*>(shared + Reader::kTables + tile % 2 * S::kOfTile);
  }
  LK_DEVICE uint32_t* zeros(int tile) const {
    return reinterpret_cast<uint32_t*>(shared + Reader::kTables + tile % 2 * S::kOfTile +
                                       S::kStatistics);
  }

  // Bytes from the start of a tile of dY: eight chunks of eight n's per row.
  LK_DEVICE static int place(int row, int chunk) {
    return 16 * (8 * row + (chunk ^ (4 * (row & 1))));
  }

  LK_DEVICE void load(int tile, int stage) const {
    const int64_t n0 = static_cast<int64_t>(tile) * kColumnsN;
    unsigned char* y = tile_y(stage);
#pragma unroll
    for (int i = 0; i < S::kRows * 8 / S::kThreads; ++i) {
      const int c = thread + i * S::kThreads, row = c / 8, chunk = c % 8;
      cp_async16_if(y + place(row, chunk),
                    static_cast<const T*>(p.z) + (m0 + row) * p.ldz + n0 + 8 * chunk,
                    row < rows && n0 + 8 * chunk < p.w.n);
    }
    Reader::copy(p.w, n0, k0, y + S::kTileY, thread);
  }

  // Statistics of row n0 + thread % 64 of a tile: kOwn runs.
  LK_DEVICE void load_statistics(int tile, RawScale (&raw)[S::kOwn]) const {
    int64_t n = static_cast<int64_t>(tile) * kColumnsN + thread % kColumnsN;
    if (n >= p.w.n) n = p.w.n - 1;
#pragma unroll
    for (int i = 0; i < S::kOwn; ++i) {
      int64_t run = k0 / kRunK + thread / kColumnsN * S::kOwn + i;
      if (run >= p.w.k / kRunK) run = p.w.k / kRunK - 1;
      raw[i] = Reader::raw(p.w, n, run);
    }
  }

  LK_DEVICE void store_statistics(int tile, const RawScale (&raw)[S::kOwn]) const {
#pragma unroll
    for (int i = 0; i < S::kOwn; ++i) {
      const int at = (thread / kColumnsN * S::kOwn + i) * kColumnsN + thread % kColumnsN;
      scales(tile)[at] = Reader::scale(p.w, raw[i], shared);
      if constexpr (Reader::kZeros) zeros(tile)[at] = raw[i].code;
    }
  }

  LK_DEVICE void multiply(int tile, int stage) {
    const int g = lane / 4, t = lane % 4;
    const unsigned char* y = tile_y(stage);
#pragma unroll 1
    for (int q = 0; q < 2; ++q) {
#pragma unroll(MT <= 2 ? 2 : 1)  // more rows: registers
      for (int h = 0; h < 2; ++h) {
        uint32_t b[MT][2];
#pragma unroll
        for (int i = 0; i < MT; ++i) {
          if (i > 0 && 8 * i >= rows) break;
          memcpy(b[i], y + place(8 * i + g, 4 * q + t) + 8 * h, 8);
        }
        const int n = 32 * q + 8 * t + 4 * h;
        const int at = (2 * warp + g / 4) * kColumnsN + n;
        const auto codes = Reader::take(y + S::kTileY, n, warp, lane);
        float scale[4];
        uint32_t zero[4] = {};
        memcpy(scale, scales(tile) + at, 16);
        if constexpr (Reader::kZeros) memcpy(zero, zeros(tile) + at, 16);
#pragma unroll
        for (int jj = 0; jj < 2; ++jj) {
          float v[4][4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            Reader::values(p.w, codes, i, h, jj, scale[i], zero[i], shared, lane, v[i]);
          }
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int c = 2 * j;
            const uint32_t a[4] = {pack2<T>(v[0][c], v[1][c]), pack2<T>(v[0][c + 1], v[1][c + 1]),
                                   pack2<T>(v[2][c], v[3][c]), pack2<T>(v[2][c + 1], v[3][c + 1])};
            const uint32_t swapped[4] = {a[2], a[3], a[0], a[1]};
#pragma unroll
            for (int i = 0; i < MT; ++i) {
              if (i > 0 && 8 * i >= rows) break;
              mma_16816<T>(acc[2 * jj + j][i], LK_FAULT(kFragmentOrder) ? swapped : a,
                           b[i][0], b[i][1]);
            }
          }
        }
      }
    }
  }

  LK_DEVICE void store() const {
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t m = m0 + 8 * i + 2 * (lane % 4) + e;
        if (m >= p.m) continue;
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          const int64_t k = k0 + 64 * warp + 8 * (lane / 4) + c;
          if (k >= p.w.k) continue;
          const float value = acc[c / 2][i][2 * (c % 2) + e];
          if (args.partials != nullptr) {
            *partial_at(args, blockIdx.z, m, k) = value;
          } else {
            narrow(value, static_cast<T*>(p.c)[m * p.w.k + k]);
          }
        }
      }
    }
  }
};

template <class T, class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksPerSm)
    skinny_dgrad_kernel(const __grid_constant__ SkinnyArgs args) {
  constexpr int kStages = S::kStages, kPerStep = kTileK / kColumnsN;
  LK_DYNAMIC_SHARED(shared);
  if (static_cast<int>(blockIdx.x) >= args.tiles) {
    low_rank_tile<T, S::MT>(args, shared, static_cast<int>(blockIdx.x) - args.tiles);
    return;
  }
  DgradBlock<T, S> block(args, shared);
  const int first = static_cast<int>(blockIdx.z) * args.steps_per_part * kPerStep;
  const int tiles = static_cast<int>((args.sum + kColumnsN - 1) / kColumnsN);
  const int last = first + args.steps_per_part * kPerStep, end = last < tiles ? last : tiles;
  RawScale raw[S::kOwn];
  block.load_statistics(first, raw);
#pragma unroll 1
  for (int s = 0; s < kStages - 1; ++s) {
    if (first + s < end) block.load(first + s, s);
    cp_async_commit();
  }
  S::Reader::template fill_tables<S::kThreads>(args.p.w, shared, block.thread);
  __syncthreads();  // the tables, which statistics are made with
  int stage = 0;
#pragma unroll 1
  for (int s = first; s < end; ++s) {
    block.store_statistics(s, raw);
    cp_async_wait<kStages - 2>();
    pipeline_barrier();
    if (s + kStages - 1 < end) {
      block.load(s + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
    }
    cp_async_commit();
    if (s + 1 < end) block.load_statistics(s + 1, raw);
    block.multiply(s, stage);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  cp_async_wait<0>();
  block.store();
}

}  // namespace lora_kernels::quant_linear::cuda
