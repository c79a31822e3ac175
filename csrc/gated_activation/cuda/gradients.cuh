// Gradients of the activation, and dS and dB of the layers that made gate and up on the way.
//
// Math      dg = dh u act'(g), du = dh act(g), rounded to T;  with d_0 = dg, d_1 = du
//           ds_j[m, c] = scaling_j sum_n d_j[m, n] b_j[n, c]
//           db_j[n, c] = scaling_j sum_m d_j[m, n] s_j[m, c]
// Shapes    dh, g, u [M, N] with row strides; dg, du [M, N]; B_j [N, rank], S_j [M, rank]; dS
//           [M, columns]; dB_j [N, rank] in a dtype of its own.
// Grid      x: 128 columns, y: share of M in steps of 32 rows. Eight warps. A step computes a
//           [32, 128] tile of dg and one of du in registers, and puts them to memory and to shared
//           memory, where each is the A operand of two products: read as rows for dS, by transposing
//           loads as columns for dB. Plain: a thread per chunk of 8.
// Bytes     dh, g, u read, dg, du written (10 M N); dS partial sums 8 M columns per 128 columns of
//           N, dB 8 N rank per share. The operands of the next step are under way during a step.
// Numerics  fp32; dg and du rounded once, the rounded ones are the operands; partial sums added in
//           a fixed order, scaled, rounded once.
// Limits    16-bit T, ranks up to 32; 2^31 - 1 blocks.
#pragma once

#include "../../common/barrier.cuh"
#include "../../common/mma.cuh"
#include "../../common/tile.cuh"
#include "elementwise.cuh"

namespace lora_kernels::gated_activation::cuda {

constexpr int kSumThreads = 256;

struct GradientArgs {
  GradientParams p;
  int64_t rows_per_split;  // multiple of 32
  int column_blocks, splits;
  float* ds_partials;     // [column_blocks, M, columns]
  float* db_partials[2];  // [splits, N, rank]
};

template <int RN_>
struct GradientShape {
  static constexpr int RN = RN_, kRows = 32, kColumns = 128, kThreads = 256, kStages = 2;
  static constexpr int kChunks = kRows * kColumns / kElements / kThreads;  // of a thread
  static constexpr int kTileD = kRows * kColumns, kTileS = kRows * RN, kTileB = kColumns * RN;
  static constexpr int kStage = 2 * (kTileD + kTileS);  // both members
  static constexpr size_t kShared = (kStages * kStage + 2 * kTileB) * 2;
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kSumThreads)
    gradients_kernel(const __grid_constant__ GradientParams p) {
  const int64_t chunks = (p.n + kElements - 1) / kElements;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (i >= p.m * chunks) return;
  const int64_t row = i / chunks, n = i % chunks * kElements;
  const int valid = static_cast<int>(p.n - n < kElements ? p.n - n : kElements);
  const bool gated = p.up != nullptr;
  uint32_t d[4], g[4], u[4] = {}, dg[4], du[4];
  load_chunk<kAligned>(d, static_cast<const T*>(p.dh) + row * p.ldh + n, valid);
  load_chunk<kAligned>(g, static_cast<const T*>(p.gate) + row * p.ldg + n, valid);
  if (gated) load_chunk<kAligned>(u, static_cast<const T*>(p.up) + row * p.ldu + n, valid);
  gradients_chunk<T>(dg, du, d, g, u, p.kind, gated);
  store_chunk<kAligned>(static_cast<T*>(p.dgate) + row * p.n + n, dg, valid);
  if (gated) store_chunk<kAligned>(static_cast<T*>(p.dup) + row * p.n + n, du, valid);
}

template <class T, class Shape, bool kAligned>
struct GradientBlock {
  static constexpr int RN = Shape::RN, kHalf = RN / 2, kColumns = Shape::kColumns;
  static constexpr int kRows = Shape::kRows, kRowChunks = kColumns / kElements;
  static constexpr int kStep = Shape::kThreads / kRowChunks;  // rows per turn

  const GradientArgs& args;
  const GradientParams& p;
  T* shared;
  int thread, lane, warp, first, chunk;
  int64_t n0, m_begin, m_end;
  bool gated;
  uint32_t dh[Shape::kChunks][4], g[Shape::kChunks][4], u[Shape::kChunks][4];
  float db[2][RN / 8][4];

  LK_DEVICE GradientBlock(const GradientArgs& args_, unsigned char* memory)
      : args(args_), p(args_.p), shared(reinterpret_cast<T*>(memory)), thread(threadIdx.x) {
    lane = thread % 32;
    warp = thread / 32;
    first = thread / kRowChunks;
    chunk = thread % kRowChunks;
    n0 = static_cast<int64_t>(blockIdx.x) * kColumns;
    m_begin = static_cast<int64_t>(blockIdx.y) * args.rows_per_split;
    m_end = m_begin + args.rows_per_split < p.m ? m_begin + args.rows_per_split : p.m;
    gated = p.up != nullptr;
    for (int j = 0; j < 2; ++j) {
      for (int c = 0; c < RN / 8; ++c) {
        for (int e = 0; e < 4; ++e) db[j][c][e] = 0.0f;
      }
    }
    for (int i = 0; i < Shape::kChunks; ++i) {
      for (int e = 0; e < 4; ++e) u[i][e] = 0;
    }
  }

  LK_DEVICE T* tile_b(int member) const { return shared + member * Shape::kTileB; }
  LK_DEVICE T* tile_d(int stage, int member) const {
    return shared + 2 * Shape::kTileB + stage * Shape::kStage + member * Shape::kTileD;
  }
  LK_DEVICE T* tile_s(int stage, int member) const {
    return tile_d(stage, 0) + 2 * Shape::kTileD + member * Shape::kTileS;
  }

  // Elements of this thread's chunk of row m + first + i * kStep that exist.
  LK_DEVICE int valid(int64_t m, int i) const {
    const int64_t n = n0 + chunk * kElements;
    if (m + first + i * kStep >= m_end || n >= p.n) return 0;
    return clamp_chunk(static_cast<int>(p.n - n < kElements ? p.n - n : kElements));
  }

  LK_DEVICE void fetch(int64_t m) {
    const int64_t n = n0 + chunk * kElements;
#pragma unroll
    for (int i = 0; i < Shape::kChunks; ++i) {
      const int64_t row = m + first + i * kStep;
      const int exist = valid(m, i);
      load_chunk<kAligned>(dh[i], static_cast<const T*>(p.dh) + row * p.ldh + n, exist);
      load_chunk<kAligned>(g[i], static_cast<const T*>(p.gate) + row * p.ldg + n, exist);
      if (gated) load_chunk<kAligned>(u[i], static_cast<const T*>(p.up) + row * p.ldu + n, exist);
    }
  }

  LK_DEVICE void load_b() const {
    const int64_t left = p.n - n0;
    for (int j = 0; j < p.members; ++j) {
      load_tile<kColumns, RN, Shape::kThreads, kAligned>(
          tile_b(j), static_cast<const T*>(p.member[j].b) + n0 * p.member[j].ldb, p.member[j].ldb,
          static_cast<int>(left < kColumns ? left : kColumns), p.member[j].rank, thread);
    }
  }

  LK_DEVICE void load_s(int64_t m, int stage) const {
    const int rows = static_cast<int>(m_end - m < kRows ? m_end - m : kRows);
    for (int j = 0; j < p.members; ++j) {
      const GradientMember& w = p.member[j];
      if (w.s == nullptr) continue;
      load_tile<kRows, RN, Shape::kThreads, kAligned>(
          tile_s(stage, j), static_cast<const T*>(w.s) + m * w.lds, w.lds, rows, w.rank, thread);
    }
  }

  LK_DEVICE void compute(int64_t m, int stage) {
    const int64_t n = n0 + chunk * kElements;
#pragma unroll
    for (int i = 0; i < Shape::kChunks; ++i) {
      const int exist = valid(m, i), row = first + i * kStep;
      uint32_t dg[4] = {}, du[4] = {};
      if (exist > 0) {
        gradients_chunk<T>(dg, du, dh[i], g[i], u[i], p.kind, gated);
        store_chunk<kAligned>(static_cast<T*>(p.dgate) + (m + row) * p.n + n, dg, exist);
        if (gated) store_chunk<kAligned>(static_cast<T*>(p.dup) + (m + row) * p.n + n, du, exist);
      }
      const int at = tile_offset<kColumns>(row, chunk);
      *reinterpret_cast<uint4*>(tile_d(stage, 0) + at) = make_uint4(dg[0], dg[1], dg[2], dg[3]);
      if (gated) {
        *reinterpret_cast<uint4*>(tile_d(stage, 1) + at) = make_uint4(du[0], du[1], du[2], du[3]);
      }
    }
  }

  // Warp: 16 rows (warp % 2), a member (warp / 2 % 2), half of its ranks (warp / 4).
  LK_DEVICE void multiply_ds(int64_t m, int stage) const {
    const int member = warp / 2 % 2, rank = warp / 4 * kHalf;
    if (member >= p.members) return;
    const T *d = tile_d(stage, member), *b_tile = tile_b(member);
    float acc[kHalf / 8][4] = {};
#pragma unroll
    for (int kk = 0; kk < kColumns / 16; ++kk) {
      uint32_t a[4];
      ldmatrix_x4<false>(
          a, d + tile_offset<kColumns>(16 * (warp % 2) + lane % 16, 2 * kk + lane / 16));
      const int row = 16 * kk + lane % 16;
      if constexpr (kHalf == 8) {
        uint32_t b[2];
        ldmatrix_x2<true>(b, b_tile + tile_offset<RN>(row, rank / 8));
        mma_16816<T>(acc[0], a, b[0], b[1]);
      } else {
        uint32_t b[4];
        ldmatrix_x4<true>(b, b_tile + tile_offset<RN>(row, rank / 8 + lane / 16));
        mma_16816<T>(acc[0], a, b[0], b[1]);
        mma_16816<T>(acc[kHalf / 8 - 1], a, b[2], b[3]);
      }
    }
    const GradientMember& w = p.member[member];
    float* out = args.ds_partials + static_cast<int64_t>(blockIdx.x) * p.m * p.columns;
#pragma unroll
    for (int j = 0; j < kHalf / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t at = m + 16 * (warp % 2) + lane / 4 + 8 * (e / 2);
        const int column = rank + 8 * j + 2 * (lane % 4) + e % 2;
        if (at < m_end && column < w.rank) out[at * p.columns + w.column + column] = acc[j][e];
      }
    }
  }

  // Warp: 16 columns of the tile (rows of dB), all ranks, the 32 rows of the tile as k.
  LK_DEVICE void multiply_db(int stage, int member, float (&acc)[RN / 8][4]) const {
    const T *d = tile_d(stage, member), *s_tile = tile_s(stage, member);
#pragma unroll
    for (int kk = 0; kk < kRows / 16; ++kk) {
      uint32_t a[4];
      // Matrices in the order of an A fragment: columns + 8, then rows + 8.
      const int row = 16 * kk + lane % 8 + lane / 16 * 8;
      ldmatrix_x4<true>(a, d + tile_offset<kColumns>(row, 2 * warp + lane / 8 % 2));
#pragma unroll
      for (int j = 0; j < RN / 8; j += 2) {
        uint32_t b[4];
        ldmatrix_x4<true>(b, s_tile + tile_offset<RN>(16 * kk + lane % 16, j + lane / 16));
        mma_16816<T>(acc[j], a, b[0], b[1]);
        mma_16816<T>(acc[j + 1], a, b[2], b[3]);
      }
    }
  }

  LK_DEVICE void store_db(int member, const float (&acc)[RN / 8][4]) const {
    const int rank = p.member[member].rank;
    float* out = args.db_partials[member] + static_cast<int64_t>(blockIdx.y) * p.n * rank;
#pragma unroll
    for (int j = 0; j < RN / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t n = n0 + 16 * warp + lane / 4 + 8 * (e / 2);
        const int column = 8 * j + 2 * (lane % 4) + e % 2;
        if (n < p.n && column < rank) out[n * rank + column] = acc[j][e];
      }
    }
  }
};

template <class T, class Shape, bool kAligned>
__global__ void __launch_bounds__(Shape::kThreads)
    gradients_adapter_kernel(const __grid_constant__ GradientArgs args) {
  LK_DYNAMIC_SHARED(shared);
  GradientBlock<T, Shape, kAligned> block(args, shared);
  block.load_b();
  if (block.m_begin < block.m_end) block.fetch(block.m_begin);
  const bool up_too = args.p.members == 2;
  int stage = 0;
  for (int64_t m = block.m_begin; m < block.m_end; m += Shape::kRows, stage ^= 1) {
    block.load_s(m, stage);
    cp_async_commit();
    block.compute(m, stage);
    if (m + Shape::kRows < block.m_end) block.fetch(m + Shape::kRows);
    cp_async_wait<0>();
    pipeline_barrier();  // the buffers of the step before last are free from here on
    block.multiply_ds(m, stage);
    if (args.p.member[0].s != nullptr) block.multiply_db(stage, 0, block.db[0]);
    if (up_too && args.p.member[1].s != nullptr) block.multiply_db(stage, 1, block.db[1]);
  }
  if (args.p.member[0].s != nullptr) block.store_db(0, block.db[0]);
  if (up_too && args.p.member[1].s != nullptr) block.store_db(1, block.db[1]);
}

// One thread per element of dS, then per element of the dBs.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    gradients_sum_kernel(const __grid_constant__ GradientArgs args) {
  const GradientParams& p = args.p;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  const int64_t count = p.m * p.columns;
  if (i < count) {
    float sum = 0.0f;
    for (int b = 0; b < args.column_blocks; ++b) sum += args.ds_partials[b * count + i];
    const int j = p.members == 2 && i % p.columns >= p.member[1].column ? 1 : 0;
    narrow(p.member[j].scaling * sum, static_cast<T*>(p.ds)[i]);
    return;
  }
  i -= count;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (j >= p.members || p.member[j].db == nullptr) continue;
    const int64_t elements = p.n * p.member[j].rank;
    if (i < elements) {
      float sum = 0.0f;
      for (int z = 0; z < args.splits; ++z) sum += args.db_partials[j][z * elements + i];
      store_from_float(p.member[j].db, i, p.member[j].db_dtype, p.member[j].scaling * sum);
      return;
    }
    i -= elements;
  }
}

}  // namespace lora_kernels::gated_activation::cuda
