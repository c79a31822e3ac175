// Arithmetic of swizzled operand tiles in shared memory: where the copy engine puts an element and
// what wgmma is told about it. No CUDA header: tests/csrc/test_smem_tile.cpp checks it on the CPU.
//
// Every tile here has rows of 128 bytes (64 elements of 16 bits) and starts on a 1024-byte
// boundary. The 128-byte swizzle exchanges the eight 16-byte chunks of a row by xor with the row
// number modulo 8 (PTX ISA: tensor copies, "swizzling modes"; wgmma, "shared memory matrix
// layout").
#pragma once

#include <cstdint>

#include "host_device.h"

namespace lora_kernels {

constexpr int kTileRowBytes = 128;       // the swizzle span
constexpr int kTileColumns = 64;         // 16-bit elements of a row
constexpr int kSwizzlePeriod = 8 * 128;  // bytes after which the pattern repeats

// Byte offset in a tile whose row and 16-byte chunk are given.
LK_HOST_DEVICE constexpr uint32_t swizzle_128b(uint32_t row, uint32_t chunk) {
  return row * kTileRowBytes + ((chunk ^ (row & 7u)) << 4);
}

// The 64-bit operand descriptor of wgmma (PTX ISA, "matrix descriptor format"): start address, LBO
// and SBO in units of 16 bytes at bits 0, 16 and 32; base offset 0 at bits 49-51, as tiles start on
// a pattern boundary; layout type 1, the 128-byte swizzle, at bits 62-63.
LK_HOST_DEVICE constexpr uint64_t wgmma_descriptor(uint32_t start, uint32_t leading_bytes,
                                                   uint32_t stride_bytes) {
  return static_cast<uint64_t>((start & 0x3ffffu) >> 4) |
         static_cast<uint64_t>((leading_bytes & 0x3ffffu) >> 4) << 16 |
         static_cast<uint64_t>((stride_bytes & 0x3ffffu) >> 4) << 32 | uint64_t{1} << 62;
}

// A K-major operand: rows are m or n, a row holds 64 values of k. Eight rows are 1024 bytes (SBO);
// LBO is not used by the swizzled layouts and conventionally 1. The k16 step s starts 32 s bytes
// into the first row: the hardware swizzles the sum of both, so no bit above the row moves.
LK_HOST_DEVICE constexpr uint64_t k_major_descriptor(uint32_t tile, uint32_t k16) {
  return wgmma_descriptor(tile + 32 * k16, 16, kSwizzlePeriod);
}

// An N-major operand: rows are k, a row holds 64 values of n; further n lie in further boxes of
// `box_bytes` (LBO). Eight rows of k are 1024 bytes (SBO), a k16 step is two of those.
LK_HOST_DEVICE constexpr uint64_t n_major_descriptor(uint32_t tile, uint32_t k16,
                                                     uint32_t box_bytes) {
  return wgmma_descriptor(tile + 2 * kSwizzlePeriod * k16, box_bytes, kSwizzlePeriod);
}

}  // namespace lora_kernels
