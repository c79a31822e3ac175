// The activation, and the shrink of its result on the way.
//
// Math      h = act(g) u, rounded to T;  s[m, c] = sum_n h[m, n] a_c[n] of the rounded h
// Shapes    g, u [M, N] row strides ldg, ldu; h [M, N]; rows a_c of the members' A; S [M, columns]
// Grid      shrink: x: 64 rows, y: share of N in blocks of 64. Four warps of 16 rows; a block
//           makes a [64, 64] tile of h per step, from registers to memory and to shared memory,
//           where it meets a tile of A. Plain: a thread per chunk of 8.
// Bytes     g and u read, h written (6 M N), A once per 64 rows from L2, S; with a split 8 bytes per
//           element of S and share. The operands of the next step are under way during a step.
// Numerics  fp32; h rounded once; S sums in fp32 in the order of n, shares added in order, rounded
//           once.
// Limits    16-bit T, at most 64 columns of S; 2^31 - 1 blocks.
#pragma once

#include "../../common/barrier.cuh"
#include "../../common/mma.cuh"
#include "../../common/tile.cuh"
#include "elementwise.cuh"

namespace lora_kernels::gated_activation::cuda {

constexpr int kPlainThreads = 256;

struct ActivateArgs {
  ActivateParams p;
  int64_t n_per_split;  // multiple of 64
  float* partials;      // [splits, M, columns], or null without a split
};

struct ActivateShape {
  static constexpr int kRows = 64, kBlock = 64, kThreads = 128, kStages = 2;
  static constexpr int kChunks = kRows * kBlock / kElements / kThreads;  // of a thread
  static constexpr int kTile = kRows * kBlock;
};

template <int RN>
constexpr size_t activate_shared() {
  return ActivateShape::kStages * (ActivateShape::kTile + RN * ActivateShape::kBlock) * 2;
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kPlainThreads)
    activate_kernel(const __grid_constant__ ActivateParams p) {
  const int64_t chunks = (p.n + kElements - 1) / kElements;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kPlainThreads + threadIdx.x;
  if (i >= p.m * chunks) return;
  const int64_t row = i / chunks, n = i % chunks * kElements;
  const int valid = static_cast<int>(p.n - n < kElements ? p.n - n : kElements);
  const bool gated = p.up != nullptr;
  uint32_t g[4], u[4] = {}, h[4];
  load_chunk<kAligned>(g, static_cast<const T*>(p.gate) + row * p.ldg + n, valid);
  if (gated) load_chunk<kAligned>(u, static_cast<const T*>(p.up) + row * p.ldu + n, valid);
  activate_chunk<T>(h, g, u, p.kind, gated);
  store_chunk<kAligned>(static_cast<T*>(p.h) + row * p.n + n, h, valid);
}

template <class T, int RN, bool kAligned>
__global__ void __launch_bounds__(ActivateShape::kThreads)
    activate_shrink_kernel(const __grid_constant__ ActivateArgs args) {
  using Shape = ActivateShape;
  constexpr int kBlock = Shape::kBlock, kStep = Shape::kThreads / (kBlock / kElements);  // rows
  LK_DYNAMIC_SHARED(shared);
  const ActivateParams& p = args.p;
  T* tiles = reinterpret_cast<T*>(shared);  // [stages][h tile, A tile]
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * Shape::kRows;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * args.n_per_split;
  const int64_t end = begin + args.n_per_split < p.n ? begin + args.n_per_split : p.n;
  const int first = thread / (kBlock / kElements), chunk = thread % (kBlock / kElements);
  const bool gated = p.up != nullptr;
  // Rows of A that this thread copies: first + i * kStep.
  const T* row_of_a[RN / kStep];
#pragma unroll
  for (int i = 0; i < RN / kStep; ++i) {
    const int c = first + i * kStep;
    row_of_a[i] = nullptr;
    for (int j = 0; j < p.members; ++j) {
      const ShrinkMember& w = p.member[j];
      if (c >= w.column && c < w.column + w.rank) {
        row_of_a[i] = static_cast<const T*>(w.a) + (c - w.column) * w.lda;
      }
    }
  }
  uint32_t g[Shape::kChunks][4], u[Shape::kChunks][4] = {};
  const auto valid_at = [&](int64_t n, int row) {
    const int64_t left = row0 + row < p.m ? end - n : 0;
    return clamp_chunk(static_cast<int>(left < kElements ? left : kElements));
  };
  const auto fetch = [&](int64_t at) {
    const int64_t n = at + chunk * kElements;
#pragma unroll
    for (int i = 0; i < Shape::kChunks; ++i) {
      const int row = first + i * kStep, valid = valid_at(n, row);
      load_chunk<kAligned>(g[i], static_cast<const T*>(p.gate) + (row0 + row) * p.ldg + n, valid);
      if (gated) {
        load_chunk<kAligned>(u[i], static_cast<const T*>(p.up) + (row0 + row) * p.ldu + n, valid);
      }
    }
  };
  float acc[RN / 8][4] = {};
  if (begin < end) fetch(begin);
  int stage = 0;
  for (int64_t at = begin; at < end; at += kBlock, stage ^= 1) {
    T* tile = tiles + stage * (Shape::kTile + RN * kBlock);
    T* a_tile = tile + Shape::kTile;
    const int64_t n = at + chunk * kElements;
    const int exist = valid_at(n, 0);  // columns; row0 exists
#pragma unroll
    for (int i = 0; i < RN / kStep; ++i) {
      const bool inside = row_of_a[i] != nullptr && exist > 0;
      copy_chunk<kAligned>(a_tile + tile_offset<kBlock>(first + i * kStep, chunk),
                           inside ? row_of_a[i] + n : static_cast<const T*>(p.member[0].a),
                           inside ? exist : 0);
    }
    cp_async_commit();
#pragma unroll
    for (int i = 0; i < Shape::kChunks; ++i) {
      const int row = first + i * kStep, valid = valid_at(n, row);
      uint32_t h[4] = {};
      if (valid > 0) {
        activate_chunk<T>(h, g[i], u[i], p.kind, gated);
        store_chunk<kAligned>(static_cast<T*>(p.h) + (row0 + row) * p.n + n, h, valid);
      }
      *reinterpret_cast<uint4*>(tile + tile_offset<kBlock>(row, chunk)) =
          make_uint4(h[0], h[1], h[2], h[3]);
    }
    if (at + kBlock < end) fetch(at + kBlock);
    cp_async_wait<0>();
    pipeline_barrier();  // the buffers of the step before last are free from here on
#pragma unroll
    for (int kk = 0; kk < kBlock / 16; ++kk) {
      uint32_t a[4];
      ldmatrix_x4<false>(a, tile + tile_offset<kBlock>(16 * warp + lane % 16, 2 * kk + lane / 16));
#pragma unroll
      for (int j = 0; j < RN / 8; j += 2) {
        uint32_t b[4];
        ldmatrix_x4<false>(
            b, a_tile + tile_offset<kBlock>(8 * j + lane % 8 + lane / 16 * 8, 2 * kk + lane / 8 % 2));
        mma_16816<T>(acc[j], a, b[0], b[1]);
        mma_16816<T>(acc[j + 1], a, b[2], b[3]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < RN / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t row = row0 + 16 * warp + lane / 4 + 8 * (e / 2);
      const int column = 8 * j + 2 * (lane % 4) + e % 2;
      if (row >= p.m || column >= p.columns) continue;
      if (args.partials != nullptr) {
        args.partials[(blockIdx.y * p.m + row) * p.columns + column] = acc[j][e];
      } else {
        narrow(acc[j][e], static_cast<T*>(p.s)[row * p.columns + column]);
      }
    }
  }
}

// One thread per element of S: the shares in order.
template <class T>
__global__ void __launch_bounds__(kPlainThreads)
    activate_sum_kernel(const __grid_constant__ ActivateArgs args) {
  const int64_t count = args.p.m * args.p.columns;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kPlainThreads + threadIdx.x;
  if (i >= count) return;
  float sum = 0.0f;
  for (int z = 0; z < args.p.splits; ++z) sum += args.partials[z * count + i];
  narrow(sum, static_cast<T*>(args.p.s)[i]);
}

}  // namespace lora_kernels::gated_activation::cuda
