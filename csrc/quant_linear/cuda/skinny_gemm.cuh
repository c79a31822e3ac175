// Y = X W^T + scaled_s B^T + bias for 1 to 128 rows of X, W read packed and once per 64 rows.
//
// Math      y[m, n] = sum_k x[m, k] w[n, k] + sum_r scaled_s[m, r] b[n, r] + bias[n]
//           The product is formed as Y^T = W X^T: W is the operand of 16 rows, so that a tensor core
//           is busy from the first row of X on, and each code is decoded once for up to 64 rows.
//           W is decoded in registers (packed_tile.cuh), rounded to T as dequantize rounds it.
// Shapes    X [M, K] row stride ldx; W as it is packed; scaled_s [M, padded rank], B [N, padded
//           rank]; Y [M, N] row stride ldy.
// Grid      x: WARPS x NT tiles of 16 columns of Y, y: 8 MT rows of X, z: share of K in steps of
//           128. A warp owns 16 NT columns and all rows of its block; the warps share the tile of X.
//           Up to 16 rows: MT 2, NT 1, 64 columns. More: MT 8, NT 2, 128 columns.
// Main loop a ring of STAGES steps (cp.async). A lane copies 16 (int8, fp8: 32) bytes of two rows
//           of W per step and tile, its statistics are loaded one step ahead. Tiles of eight rows
//           of X that hold none of the M rows are left out.
// Bytes     W and its statistics once per block of rows; X once per block of columns, from L2;
//           per share of K 4 bytes per element of Y written, and read once.
// Numerics  fp32, k in a fixed order per share, then the ranks (in the first share); shares added in
//           order by skinny_sum_kernel; one rounding to T. The shares depend on N, K and the number
//           of multiprocessors, not on M: a row of Y has the same bits for every M up to 16, and
//           for every M from 17 to 128. Bitwise equal from run to run.
// Shared    one code table per lane (no bank conflicts); the 16-byte chunks of X are exchanged so
//           that each quarter of a warp reads eight different banks of 16 bytes.
// Limits    16-bit T; X with 16-byte rows; K, and whatever shares a scale along k, a multiple of
//           32; no act-order. The host dequantizes elsewhere.
#pragma once

#include "../../common/barrier.cuh"
#include "../../common/mma.cuh"
#include "packed_tile.cuh"

namespace lora_kernels::quant_linear::cuda {

struct SkinnyArgs {
  SkinnyGemmParams p;
  int steps;           // of all of K
  int steps_per_part;  // the last part may have fewer
  float* partials;     // [parts, M, N], or null without a split
  int parts;
};

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

  const SkinnyArgs& args;
  const SkinnyGemmParams& p;
  unsigned char* shared;
  int thread, lane, warp, active;  // active: tiles of eight rows that hold any of the M
  int64_t m0, n0;
  Reader reader;
  float acc[NT][MT][4];

  LK_DEVICE SkinnyBlock(const SkinnyArgs& args_, unsigned char* memory)
      : args(args_),
        p(args_.p),
        shared(memory),
        thread(threadIdx.x),
        lane(thread % 32),
        warp(thread / 32),
        reader(args_.p.w, memory + S::STAGES * S::kStage, thread % 32) {
    m0 = static_cast<int64_t>(blockIdx.y) * S::kRows;
    n0 = static_cast<int64_t>(blockIdx.x) * S::kColumns + warp * kTileN * NT;
    const int64_t rows = p.m - m0 < S::kRows ? p.m - m0 : S::kRows;
    active = static_cast<int>((rows + 7) / 8);
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
      for (int i = 0; i < MT; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[nt][i][e] = 0.0f;
      }
    }
  }

  LK_DEVICE T* tile_x(int stage) const { return reinterpret_cast<T*>(shared + stage * S::kStage); }
  LK_DEVICE unsigned char* tile_w(int stage, int nt) const {
    return shared + stage * S::kStage + S::kTileX + (warp * NT + nt) * Reader::kStage;
  }
  LK_DEVICE TilePlace place(int nt) const { return {p.w, lane, n0 + kTileN * nt}; }

  // Element offset of chunk c (of 8 elements) of row r of the tile of X.
  LK_DEVICE static int x_offset(int row, int chunk) {
    return row * kTileK + 8 * (chunk ^ (chunk >> 3 | (row & 1) << 1));
  }

  LK_DEVICE void load(int step, int stage) const {
    const int64_t k0 = static_cast<int64_t>(step) * kTileK;
    constexpr int kChunks = kTileK / 8;
    const int chunk = thread % kChunks;
    const T* x = static_cast<const T*>(p.x);
#pragma unroll
    for (int i = 0; i < S::kRows * kChunks / S::kThreads; ++i) {
      const int row = thread / kChunks + i * (S::kThreads / kChunks);
      if (row >= 8 * active) break;
      const bool exists = m0 + row < p.m && k0 + 8 * chunk < p.w.k;
      cp_async16_if(tile_x(stage) + x_offset(row, chunk),
                    exists ? x + (m0 + row) * p.ldx + k0 + 8 * chunk : x, exists);
    }
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      if (n0 + kTileN * nt < p.w.n) reader.copy(place(nt), k0, tile_w(stage, nt));
    }
  }

  LK_DEVICE void load_statistics(int step, RawScale (&raw)[NT][2]) const {
    const int64_t k0 = static_cast<int64_t>(step) * kTileK;
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      if (n0 + kTileN * nt >= p.w.n) continue;
      for (int half = 0; half < 2; ++half) {
        raw[nt][half] = Reader::statistics(place(nt), k0, half);
      }
    }
  }

  LK_DEVICE void multiply(int stage, const RawScale (&raw)[NT][2]) {
    typename Reader::Codes codes[NT];
    float scale[NT][2];
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      codes[nt] = reader.take(tile_w(stage, nt), lane);
#pragma unroll
      for (int half = 0; half < 2; ++half) scale[nt][half] = reader.scale(p.w, raw[nt][half]);
    }
    const T* x = tile_x(stage);
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      uint32_t a[NT][2][4];
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          reader.template fragment<T>(place(nt), codes[nt], tile_w(stage, nt), 2 * pair + j,
                                      scale[nt], raw[nt], a[nt][j]);
        }
      }
#pragma unroll
      for (int i = 0; i < MT; ++i) {
        if (i >= active) break;
        const uint4 b = *reinterpret_cast<const uint4*>(
            x + x_offset(8 * i + lane / 4, 4 * (lane % 4) + pair));
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
          mma_16816<T>(acc[nt][i], a[nt][0], b.x, b.y);
          mma_16816<T>(acc[nt][i], a[nt][1], b.z, b.w);
        }
      }
    }
  }

  // Two elements of a row that exists, else zeros.
  LK_DEVICE static uint32_t pair_of(const void* data, int64_t row, int64_t ld, int64_t column,
                                    bool exists) {
    if (!exists) return 0u;
    return *reinterpret_cast<const uint32_t*>(static_cast<const T*>(data) + row * ld + column);
  }

  // The low-rank term, 16 ranks at a time into the same accumulators.
  LK_DEVICE void multiply_adapter() {
#pragma unroll 1
    for (int64_t r = 2 * (lane % 4); r < p.padded_rank + 2 * (lane % 4); r += 16) {
      const bool low = r < p.padded_rank, high = r + 8 < p.padded_rank;
      uint32_t a[NT][4];
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        const TilePlace at = place(nt);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          a[nt][half] = pair_of(p.b, at.row(half), p.ldb, r, low);
          a[nt][2 + half] = pair_of(p.b, at.row(half), p.ldb, r + 8, high);
        }
      }
#pragma unroll
      for (int i = 0; i < MT; ++i) {
        if (i >= active) break;
        const int64_t row = m0 + 8 * i + lane / 4;
        const uint32_t b0 = pair_of(p.scaled_s, row, p.ld_scaled, r, low && row < p.m);
        const uint32_t b1 = pair_of(p.scaled_s, row, p.ld_scaled, r + 8, high && row < p.m);
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) mma_16816<T>(acc[nt][i], a[nt], b0, b1);
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
              args.partials[(blockIdx.z * p.m + m) * p.w.n + n] = value;
            } else {
              narrow(value + bias, static_cast<T*>(p.y)[m * p.ldy + n]);
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
  SkinnyBlock<T, S> block(args, shared);
  const int first = static_cast<int>(blockIdx.z) * args.steps_per_part;
  const int end = first + args.steps_per_part < args.steps ? first + args.steps_per_part : args.steps;
  RawScale raw[2][S::NT][2] = {};
  block.load_statistics(first, raw[0]);
#pragma unroll 1
  for (int s = 0; s < STAGES - 1; ++s) {
    if (first + s < end) block.load(first + s, s);
    cp_async_commit();
  }
  block.reader.template fill_tables<S::kThreads>(args.p.w, block.thread);  // seen after a barrier
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
  if (blockIdx.z == 0 && args.p.padded_rank > 0) block.multiply_adapter();
  block.store();
}

// One thread per element of Y: the shares in order.
template <class T>
__global__ void __launch_bounds__(256) skinny_sum_kernel(const __grid_constant__ SkinnyArgs args) {
  const SkinnyGemmParams& p = args.p;
  const int64_t count = p.m * p.w.n;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= count) return;
  float total = 0.0f;
  for (int z = 0; z < args.parts; ++z) total += args.partials[z * count + i];
  const int64_t m = i / p.w.n, n = i - m * p.w.n;
  if (p.bias != nullptr) total += load_as_float(p.bias, n, p.bias_dtype);
  narrow(total, static_cast<T*>(p.y)[m * p.ldy + n]);
}

}  // namespace lora_kernels::quant_linear::cuda
