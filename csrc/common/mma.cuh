// Tensor-core products of one warp, their operand loads, and warp shuffles (sm_80 and newer).
//
// mma_16816: D [16, 8] += A [16, 16] B [16, 8] in fp32. With g = lane / 4 and t = lane % 4 a lane
// holds two neighbouring 16-bit elements per register:
//   A: a0 (row g, k 2t)  a1 (row g + 8, k 2t)  a2 (row g, k 2t + 8)  a3 (row g + 8, k 2t + 8)
//   B: b0 (k 2t, column g)  b1 (k 2t + 8, column g)
//   D: d0, d1 (row g, columns 2t, 2t + 1)  d2, d3 (row g + 8)
//
// ldmatrix_x4: four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of
// matrix l / 8 (16 bytes, aligned). Register i of lane l gets (row l / 4, columns 2 (l % 4)) of
// matrix i, with kTrans (rows 2 (l % 4), column l / 4).
#pragma once

#include "convert.cuh"
#include "cp_async.cuh"

#if defined(LK_EMULATOR)
#include "emulator/warp.h"
#endif

namespace lora_kernels {

template <class T>
LK_DEVICE void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(LK_EMULATOR)
  emulator::mma_16816<T>(d, a, b0, b1);
#else
  if constexpr (is_bf16<T>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

template <bool kTrans>
LK_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#if defined(LK_EMULATOR)
  emulator::ldmatrix<4, kTrans>(r, row);
#else
  if constexpr (kTrans) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
#endif
  if (LK_FAULT(kFragmentOrder)) {
    const uint32_t second = r[1];
    r[1] = r[2];
    r[2] = second;
  }
}

// Two matrices; the addresses of lanes 0..15 count, but all lanes give a valid one.
template <bool kTrans>
LK_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
#if defined(LK_EMULATOR)
  emulator::ldmatrix<2, kTrans>(r, row);
#else
  if constexpr (kTrans) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];\n"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];\n"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
  }
#endif
}

// Value of lane (lane ^ mask).
LK_DEVICE uint32_t shuffle_xor(uint32_t value, int mask) {
#if defined(LK_EMULATOR)
  return emulator::shuffle_xor(value, mask);
#else
  return __shfl_xor_sync(0xffffffffu, value, mask);
#endif
}

// A value that is the same in the whole warp, told to the compiler.
LK_DEVICE int warp_uniform(int value) {
#if defined(LK_EMULATOR)
  return value;
#else
  return __shfl_sync(0xffffffffu, value, 0);
#endif
}

// Sum over a warp, in the same order in every lane.
LK_DEVICE float warp_sum(float value) {
  for (int mask = 16; mask > 0; mask /= 2) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits = shuffle_xor(bits, mask);
    float other;
    memcpy(&other, &bits, 4);
    value += other;
  }
  return value;
}

}  // namespace lora_kernels
