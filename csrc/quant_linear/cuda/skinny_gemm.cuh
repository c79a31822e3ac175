// Y = X W^T + scale U B^T + bias for 1 to 128 rows of X, W read packed and once per 64 rows.
//
// Math      y[m, n] = sum_k x[m, k] w[n, k] + scale sum_r u[m, r] b[n, r] + bias[n]
//           The product is formed as Y^T = W X^T: W is the operand of 16 rows, so a tensor core is
//           busy from the first row of X on, and each code is decoded once for up to 64 rows.
//           W is decoded in registers (packed_tile.cuh), rounded to T as dequantize rounds it.
//           U and its term: skinny_low_rank.cuh, in the same two launches.
// Shapes    X [M, K] row stride ldz; W as it is packed; Y [M, N] contiguous.
// Grid      x: WARPS x NT tiles of 16 columns of Y, behind them 16 ranks of U each; y: 8 MT rows of
//           X, z: share of K in steps of 128. A warp owns 16 NT columns and all rows of its block;
//           warps share the tile of X.
//           Up to 16 rows: MT 2, NT 1, 64 columns. More: MT 8, NT 2, 128 columns.
// Main loop a ring of STAGES steps (cp.async). A lane copies 16 (int8, fp8: 32) bytes of two rows
//           of W per step and tile, its statistics are loaded one step ahead. Tiles of eight rows
//           of X that hold none of the M rows are left out.
// Bytes     W and its statistics once per block of rows; X once per block of columns, from L2;
//           per share of K 4 bytes per element of Y written, and read once.
// Numerics  fp32, k in a fixed order per share; shares added in order by skinny_finish_kernel, then
//           the low-rank term; one rounding to T. The shares depend on N, K, the rank and the
//           number of multiprocessors, not on M: a row of Y has the same bits for every M up to 16,
//           and for every M from 17 to 128. Bitwise equal from run to run.
// Shared    one code table per lane (no bank conflicts); the 16-byte chunks of X are exchanged so
//           that each quarter of a warp reads eight different banks of 16 bytes.
// Resources (ptxas 13.0, sm_90; flat, int8, fp8, gptq, awq) up to 16 rows: 112, 116, 114, 107, 128
//           registers, 35, 48, 48, 32, 32 KiB of shared memory (U: 39). More rows: 228, 186, 186,
//           203, 231 registers, 75, 96, 96, 72, 72 KiB (U: 78). No spills.
// Limits    16-bit T; X with 16-byte rows; K, and whatever shares a scale along k, a multiple of
//           32; no act-order. The host dequantizes elsewhere.
#pragma once

#include "skinny_low_rank.cuh"

namespace lora_kernels::quant_linear::cuda {

template <class Reader_, int MT_, int NT_, int STAGES_>
struct SkinnyShape {
  using Reader = Reader_;
  static constexpr int MT = MT_, NT = NT_, STAGES = STAGES_, WARPS = 4;
  static constexpr int kBlocksPerSm = MT <= 2 ? 4 : 2;  // by registers
  static constexpr int kThreads = 32 * WARPS, kRows = 8 * MT, kColumns = kTileN * NT * WARPS;
  static constexpr size_t kTileX = static_cast<size_t>(kRows) * kTileK * 2;  // bytes
  static constexpr size_t kStage = kTileX + WARPS * NT * Reader::kStage;
  static constexpr size_t kShared = STAGES * kStage + Reader::kTables;
};

template <class T, class S>
struct SkinnyBlock {
  static constexpr int MT = S::MT, NT = S::NT;
  using Reader = typename S::Reader;

  // Tiles of X: 16 chunks of 8 elements per row, kTurn rows apart for one thread.
  static constexpr int kChunks = kTileK / 8, kTurn = S::kThreads / kChunks;
  static_assert(S::kRows % kTurn == 0 && kTurn % 2 == 0);  // a thread's rows share their swizzle

  const SkinnyArgs& args;
  const SkinnyParams& p;
  unsigned char* shared;  // tables, then stages
  int thread, lane, warp;
  int rows, active;  // of X in this block; tiles of eight that hold any of them
  int64_t m0, n0;
  const T* x_from;  // the thread's chunk of its first row
  int x_to, x_at;   // offsets in the tile of X: where it goes, what the lane reads
  Reader reader[NT];
  float acc[NT][MT][4];

  LK_DEVICE SkinnyBlock(const SkinnyArgs& args_, unsigned char* memory)
      : args(args_), p(args_.p), shared(memory), thread(threadIdx.x) {
    lane = thread % 32;
    warp = thread / 32;
    m0 = static_cast<int64_t>(blockIdx.y) * S::kRows;
    n0 = static_cast<int64_t>(blockIdx.x) * S::kColumns + warp * kTileN * NT;
    rows = static_cast<int>(p.m - m0 < S::kRows ? p.m - m0 : S::kRows);
    active = (rows + 7) / 8;
    const int row = thread / kChunks, chunk = thread % kChunks;
    x_from = static_cast<const T*>(p.z) + (m0 + row) * p.ldz + 8 * chunk;
    x_to = x_offset(row, chunk);
    x_at = x_offset(lane / 4, 4 * (lane % 4));
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      reader[nt].start(p.w, n0 + kTileN * nt, lane);
#pragma unroll
      for (int i = 0; i < MT; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[nt][i][e] = 0.0f;
      }
    }
  }

  LK_DEVICE unsigned char* stage_at(int stage) const {
    return shared + Reader::kTables + stage * S::kStage;
  }
  LK_DEVICE T* tile_x(int stage) const { return reinterpret_cast<T*>(stage_at(stage)); }
  LK_DEVICE unsigned char* tile_w(int stage, int nt) const {
    return stage_at(stage) + S::kTileX + (warp * NT + nt) * Reader::kStage;
  }

  // Element offset of chunk c of row r of the tile of X. The exchange touches the two lowest bits
  // of c, so chunk 4 t + i lies at that of chunk 4 t, exclusive or 8 i.
  LK_DEVICE static int x_offset(int row, int chunk) {
    return row * kTileK + 8 * (chunk ^ (chunk >> 3 | (row & 1) << 1));
  }

  LK_DEVICE void load(int step, int stage) const {
    const T* from = x_from + static_cast<int64_t>(step) * kTileK;
    const bool chunk_exists = step * kTileK + 8 * (thread % kChunks) < p.w.k;
#pragma unroll
    for (int i = 0; i < S::kRows / kTurn; ++i) {
      if (i * kTurn >= 8 * active) break;
      cp_async16_if(tile_x(stage) + x_to + i * kTurn * kTileK, from + i * kTurn * p.ldz,
                    chunk_exists && thread / kChunks + i * kTurn < rows);
    }
    const bool exists = step * kTileK + kRunK * (lane % 4) < p.w.k;
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      reader[nt].copy(p.w, step, exists, tile_w(stage, nt), lane);
    }
  }

  LK_DEVICE void load_statistics(int step, RawScale (&raw)[NT][2]) const {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        raw[nt][half] = reader[nt].statistics(p.w, step, half, lane);
      }
    }
  }

  LK_DEVICE void multiply(int stage, const RawScale (&raw)[NT][2]) {
    typename Reader::Codes codes[NT];
    float scale[NT][2];
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      codes[nt] = Reader::Codes::take(tile_w(stage, nt), lane);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        scale[nt][half] = Reader::scale(p.w, raw[nt][half], shared);
      }
    }
    const T* x = tile_x(stage);
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      uint32_t a[NT][2][4];
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          Reader::template fragment<T>(p.w, codes[nt], tile_w(stage, nt), 2 * pair + j, scale[nt],
                                       raw[nt], shared, lane, a[nt][j]);
        }
      }
#pragma unroll
      for (int i = 0; i < MT; ++i) {
        if (i > 0 && i >= active) break;
        const uint4 b = *reinterpret_cast<const uint4*>(x + (x_at ^ (8 * pair)) + 8 * i * kTileK);
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
          mma_16816<T>(acc[nt][i], a[nt][0], b.x, b.y);
          mma_16816<T>(acc[nt][i], a[nt][1], b.z, b.w);
        }
      }
    }
  }

  LK_DEVICE void store() const {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t n = n0 + kTileN * nt + lane / 4 + 8 * half;
        if (n >= p.w.n) continue;
        float bias = 0.0f;
        if (args.partials == nullptr && p.bias != nullptr) {
          bias = load_as_float(p.bias, n, p.bias_dtype);
        }
#pragma unroll
        for (int i = 0; i < MT; ++i) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int64_t m = m0 + 8 * i + 2 * (lane % 4) + e;
            if (m >= p.m) continue;
            const float value = acc[nt][i][2 * half + e];
            if (args.partials != nullptr) {
              *partial_at(args, blockIdx.z, m, n) = value;
            } else {
              narrow(value + bias, static_cast<T*>(p.c)[m * p.w.n + n]);
            }
          }
        }
      }
    }
  }
};

template <class T, class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksPerSm)
    skinny_gemm_kernel(const __grid_constant__ SkinnyArgs args) {
  constexpr int STAGES = S::STAGES;
  LK_DYNAMIC_SHARED(shared);
  if (static_cast<int>(blockIdx.x) >= args.tiles) {
    low_rank_tile<T, S::MT>(args, shared, static_cast<int>(blockIdx.x) - args.tiles);
    return;
  }
  SkinnyBlock<T, S> block(args, shared);
  const int first = static_cast<int>(blockIdx.z) * args.steps_per_part;
  const int last = first + args.steps_per_part, end = last < args.steps ? last : args.steps;
  RawScale raw[2][S::NT][2] = {};
  block.load_statistics(first, raw[0]);
#pragma unroll 1
  for (int s = 0; s < STAGES - 1; ++s) {
    if (first + s < end) block.load(first + s, s);
    cp_async_commit();
  }
  S::Reader::template fill_tables<S::kThreads>(args.p.w, shared, block.thread);
  int stage = 0;
  const auto step = [&](int s, const RawScale(&now)[S::NT][2], RawScale(&next)[S::NT][2]) {
    cp_async_wait<STAGES - 2>();
    pipeline_barrier();
    if (s + STAGES - 1 < end) {
      block.load(s + STAGES - 1, stage == 0 ? STAGES - 1 : stage - 1);
    }
    cp_async_commit();
    if (s + 1 < end) block.load_statistics(s + 1, next);
    block.multiply(stage, now);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
  };
#pragma unroll 1
  for (int s = first; s < end; s += 2) {
    step(s, raw[0], raw[1]);
    if (s + 1 < end) step(s + 1, raw[1], raw[0]);
  }
  cp_async_wait<0>();
  block.store();
}

}  // namespace lora_kernels::quant_linear::cuda
