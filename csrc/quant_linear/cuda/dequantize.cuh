// Dequantize: W [N, K] in fp32, bf16 or fp16 from its packed form, nested statistics included, in
// one launch. One kernel for each way of packing; the dtype of the result is a run-time argument.
//
// Math      formats.py; fp32, each product rounded, one last rounding.
// Grid      flat: a warp takes 2 x 1024 elements of the flattened tensor. Each lane loads 16 bytes
//           (32 codes); the words go through shared memory, so that a lane then holds eight
//           elements next to those of its neighbour and 16-byte stores of a warp are contiguous.
//           bytes (int8, fp8): a thread takes 16 elements of the flattened tensor.
//           int4 (gptq, awq): a block takes 128 k of 64 columns of the packed matrix, which has k
//           down its rows, and turns it in shared memory: 16 lanes store 128 k of one row of W.
// Bytes     packed data, statistics and the result once each; 16-byte loads of the packed data and
//           16-byte stores. Statistics of a run of eight elements are one load from L1.
// Numerics  bits of reference.py, for any block size from 32 on, any tail.
// Limits    N K < 2^47; what is not 16-byte aligned (int4: a K or N that is no multiple of 8)
//           takes element-wise accesses.
#pragma once

#include "decode.cuh"

namespace lora_kernels::quant_linear::cuda {

constexpr int kDequantizeThreads = 256;

// Eight values from element e on, a multiple of 8.
LK_DEVICE void store8(const DequantizeParams& p, int64_t e, const float (&v)[8]) {
  if (p.dtype == Dtype::kFloat32) {
    float* to = static_cast<float*>(p.out) + e;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      reinterpret_cast<uint4*>(to)[h] = make_uint4(as_bits(v[4 * h]), as_bits(v[4 * h + 1]),
                                                   as_bits(v[4 * h + 2]), as_bits(v[4 * h + 3]));
    }
    return;
  }
  uint32_t pair[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pair[i] = p.dtype == Dtype::kBFloat16 ? pack2<bf16>(v[2 * i], v[2 * i + 1])
                                          : pack2<fp16>(v[2 * i], v[2 * i + 1]);
  }
  *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.out) + e) =
      make_uint4(pair[0], pair[1], pair[2], pair[3]);
}

// Eight values of one row, of which `count` exist.
LK_DEVICE void store_row(const DequantizeParams& p, int64_t e, const float (&v)[8], int count) {
  if (count >= 8 && e % 8 == 0) return store8(p, e, v);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count) store_from_float(p.out, e + i, p.dtype, v[i]);
  }
}

LK_DEVICE bool aligned16(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// 16 bytes from `offset` on, zeros behind the end.
LK_DEVICE uint4 load_bytes(const void* data, int64_t offset, int64_t bytes) {
  const uint8_t* from = static_cast<const uint8_t*>(data) + offset;
  if (offset + 16 <= bytes && aligned16(from)) return *reinterpret_cast<const uint4*>(from);
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const uint32_t byte = offset + i < bytes ? from[i] : 0u;
    words[i / 4] |= byte << (8 * (i % 4));
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

struct FlatShape {
  static constexpr int kTiles = 2, kTile = 1024;  // per warp; elements
  static constexpr int kWarps = kDequantizeThreads / 32;
  static constexpr int64_t kElements = static_cast<int64_t>(kWarps) * kTiles * kTile;
  static constexpr size_t kShared =
      (CodeTable::kFloats + 256) * sizeof(float) + kWarps * kTiles * kTile / 2;
};

__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_flat_kernel(const __grid_constant__ DequantizeParams p) {
  using Shape = FlatShape;
  LK_DYNAMIC_SHARED(shared);
  const QuantWeight& w = p.w;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  float* table = reinterpret_cast<float*>(shared);
  float* nested = table + CodeTable::kFloats;
  uint32_t* words =
      reinterpret_cast<uint32_t*>(nested + 256) + warp * Shape::kTiles * Shape::kTile / 8;
  const int64_t tile0 = (static_cast<int64_t>(blockIdx.x) * Shape::kWarps + warp) * Shape::kTiles;
  const int64_t bytes = (p.numel + 1) / 2;
  uint4 codes[Shape::kTiles];
#pragma unroll
  for (int i = 0; i < Shape::kTiles; ++i) {
    codes[i] = load_bytes(w.packed, (tile0 + i) * (Shape::kTile / 2) + 16 * lane, bytes);
  }
  RawScale raw[Shape::kTiles][4];
#pragma unroll
  for (int i = 0; i < Shape::kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t e = (tile0 + i) * Shape::kTile + 8 * (32 * j + lane);
      const uint32_t block = static_cast<uint32_t>(e >> w.block_shift);
      raw[i][j] = e < p.numel ? flat_scale(w, block) : RawScale{0.0f, 0u};
    }
  }
  CodeTable::fill<kDequantizeThreads>(table, w.code, thread);
  if (w.nested_shift != 0) nested[thread] = w.nested_code[thread];
  const float offset = w.nested_shift != 0 ? *w.offset : 0.0f;
#pragma unroll
  for (int i = 0; i < Shape::kTiles; ++i) reinterpret_cast<uint4*>(words)[32 * i + lane] = codes[i];
  __syncthreads();
  const CodeTable code(shared, lane);
#pragma unroll
  for (int i = 0; i < Shape::kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t e = (tile0 + i) * Shape::kTile + 8 * (32 * j + lane);
      if (e >= p.numel) continue;
      const uint32_t word = words[128 * i + 32 * j + lane];
      const float scale = flat_absmax(w, raw[i][j], nested, offset);
      float v[8];
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        v[2 * b] = product(code.at(word, 8 * b + 4), scale);
        v[2 * b + 1] = product(code.at(word, 8 * b), scale);
      }
      store_row(p, e, v, static_cast<int>(p.numel - e < 8 ? p.numel - e : 8));
    }
  }
}

template <Layout kLayout>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_bytes_kernel(const __grid_constant__ DequantizeParams p) {
  const QuantWeight& w = p.w;
  const int64_t e0 = 16 * (static_cast<int64_t>(blockIdx.x) * kDequantizeThreads + threadIdx.x);
  if (e0 >= p.numel) return;
  int64_t n = e0 / w.k, k = e0 - n * w.k;
  const uint8_t* packed = static_cast<const uint8_t*>(w.packed);
  const bool one_scale = k + 16 <= w.k && k / w.scale_columns == (k + 15) / w.scale_columns;
  float v[8];
  if (one_scale && aligned16(packed)) {
    const uint4 codes = *reinterpret_cast<const uint4*>(packed + e0);
    const float scale = row_scale(w, n, k);
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float four[4];
        scaled_bytes<kLayout>(words[2 * half + i], scale, w.factor, four);
#pragma unroll
        for (int j = 0; j < 4; ++j) v[4 * i + j] = four[j];
      }
      store8(p, e0 + 8 * half, v);
    }
    return;
  }
  const int64_t end = e0 + 16 < p.numel ? e0 + 16 : p.numel;
#pragma unroll 1
  for (int64_t e = e0; e < end; ++e) {
    float four[4];
    scaled_bytes<kLayout>(packed[e], row_scale(w, n, k), w.factor, four);
    store_from_float(p.out, e, p.dtype, four[0]);
    if (++k == w.k) {
      k = 0;
      ++n;
    }
  }
}

struct Int4Shape {
  static constexpr int kDepth = 128, kColumns = 64;  // k and n of a block
  static constexpr int kOctets = kDepth / 8;
  static constexpr int kGptqRow = kColumns + 1;        // words of eight k's
  static constexpr int kAwqRow = kDepth + kDepth / 8;  // words of one k, those of eight n's apart
  static constexpr size_t kWords = kColumns / 8 * kAwqRow;
  static_assert(kOctets * kGptqRow <= kWords);
};

// Four words of a row from `column` on; what lies outside of the matrix is zero and not read.
LK_DEVICE void load_words(const QuantWeight& w, int64_t row, int64_t rows, int64_t column,
                          int64_t columns, uint32_t (&words)[4]) {
  const uint32_t* from = static_cast<const uint32_t*>(w.packed) + row * columns + column;
  if (row < rows && column + 4 <= columns && aligned16(from)) {
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = row < rows && column + i < columns ? from[i] : 0u;
}

__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_int4_kernel(const __grid_constant__ DequantizeParams p) {
  using Shape = Int4Shape;
  LK_DYNAMIC_SHARED(shared);
  const QuantWeight& w = p.w;
  uint32_t* tile = reinterpret_cast<uint32_t*>(shared);
  const int thread = threadIdx.x;
  const bool awq = w.layout == Layout::kAwq;
  const int64_t k0 = static_cast<int64_t>(blockIdx.x) * Shape::kDepth;
  const int64_t n0 = static_cast<int64_t>(blockIdx.y) * Shape::kColumns;
  uint32_t words[4];
  if (awq) {
    const int k = thread / 2, column = thread % 2 * 4;
    load_words(w, k0 + k, w.k, n0 / 8 + column, w.packed_n, words);
#pragma unroll
    for (int i = 0; i < 4; ++i) tile[(column + i) * Shape::kAwqRow + k + k / 8] = words[i];
  } else {
    const int octet = thread / 16, column = thread % 16 * 4;
    load_words(w, k0 / 8 + octet, (w.k + 7) / 8, n0 + column, w.n, words);
#pragma unroll
    for (int i = 0; i < 4; ++i) tile[octet * Shape::kGptqRow + column + i] = words[i];
  }
  __syncthreads();
#pragma unroll 1
  for (int item = thread; item < Shape::kOctets * Shape::kColumns; item += kDequantizeThreads) {
    const int octet = item % Shape::kOctets, column = item / Shape::kOctets;
    const int64_t n = n0 + column, k = k0 + 8 * octet;
    if (n >= w.n || k >= w.k) continue;
    uint32_t codes;
    if (awq) {
      const uint32_t* from = tile + column / 8 * Shape::kAwqRow + 9 * octet;
      codes = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) codes |= (from[i] >> column_shift(w.layout, n) & 15u) << (4 * i);
    } else {
      codes = tile[octet * Shape::kGptqRow + column];
    }
    const int count = static_cast<int>(w.k - k < 8 ? w.k - k : 8);
    int64_t last = -1;
    RawScale scale{};
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t at = i < count ? k + i : k;
      const int64_t group = w.g_idx != nullptr ? w.g_idx[at] : at / w.group;
      if (i == 0 || group != last) scale = int4_scale(w, group, n);
      last = group;
      v[i] = int4_value(codes >> (4 * i) & 15u, scale.code, scale.value);
    }
    store_row(p, n * w.k + k, v, count);
  }
}

}  // namespace lora_kernels::quant_linear::cuda
