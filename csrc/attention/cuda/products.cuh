// Products of one warp on swizzled tiles [rows, D] in shared memory (tile.cuh).
#pragma once

#include "../../common/mma.cuh"
#include "../../common/tile.cuh"

namespace lora_kernels::attention::cuda {

// Rows of D elements to a tile [ROWS, D]; those from `rows` on become zero and are not read. The
// caller commits and waits.
template <class T, int D, int ROWS, int THREADS>
LK_DEVICE void load_rows(T* tile, const T* source, int64_t row_stride, int rows) {
  constexpr int kChunks = D / kChunk, kStep = THREADS / kChunks;  // rows per turn
  static_assert(ROWS % kStep == 0 && kStep % 8 == 0);  // the swizzle is that of the first turn
  const int first = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
  T* to = tile + tile_offset<D>(first, chunk);
  const T* from = source + first * row_stride + chunk * kChunk;
#pragma unroll
  for (int i = 0; i < ROWS / kStep; ++i) {
    cp_async16_if(to + i * kStep * D, from, first + i * kStep < rows);
    from += kStep * row_stride;
  }
}

// c [16 MT, 8 NT] = A B^T over D: rows `row`.. of tile a, the first 8 NT rows of tile b.
template <class T, int D, int MT, int NT>
LK_DEVICE void multiply_rows(const T* a_tile, int row, const T* b_tile, float (&c)[MT][NT][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < MT; ++i) {
#pragma unroll
    for (int j = 0; j < NT; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) c[i][j][e] = 0.0f;
    }
  }
  // The swizzle of a row does not change 8 rows further on, so steps over rows are constants and
  // those over chunks an exclusive or.
  const T* a_first = a_tile + row * D;
  const int a_offset = tile_offset<D>(lane % 16, lane / 16);
  const int b_offset = tile_offset<D>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int kk = 0; kk < D / 16; ++kk) {
    uint32_t a[MT][4];
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      ldmatrix_x4<false>(a[i], a_first + (a_offset ^ (16 * kk)) + 16 * i * D);
    }
#pragma unroll
    for (int j = 0; j < NT; j += 2) {
      uint32_t b[4];
      ldmatrix_x4<false>(b, b_tile + (b_offset ^ (16 * kk)) + 8 * j * D);
#pragma unroll
      for (int i = 0; i < MT; ++i) {
        mma_16816<T>(c[i][j], a[i], b[0], b[1]);
        mma_16816<T>(c[i][j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// c [16 MT, D] += P B: P [16 MT, 8 KT] are accumulators of multiply_rows, rounded to T here, B the
// first 8 KT rows of the tile.
template <class T, int D, int MT, int KT>
LK_DEVICE void accumulate(const float (&p)[MT][KT][4], const T* b_tile, float (&c)[MT][D / 8][4]) {
  const int lane = threadIdx.x % 32;
  const int offset = tile_offset<D>(lane % 16, lane / 16);
#pragma unroll
  for (int kk = 0; kk < KT / 2; ++kk) {
    uint32_t a[MT][4];
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // an accumulator holds the same places as an operand
        const float* from = p[i][2 * kk + half];
        a[i][2 * half] = pack2<T>(from[0], from[1]);
        a[i][2 * half + 1] = pack2<T>(from[2], from[3]);
      }
    }
#pragma unroll
    for (int j = 0; j < D / 8; j += 2) {
      uint32_t b[4];
      ldmatrix_x4<true>(b, b_tile + (offset ^ (8 * j)) + 16 * kk * D);
#pragma unroll
      for (int i = 0; i < MT; ++i) {
        mma_16816<T>(c[i][j], a[i], b[0], b[1]);
        mma_16816<T>(c[i][j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// c * factor, rounded, to rows `row`.. of a tile, which is then stored by store_rows.
template <class T, int D, int MT>
LK_DEVICE void stage_rows(const float (&c)[MT][D / 8][4], float factor, T* tile, int row) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < MT; ++i) {
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        T* to = tile + tile_offset<D>(row + 16 * i + lane / 4 + 8 * h, j) + 2 * (lane % 4);
        *reinterpret_cast<uint32_t*>(to) =
            pack2<T>(factor * c[i][j][2 * h], factor * c[i][j][2 * h + 1]);
      }
    }
  }
}

// The first `rows` rows of a tile to global memory, 16 bytes at a time, by THREADS threads.
template <class T, int D, int ROWS, int THREADS>
LK_DEVICE void store_rows(const T* tile, T* to, int64_t row_stride, int rows) {
  constexpr int kChunks = D / kChunk;
  for (int e = threadIdx.x; e < ROWS * kChunks; e += THREADS) {
    const int row = e / kChunks, chunk = e % kChunks;
    if (row >= rows) break;
    *reinterpret_cast<uint4*>(to + row * row_stride + chunk * kChunk) =
        *reinterpret_cast<const uint4*>(tile + tile_offset<D>(row, chunk));
  }
}

}  // namespace lora_kernels::attention::cuda
