// The norm with the shrink of its result on the way, and its gradients.
//
// Math      rstd = 1 / sqrt(mean_k(x^2) + eps);  y = x rstd (offset + w), rounded to T
//           s[m, c] = sum_k y[m, k] a_c[k] of the rounded y
//           n = x rstd, d = dy (offset + w);  dx = rstd (d - n mean_k(d n));  dw = sum_m(dy n)
// Shapes    x, dy [M, K] with row strides; y, dx [M, K]; rstd [M]; rows a_c of the members' A; S
//           [M, columns]; dw [K] in a dtype of its own
// Grid      normalize: a block of eight warps per 16 rows, two walks over K: a warp per row for rstd,
//           then [16, 256] tiles of y from registers to memory and to shared memory, where with
//           members they meet tiles of A: a warp multiplies 32 columns of the tile with all columns
//           of S. gradients: a block walks over its rows; its share of dw is in shared memory.
// Bytes     x read and y written (4 M K), x again from L2, A once per 16 rows from L2, S; backward
//           dy, x read, dx written (6 M K), dy and x again from L1 or L2, 8 K per block for dw.
// Numerics  fp32; y, dx, dw and S rounded once. Sums of a row, of S over warps and of dw over blocks in
//           a fixed order.
// Limits    16-bit T, at most 64 columns of S, backward K <= 24000; 2^31 - 1 blocks.
#pragma once

#include "../../common/barrier.cuh"
#include "../../common/mma.cuh"
#include "../../common/tile.cuh"
#include "../../gated_activation/cuda/elementwise.cuh"
#include "params.h"

namespace lora_kernels::rms_norm::cuda {

using gated_activation::cuda::half_of;
using gated_activation::cuda::kElements;
using gated_activation::cuda::load_chunk;
using gated_activation::cuda::store_chunk;

constexpr int kThreads = 256, kWarps = kThreads / 32;

struct GradientArgs {
  GradientParams p;
  int64_t rows_per_block;
  int blocks;
  float* partials;  // [blocks, K]
};

LK_DEVICE float inverse_root(float v) {
#if defined(LK_EMULATOR)
  return 1.0f / std::sqrt(v);
#else
  return 1.0f / sqrtf(v);
#endif
}

LK_DEVICE int chunk_size(int64_t left) {
  return clamp_chunk(static_cast<int>(left < kElements ? left : kElements));
}

// offset + w of the elements [k, k + 8) that exist; 1 without a weight.
template <class Params>
LK_DEVICE void load_gain(float (&gain)[kElements], const Params& p, int64_t k) {
#pragma unroll
  for (int e = 0; e < kElements; ++e) {
    const bool exists = p.weight != nullptr && k + e < p.k;
    gain[e] = exists ? p.offset + load_as_float(p.weight, k + e, p.weight_dtype) : 1.0f;
  }
}

template <int RN>
struct NormalizeShape {
  static constexpr int kRows = 16, kBlock = 256, kStages = 2;
  static constexpr int kChunks = kRows * kBlock / kElements / kThreads;  // of a thread
  static constexpr int kTile = kRows * kBlock, kTileA = RN * kBlock;
  static constexpr size_t kTiles = RN == 0 ? 0 : kStages * (kTile + kTileA) * 2;
  static_assert(RN == 0 || kWarps * kRows * RN * 4 <= kTiles);  // the sums of the warps
  static constexpr size_t kShared = kRows * sizeof(float) + kTiles;
};

template <class T, int RN, bool kAligned>
__global__ void __launch_bounds__(kThreads, 1)
    normalize_kernel(const __grid_constant__ NormalizeParams p) {
  using Shape = NormalizeShape<RN>;
  constexpr int kBlock = Shape::kBlock, kStep = kThreads / (kBlock / kElements);  // rows
  LK_DYNAMIC_SHARED(shared);
  T* tiles = reinterpret_cast<T*>(shared);
  float* scales = reinterpret_cast<float*>(shared + Shape::kTiles);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * Shape::kRows;
  const T* x = static_cast<const T*>(p.x);
  for (int i = warp; i < Shape::kRows; i += kWarps) {
    if (row0 + i >= p.m) break;  // a whole warp
    float sum = 0.0f;
    for (int64_t k = lane * kElements; k < p.k; k += 32 * kElements) {
      uint32_t v[4];
      load_chunk<kAligned>(v, x + (row0 + i) * p.ldx + k, chunk_size(p.k - k));
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const float f = half_of<T>(v[e / 2], e % 2);
        sum += f * f;
      }
    }
    const float rstd = inverse_root(warp_sum(sum) / static_cast<float>(p.k) + p.eps);
    if (lane == 0) {
      scales[i] = rstd;
      p.rstd[row0 + i] = rstd;
    }
  }
  __syncthreads();
  const int first = thread / (kBlock / kElements), chunk = thread % (kBlock / kElements);
  float acc[RN == 0 ? 1 : RN / 8][4] = {};
  int stage = 0;
  for (int64_t at = 0; at < p.k; at += kBlock, stage ^= 1) {
    T* tile = tiles + stage * (Shape::kTile + Shape::kTileA);
    T* a_tile = tile + Shape::kTile;
    const int64_t k = at + chunk * kElements;
    const int exist = chunk_size(p.k - k);
    if constexpr (RN > 0) {
#pragma unroll
      for (int i = 0; i < RN / kStep; ++i) {
        const int c = first + i * kStep;
        const T* source = nullptr;
        for (int j = 0; j < p.members; ++j) {
          const ShrinkMember& w = p.member[j];
          if (c >= w.column && c < w.column + w.rank) {
            source = static_cast<const T*>(w.a) + (c - w.column) * w.lda;
          }
        }
        const bool inside = source != nullptr && exist > 0;
        copy_chunk<kAligned>(a_tile + tile_offset<kBlock>(c, chunk),
                             inside ? source + k : static_cast<const T*>(p.member[0].a),
                             inside ? exist : 0);
      }
      cp_async_commit();
    }
    float gain[kElements];
    load_gain(gain, p, k);
#pragma unroll
    for (int i = 0; i < Shape::kChunks; ++i) {
      const int row = first + i * kStep, valid = row0 + row < p.m ? exist : 0;
      uint32_t v[4] = {}, y[4] = {};
      if (valid > 0) {
        load_chunk<kAligned>(v, x + (row0 + row) * p.ldx + k, valid);
        const float rstd = scales[row];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          y[e] = pack2<T>(half_of<T>(v[e], 0) * rstd * gain[2 * e],
                          half_of<T>(v[e], 1) * rstd * gain[2 * e + 1]);
        }
        store_chunk<kAligned>(static_cast<T*>(p.y) + (row0 + row) * p.k + k, y, valid);
      }
      if constexpr (RN > 0) {
        *reinterpret_cast<uint4*>(tile + tile_offset<kBlock>(row, chunk)) =
            make_uint4(y[0], y[1], y[2], y[3]);
      }
    }
    if constexpr (RN > 0) {
      cp_async_wait<0>();
      pipeline_barrier();  // the buffers of the step before last are free from here on
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int kk = 2 * warp + half;
        uint32_t a[4];
        ldmatrix_x4<false>(a, tile + tile_offset<kBlock>(lane % 16, 2 * kk + lane / 16));
#pragma unroll
        for (int j = 0; j < RN / 8; j += 2) {
          uint32_t b[4];
          ldmatrix_x4<false>(b, a_tile + tile_offset<kBlock>(8 * j + lane % 8 + lane / 16 * 8,
                                                             2 * kk + lane / 8 % 2));
          mma_16816<T>(acc[j], a, b[0], b[1]);
          mma_16816<T>(acc[j + 1], a, b[2], b[3]);
        }
      }
    }
  }
  if constexpr (RN > 0) {
    float* sums = reinterpret_cast<float*>(shared);  // [warps, 16, RN]
    __syncthreads();
#pragma unroll
    for (int j = 0; j < RN / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = lane / 4 + 8 * (e / 2), column = 8 * j + 2 * (lane % 4) + e % 2;
        sums[(warp * Shape::kRows + row) * RN + column] = acc[j][e];
      }
    }
    __syncthreads();
    for (int i = thread; i < Shape::kRows * RN; i += kThreads) {
      const int64_t row = row0 + i / RN;
      const int column = i % RN;
      if (row >= p.m || column >= p.columns) continue;
      float sum = 0.0f;
      for (int w = 0; w < kWarps; ++w) sum += sums[w * Shape::kRows * RN + i];
      narrow(sum, static_cast<T*>(p.s)[row * p.columns + column]);
    }
  }
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    norm_gradients_kernel(const __grid_constant__ GradientArgs args) {
  const GradientParams& p = args.p;
  LK_DYNAMIC_SHARED(shared);
  float* totals = reinterpret_cast<float*>(shared);  // [2][warps]
  float* dw = totals + 2 * kWarps;                   // [K rounded up to 8], without dweight absent
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * args.rows_per_block;
  const int64_t end = begin + args.rows_per_block < p.m ? begin + args.rows_per_block : p.m;
  int turn = 0;
  for (int64_t m = begin; m < end; ++m, turn ^= 1) {
    const T* dy = static_cast<const T*>(p.dy) + m * p.lddy;
    const T* x = static_cast<const T*>(p.x) + m * p.ldx;
    const float rstd = p.rstd[m];
    float sum = 0.0f;
    for (int64_t k = thread * kElements; k < p.k; k += kThreads * kElements) {
      uint32_t d[4], v[4];
      float gain[kElements];
      load_chunk<kAligned>(d, dy + k, chunk_size(p.k - k));
      load_chunk<kAligned>(v, x + k, chunk_size(p.k - k));
      load_gain(gain, p, k);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        sum += half_of<T>(d[e / 2], e % 2) * gain[e] * (half_of<T>(v[e / 2], e % 2) * rstd);
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) totals[turn * kWarps + warp] = sum;
    pipeline_barrier();  // one per row: the totals of the row before last are read by then
    float mean = 0.0f;
    for (int w = 0; w < kWarps; ++w) mean += totals[turn * kWarps + w];
    mean /= static_cast<float>(p.k);
    for (int64_t k = thread * kElements; k < p.k; k += kThreads * kElements) {
      const int valid = chunk_size(p.k - k);
      uint32_t d[4], v[4], out[4];
      float gain[kElements], result[kElements];
      load_chunk<kAligned>(d, dy + k, valid);
      load_chunk<kAligned>(v, x + k, valid);
      load_gain(gain, p, k);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const float grad = half_of<T>(d[e / 2], e % 2);
        const float normal = half_of<T>(v[e / 2], e % 2) * rstd;
        result[e] = (grad * gain[e] - normal * mean) * rstd;
        if (p.dw != nullptr) dw[k + e] = (m == begin ? 0.0f : dw[k + e]) + grad * normal;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) out[e] = pack2<T>(result[2 * e], result[2 * e + 1]);
      store_chunk<kAligned>(static_cast<T*>(p.dx) + m * p.k + k, out, valid);
    }
  }
  if (p.dw == nullptr) return;
  for (int64_t k = thread * kElements; k < p.k; k += kThreads * kElements) {
    for (int e = 0; e < chunk_size(p.k - k); ++e) {
      args.partials[blockIdx.x * p.k + k + e] = dw[k + e];  // of this thread itself
    }
  }
}

// A block of eight warps per 32 columns: every warp adds each eighth share, then in order of warps.
__global__ void __launch_bounds__(kThreads)
    norm_sum_kernel(const __grid_constant__ GradientArgs args) {
  LK_DYNAMIC_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);  // [warps][32]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t k = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  float sum = 0.0f;
  if (k < args.p.k) {
    for (int b = warp; b < args.blocks; b += kWarps) sum += args.partials[b * args.p.k + k];
  }
  sums[warp * 32 + lane] = sum;
  __syncthreads();
  if (warp != 0 || k >= args.p.k) return;
  float total = 0.0f;
  for (int w = 0; w < kWarps; ++w) total += sums[w * 32 + lane];
  store_from_float(args.p.dw, k, args.p.weight_dtype, total);
}

}  // namespace lora_kernels::rms_norm::cuda
