// Quantize: nf4 and fp4 codes with their statistics, statistics of statistics, int8 rows.
//
// Math      lora_kernels/ops/quant_linear/formats.py and encode.py, fp32, every step rounded: the
//           bytes are those of reference.py. A code is the number of middles between neighbouring
//           values that are smaller than the scaled element, so ties go down.
// Grid      flat: a warp per block of elements, two neighbours per lane and turn, so a lane makes
//           whole bytes; the block is read twice, the second time from L1. nested: a warp per block
//           of statistics. rows: 256 threads per row, which is read twice.
// Bytes     elements, codes and statistics once each from memory.
// Limits    finite values (the caller has looked); blocks of 32 and more, a power of two.
#pragma once

#include <cmath>

#include "../../common/mma.cuh"
#include "decode.cuh"

namespace lora_kernels::quant_linear::cuda {

constexpr int kQuantizeThreads = 256;

LK_DEVICE float magnitude(float v) { return as_float(as_bits(v) & 0x7fffffffu); }

// Largest magnitude of a warp, in every lane. Bits of positive floats are in the order of floats.
LK_DEVICE float warp_largest(float v) {
  uint32_t bits = as_bits(v);
  for (int mask = 16; mask > 0; mask /= 2) {
    const uint32_t other = shuffle_xor(bits, mask);
    bits = other > bits ? other : bits;
  }
  return as_float(bits);
}

LK_DEVICE float at_least(float v, float least) { return v < least ? least : v; }

LK_DEVICE float middle(float a, float b) { return product(sum(a, b), 0.5f); }

LK_DEVICE float quotient(float a, float b) {
#if defined(LK_EMULATOR)
  return a / b;
#else
  return __fdiv_rn(a, b);
#endif
}

LK_DEVICE float nearest_integer(float v) {  // ties to even
#if defined(LK_EMULATOR)
  return std::nearbyint(v);
#else
  return rintf(v);
#endif
}

__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_flat_kernel(const __grid_constant__ QuantizeFlatParams p) {
  const int lane = threadIdx.x % 32;
  const int64_t size = int64_t{1} << p.block_shift;
  const int warp = threadIdx.x / 32;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * (kQuantizeThreads / 32) + warp;
  const int64_t begin = block << p.block_shift;
  if (begin >= p.numel) return;  // a whole warp
  const int64_t end = begin + size < p.numel ? begin + size : p.numel;
  float largest = 0.0f;
  for (int64_t e = begin + lane; e < end; e += 32) {
    largest = at_least(magnitude(load_as_float(p.w, e, p.dtype)), largest);
  }
  largest = warp_largest(largest);
  if (lane == 0) p.absmax[block] = largest;
  const float limited = at_least(largest, p.least);
  const float inverse = quotient(1.0f, limited);
  const bool partial = end - begin < size;
  for (int64_t e = begin + 2 * lane; e < end; e += 64) {
    uint32_t byte = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float x = e + i < end ? load_as_float(p.w, e + i, p.dtype) : 0.0f;
      const float scaled = partial ? quotient(x, limited) : product(x, inverse);
      int index = 0;
#pragma unroll
      for (int c = 0; c < 15; ++c) index += p.middle[c] < scaled ? 1 : 0;
      byte = byte << 4 | static_cast<uint32_t>(p.nibbles >> (4 * index) & 15u);
    }
    p.packed[e / 2] = static_cast<uint8_t>(byte);
  }
}

__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_nested_kernel(const __grid_constant__ QuantizeNestedParams p) {
  LK_DYNAMIC_SHARED(shared);
  float* middles = reinterpret_cast<float*>(shared);
  const int thread = threadIdx.x, lane = thread % 32;
  middles[thread] = thread < 255 ? middle(p.code[thread], p.code[thread + 1]) : 0.0f;
  __syncthreads();
  const int64_t block = static_cast<int64_t>(blockIdx.x) * (kQuantizeThreads / 32) + thread / 32;
  const int64_t begin = block << p.nested_shift;
  if (begin >= p.blocks) return;  // a whole warp
  const int64_t next = begin + (int64_t{1} << p.nested_shift);
  const int64_t end = next < p.blocks ? next : p.blocks;
  const float offset = *p.offset;
  float largest = 0.0f;
  for (int64_t i = begin + lane; i < end; i += 32) {
    largest = at_least(magnitude(sum(p.absmax[i], -offset)), largest);
  }
  // The tail of a partial block is filled with zeros, which change no maximum.
  largest = warp_largest(largest);
  if (lane == 0) p.nested_absmax[block] = largest;
  const float inverse = quotient(1.0f, at_least(largest, p.least));
  for (int64_t i = begin + lane; i < end; i += 32) {
    const float scaled = product(sum(p.absmax[i], -offset), inverse);
    int low = 0;  // middles[0 .. low) < scaled
#pragma unroll
    for (int step = 128; step > 0; step /= 2) {
      if (low + step <= 255 && middles[low + step - 1] < scaled) low += step;
    }
    p.codes[i] = static_cast<uint8_t>(low);
  }
}

__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_rows_kernel(const __grid_constant__ QuantizeRowsParams p) {
  LK_DYNAMIC_SHARED(shared);
  float* of_warp = reinterpret_cast<float*>(shared);
  const int thread = threadIdx.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.k;
  float largest = 0.0f;
  for (int64_t k = thread; k < p.k; k += kQuantizeThreads) {
    largest = at_least(magnitude(load_as_float(p.w, first + k, p.dtype)), largest);
  }
  largest = warp_largest(largest);
  if (thread % 32 == 0) of_warp[thread / 32] = largest;
  __syncthreads();
  for (int i = 0; i < kQuantizeThreads / 32; ++i) largest = at_least(of_warp[i], largest);
  if (thread == 0) p.scale[blockIdx.x] = largest;
  float factor = product(quotient(1.0f, largest == 0.0f ? 1.0f : largest), 127.0f);
  if (factor > 3.4028234663852886e38f) factor = 3.4028234663852886e38f;
  for (int64_t k = thread; k < p.k; k += kQuantizeThreads) {
    const float x = load_as_float(p.w, first + k, p.dtype);
    float q = nearest_integer(product(x, factor));
    q = q < -127.0f ? -127.0f : q > 127.0f ? 127.0f : q;
    p.packed[first + k] = static_cast<int8_t>(q);
  }
}

}  // namespace lora_kernels::quant_linear::cuda
