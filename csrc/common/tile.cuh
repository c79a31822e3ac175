// Tiles of 16-bit elements in shared memory: swizzled layout and copies from global memory.
//
// A tile is [ROWS, COLS], stored row after row in chunks of 8 elements (16 bytes); chunk c of row i
// lies at position c ^ swizzle(i) of its row, so that the 8 rows of one ldmatrix phase fall into
// different banks.
#pragma once

#include "cp_async.cuh"

namespace lora_kernels {

constexpr int kChunk = 8;

// Offset in elements of chunk `chunk` of row `row`.
template <int COLS>
LK_DEVICE int tile_offset(int row, int chunk) {
  constexpr int kChunks = COLS / kChunk;
  static_assert(kChunks == 1 || kChunks == 2 || kChunks == 4 || kChunks % 8 == 0);
  if constexpr (kChunks % 8 == 0) return (row * kChunks + (chunk ^ (row & 7))) * kChunk;
  if constexpr (kChunks == 4) return (row * kChunks + (chunk ^ ((row >> 1) & 3))) * kChunk;
  if constexpr (kChunks == 2) return (row * kChunks + (chunk ^ ((row >> 2) & 1))) * kChunk;
  return row * kChunk;
}

// One chunk from `source`, of which the first `valid` (0..8) elements exist; the rest is zero.
// kAligned: source is 16-byte aligned, and the copy is asynchronous.
template <bool kAligned, class T>
LK_DEVICE void copy_chunk(T* shared, const T* source, int valid) {
  if constexpr (kAligned) {
    cp_async16(shared, source, 2 * valid);
  } else {
    uint32_t words[4];
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = 2 * i < valid ? source[2 * i].bits : 0;
      const uint32_t high = 2 * i + 1 < valid ? source[2 * i + 1].bits : 0;
      words[i] = low | high << 16;
    }
    *reinterpret_cast<uint4*>(shared) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

LK_DEVICE int clamp_chunk(int valid) { return valid < 0 ? 0 : valid > kChunk ? kChunk : valid; }

// A [ROWS, COLS] tile of a matrix with row stride ld, by THREADS threads; what lies outside of
// `rows` and `cols` becomes zero and is not read. The caller commits and waits.
template <int ROWS, int COLS, int THREADS, bool kAligned, class T>
LK_DEVICE void load_tile(T* shared, const T* source, int64_t ld, int rows, int cols, int thread) {
  constexpr int kChunks = COLS / kChunk;
  constexpr int kStep = THREADS / kChunks;  // rows per turn
  static_assert(THREADS % kChunks == 0 && (ROWS % kStep == 0 || kStep % ROWS == 0));
  const int first = thread / kChunks, chunk = thread % kChunks;
  const int valid = clamp_chunk(cols - chunk * kChunk);
  const T* p = source + first * ld + chunk * kChunk;
  if (kStep > ROWS && first >= ROWS) return;
#pragma unroll
  for (int i = 0; i < (ROWS + kStep - 1) / kStep; ++i) {
    const int row = first + i * kStep;
    const bool inside = row < rows && valid > 0;
    copy_chunk<kAligned>(shared + tile_offset<COLS>(row, chunk),
                         inside ? p + i * kStep * ld : source, inside ? valid : 0);
  }
}

}  // namespace lora_kernels
