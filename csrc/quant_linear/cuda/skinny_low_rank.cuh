// The low-rank term of the kernels for few rows: U in the blocks behind those of the weight, and
// the kernel that ends every product whose sum is shared out or that has such a term.
//
// Math      U = u_scale mask(Z) left^T,  C = Z R^T + mask'(scale U right) + bias, Z R^T in shares
//           (R: the weight or its transpose; mask: forward, mask': dgrad; see params.h)
// Grid      low_rank_tile: a block of the same launch as the product, 16 ranks and its 8 MT rows of
//           Z over its share of the sum. Its four warps are two halves of k times two halves of the
//           rows; the halves of k are added at the end, the even one first.
//           skinny_finish_kernel: x: 64 columns of C, y: 16 rows.
// Bytes     Z once per 16 ranks from L2, left once per block of rows; 4 bytes per share and element
//           of C and U, written and read once (U: once per 64 columns); right once per 16 rows.
// Numerics  fp32; left and right rounded to T where they are wider; shares in order; U rounded once
//           to T; C rounded once. A row of C depends on nothing but its own row of Z.
// Dropout   whole calls of the generator for Z (a warp's half of k is what a call covers), a call
//           per element of C in dgrad.
#pragma once

#include "../../common/barrier.cuh"
#include "../../common/mma.cuh"
#include "../../lora_linear/cuda/dropout.cuh"
#include "packed_tile.cuh"

namespace lora_kernels::quant_linear::cuda {

struct SkinnyArgs {
  SkinnyParams p;
  int64_t extent, sum;  // P and Q of params.h
  int steps;            // of kTileK, of all of the sum
  int steps_per_part;   // the last part may have fewer
  int tiles;            // blocks along x that multiply by the weight; those behind make U
  int parts;
  float* partials;  // [parts, M, P + rank]; null: C leaves the product's kernel
};

LK_DEVICE float* partial_at(const SkinnyArgs& args, int64_t part, int64_t m, int64_t column) {
  return args.partials + (part * args.p.m + m) * (args.extent + args.p.rank) + column;
}

// The shares of one element, in order.
LK_DEVICE float sum_of_parts(const SkinnyArgs& args, int64_t m, int64_t column) {
  const float* from = partial_at(args, 0, m, column);
  const int64_t stride = args.p.m * (args.extent + args.p.rank);
  float total = 0.0f;
#pragma unroll 4
  for (int z = 0; z < args.parts; ++z) total += from[z * stride];
  return total;
}

template <int MT>
struct LowRankShape {
  static constexpr int kRanks = 16, kStages = 3, kThreads = 128, kRows = 8 * MT;
  static constexpr int kPitch = kTileK + 8;  // elements of a row: lanes read different banks
  static constexpr size_t kTileZ = static_cast<size_t>(kRows) * kPitch * 2;
  static constexpr size_t kTileLeft = static_cast<size_t>(kRanks) * kPitch * 4;  // as fp32
  static constexpr size_t kStage = kTileZ + kTileLeft;
  static constexpr size_t kShared = kStages * kStage;
};

template <class T, int MT>
struct LowRankBlock {
  using Shape = LowRankShape<MT>;
  static constexpr int kPitch = Shape::kPitch;
  enum Way { kAlongSum, kAlongRank, kElements };  // how left lies in memory

  const SkinnyArgs& args;
  const SkinnyParams& p;
  unsigned char* shared;
  int thread, lane, warp, rows;
  int64_t m0, r0;
  Way way;
  int element;  // bytes of one of left
  float acc[(MT + 1) / 2][4];

  LK_DEVICE LowRankBlock(const SkinnyArgs& args_, unsigned char* memory, int tile)
      : args(args_), p(args_.p), shared(memory), thread(threadIdx.x) {
    lane = thread % 32;
    warp = thread / 32;
    m0 = static_cast<int64_t>(blockIdx.y) * Shape::kRows;
    r0 = static_cast<int64_t>(tile) * Shape::kRanks;
    rows = static_cast<int>(p.m - m0 < Shape::kRows ? p.m - m0 : Shape::kRows);
    element = p.left.dtype == Dtype::kFloat32 ? 4 : 2;
    const int per = 16 / element;
    const bool address = reinterpret_cast<uintptr_t>(p.left.data) % 16 == 0;
    way = kElements;
    if (address && p.left.column == 1 && p.left.row % per == 0 && args.sum % per == 0) {
      way = kAlongSum;
    } else if (address && p.left.row == 1 && p.left.column % per == 0 && p.rank % per == 0) {
      way = kAlongRank;
    }
#pragma unroll
    for (int i = 0; i < (MT + 1) / 2; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[i][e] = 0.0f;
    }
  }

  LK_DEVICE T* tile_z(int stage) const {
    return reinterpret_cast<T*>(shared + stage * Shape::kStage);
  }
  LK_DEVICE unsigned char* tile_left(int stage) const {
    return shared + stage * Shape::kStage + Shape::kTileZ;
  }
  // Place of (rank, k) in a tile of left, in elements.
  LK_DEVICE int place(int r, int k) const {
    return way == kAlongRank ? k * Shape::kRanks + r : r * kPitch + k;
  }

  LK_DEVICE void load(int step, int stage) const {
    const int64_t q0 = static_cast<int64_t>(step) * kTileK;
    constexpr int kChunks = kTileK / 8;
    for (int c = thread; c < Shape::kRows * kChunks; c += Shape::kThreads) {
      const int row = c / kChunks, k = 8 * (c % kChunks);
      if (row >= (rows + 7) / 8 * 8) break;
      cp_async16_if(tile_z(stage) + row * kPitch + k,
                    static_cast<const T*>(p.z) + (m0 + row) * p.ldz + q0 + k,
                    row < rows && q0 + k < args.sum);
    }
    const auto* left = static_cast<const unsigned char*>(p.left.data);
    const int per = way == kElements ? 1 : 16 / element;
    const int across = way == kAlongRank ? Shape::kRanks / per : kTileK / per;
    for (int c = thread; c < Shape::kRanks * kTileK / per; c += Shape::kThreads) {
      const int outer = c / across, inner = per * (c % across);
      const int r = way == kAlongRank ? inner : outer, k = way == kAlongRank ? outer : inner;
      const bool exists = r0 + r < p.rank && q0 + k < args.sum;
      const unsigned char* from =
          left + ((r0 + r) * p.left.row + (q0 + k) * p.left.column) * element;
      unsigned char* to = tile_left(stage) + place(r, k) * element;
      if (way != kElements) {
        cp_async16_if(to, from, exists);
      } else if (element == 4) {
        *reinterpret_cast<uint32_t*>(to) = exists ? *reinterpret_cast<const uint32_t*>(from) : 0u;
      } else {
        *reinterpret_cast<uint16_t*>(to) =
            exists ? *reinterpret_cast<const uint16_t*>(from) : static_cast<uint16_t>(0);
      }
    }
  }

  // Ranks r and k, k + 1 of the tile.
  LK_DEVICE uint32_t pair_of_left(const unsigned char* tile, int r, int k) const {
    return pack2<T>(load_as_float(tile, place(r, k), p.left.dtype),
                    load_as_float(tile, place(r, k + 1), p.left.dtype));
  }

  LK_DEVICE void multiply(int step, int stage, const lora_linear::cuda::DropoutKey& key,
                          bool dropped) {
    const int g = lane / 4, t = lane % 4, odd = warp % 2;
    const unsigned char* left = tile_left(stage);
    uint32_t a[4][4];
#pragma unroll
    for (int f = 0; f < 4; ++f) {
      const int k = 16 * (2 * f + odd) + 2 * t;
#pragma unroll
      for (int i = 0; i < 4; ++i) a[f][i] = pair_of_left(left, g + 8 * (i % 2), k + 8 * (i / 2));
    }
#pragma unroll
    for (int i = 0; i < (MT + 1) / 2; ++i) {
      const int row = 8 * (2 * i + warp / 2) + g;
      if (row - g >= rows) break;
      uint32_t w[2][4];
      if (dropped) {
#pragma unroll
        for (int h = 0; h < 2; ++h) key.words(m0 + row, step, 8 * odd + t + 4 * h, 0, w[h]);
      }
#pragma unroll
      for (int f = 0; f < 4; ++f) {
        const T* z = tile_z(stage) + row * kPitch + 16 * (2 * f + odd) + 2 * t;
        uint32_t b0 = *reinterpret_cast<const uint32_t*>(z);
        uint32_t b1 = *reinterpret_cast<const uint32_t*>(z + 8);
        if (dropped) b0 = key.keep(b0, w[0][f]), b1 = key.keep(b1, w[1][f]);
        mma_16816<T>(acc[i], a[f], b0, b1);
      }
    }
  }

  LK_DEVICE void store() {
    float* staged = reinterpret_cast<float*>(shared);
    __syncthreads();
    if (warp % 2 == 1) {
#pragma unroll
      for (int i = 0; i < (MT + 1) / 2; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) staged[((2 * i + warp / 2) * 4 + e) * 32 + lane] = acc[i][e];
      }
    }
    __syncthreads();
    if (warp % 2 == 1) return;
#pragma unroll
    for (int i = 0; i < (MT + 1) / 2; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int tile = 2 * i + warp / 2;
        const int64_t r = r0 + lane / 4 + 8 * (e / 2), m = m0 + 8 * tile + 2 * (lane % 4) + e % 2;
        if (r >= p.rank || m >= p.m) continue;
        *partial_at(args, blockIdx.z, m, args.extent + r) =
            acc[i][e] + staged[(tile * 4 + e) * 32 + lane];
      }
    }
  }
};

template <class T, int MT>
LK_DEVICE void low_rank_tile(const SkinnyArgs& args, unsigned char* shared, int tile) {
  constexpr int kStages = LowRankShape<MT>::kStages;
  LowRankBlock<T, MT> block(args, shared, tile);
  const lora_linear::cuda::DropoutKey key(args.p.dropout);
  const bool dropped = !args.p.dgrad && args.p.dropout.threshold != 0;
  const int first = static_cast<int>(blockIdx.z) * args.steps_per_part;
  const int last = first + args.steps_per_part, end = last < args.steps ? last : args.steps;
  for (int s = 0; s < kStages - 1; ++s) {
    if (first + s < end) block.load(first + s, s);
    cp_async_commit();
  }
#pragma unroll 1
  for (int s = first; s < end; ++s) {
    cp_async_wait<kStages - 2>();
    pipeline_barrier();
    const int next = s + kStages - 1;
    if (next < end) block.load(next, (next - first) % kStages);
    cp_async_commit();
    if (!(dropped && key.drops_all)) block.multiply(s, (s - first) % kStages, key, dropped);
  }
  cp_async_wait<0>();
  block.store();
}

struct FinishShape {
  static constexpr int kRows = 16, kWarps = 4, kThreads = 32 * kWarps, kColumns = 16 * kWarps;
  static constexpr int kPitch = static_cast<int>(kMaxSkinnyRank) + 8;  // elements of a row of U
  static constexpr size_t kShared = static_cast<size_t>(kRows) * kPitch * 2;
};

// U of 16 rows into shared memory, zeros around it; block 0 writes it out.
template <class T>
LK_DEVICE void finish_u(const SkinnyArgs& args, T* u, int64_t m0) {
  const SkinnyParams& p = args.p;
  const int ranks = static_cast<int>((p.rank + 15) / 16 * 16);
  for (int e = threadIdx.x; e < FinishShape::kRows * ranks; e += FinishShape::kThreads) {
    const int row = e / ranks, r = e % ranks;
    const int64_t m = m0 + row;
    const bool exists = m < p.m && r < p.rank;
    const float sum = exists ? sum_of_parts(args, m, args.extent + r) * p.u_scale : 0.0f;
    T& to = u[row * FinishShape::kPitch + r];
    narrow(sum, to);
    if (exists && p.u != nullptr && blockIdx.x == 0) static_cast<T*>(p.u)[m * p.rank + r] = to;
  }
}

// Ranks r, r + 1 of column n of `right`, zeros outside.
template <class T>
LK_DEVICE uint32_t pair_of_right(const SkinnyArgs& args, int64_t r, int64_t n) {
  const Factor& f = args.p.right;
  float v[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (n < args.extent && r + i < args.p.rank) {
      v[i] = load_as_float(f.data, (r + i) * f.row + n * f.column, f.dtype);
    }
  }
  return pack2<T>(v[0], v[1]);
}

// Draw of (row m, column n) of the mask of C.
LK_DEVICE bool keeps(const lora_linear::cuda::DropoutKey& key, int64_t m, int64_t n) {
  uint32_t w[4];
  key.words(m, static_cast<int>(n / 128), static_cast<int>(n % 32 / 2), 0, w);
  const int i = static_cast<int>(n % 128 / 32);
  const uint32_t word = i == 0 ? w[0] : i == 1 ? w[1] : i == 2 ? w[2] : w[3];
  return !key.drops_all && (n % 2 == 0 ? key.keeps_low(word) : key.keeps_high(word));
}

// C^T = right^T U^T, 16 columns of C per warp.
template <class T>
__global__ void __launch_bounds__(FinishShape::kThreads)
    skinny_finish_kernel(const __grid_constant__ SkinnyArgs args) {
  const SkinnyParams& p = args.p;
  LK_DYNAMIC_SHARED(shared);
  T* u = reinterpret_cast<T*>(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t m0 = static_cast<int64_t>(blockIdx.y) * FinishShape::kRows;
  const int64_t n0 = static_cast<int64_t>(blockIdx.x) * FinishShape::kColumns + 16 * warp + g;
  float update[2][4] = {};
  if (p.rank > 0) {
    finish_u(args, u, m0);
    __syncthreads();
#pragma unroll 1
    for (int64_t r = 2 * t; r < p.rank + 2 * t; r += 16) {
      const uint32_t a[4] = {pair_of_right<T>(args, r, n0), pair_of_right<T>(args, r, n0 + 8),
                             pair_of_right<T>(args, r + 8, n0),
                             pair_of_right<T>(args, r + 8, n0 + 8)};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const T* row = u + (8 * i + g) * FinishShape::kPitch + r;
        mma_16816<T>(update[i], a, *reinterpret_cast<const uint32_t*>(row),
                     *reinterpret_cast<const uint32_t*>(row + 8));
      }
    }
  }
  const bool dropped = p.dgrad && p.rank > 0 && p.dropout.threshold != 0;
  const lora_linear::cuda::DropoutKey key(p.dropout);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t m = m0 + 8 * i + 2 * t + e % 2, n = n0 + 8 * (e / 2);
      if (m >= p.m || n >= args.extent) continue;
      float total = sum_of_parts(args, m, n);
      if (!dropped || keeps(key, m, n)) total += p.scale * update[i][e];
      if (p.bias != nullptr) total += load_as_float(p.bias, n, p.bias_dtype);
      narrow(total, static_cast<T*>(p.c)[m * args.extent + n]);
    }
  }
}

}  // namespace lora_kernels::quant_linear::cuda
