// Warpgroup matrix products of sm_90a (PTX ISA, "wgmma.mma_async"): D [64, N] += A [64, 16] B [16,
// N], both operands in shared memory, fp32 accumulators. The call is asynchronous: fence, products,
// commit, wait, and nobody touches the accumulators in between.
//
// Accumulators of thread t, with warp w = t / 32 and lane l = t % 32: d[4 j + 2 h + e] is row
// 16 w + l / 4 + 8 h, column 8 j + 2 (l % 4) + e.
#pragma once

#include "convert.cuh"

#if defined(LK_EMULATOR)
#include "emulator/hopper.h"
#endif

namespace lora_kernels {

#if defined(LK_EMULATOR)

LK_DEVICE void wgmma_fence() {}
LK_DEVICE void wgmma_commit() { emulator::wgmma_commit(); }
template <int kPending>
LK_DEVICE void wgmma_wait() {
  if (!LK_FAULT(kMissingBarrier)) emulator::wgmma_wait(kPending);
}
template <class Register, int kCount>
LK_DEVICE void pin_registers(Register (&)[kCount]) {}

template <typename T, bool kTransposedB, int kCount>
LK_DEVICE void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, int accumulate) {
  emulator::wgmma({d, kCount, accumulate, nullptr, a, b, kTransposedB,
                   [](uint16_t bits) { return to_float(T{bits}); }});
}
template <typename T, bool kTransposedB, int kCount>
LK_DEVICE void wgmma(float (&d)[kCount], const uint32_t* a, uint64_t b, int accumulate) {
  if (LK_FAULT(kFragmentOrder)) b += 2048 / 16;  // the rows of the next step
  emulator::wgmma({d, kCount, accumulate, a, 0, b, kTransposedB,
                   [](uint16_t bits) { return to_float(T{bits}); }});
}

template <int kRegisters>
LK_DEVICE void give_registers() {}
template <int kRegisters>
LK_DEVICE void take_registers() {}

LK_DEVICE void store_matrix_x4(uint32_t row_address, uint32_t r0, uint32_t r1, uint32_t r2,
                               uint32_t r3) {
  emulator::store_matrix_x4(row_address, {r0, r1, r2, r3});
}

#else

// Orders this warpgroup's own accesses to the accumulators before the products that follow.
LK_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

LK_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// At most kPending committed groups are still running.
template <int kPending>
LK_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accumulators across this point.
template <int kCount>
LK_DEVICE void pin_registers(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define LK_ACC4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LK_ACC16(i) LK_ACC4(i), LK_ACC4(i + 4), LK_ACC4(i + 8), LK_ACC4(i + 12)
#define LK_ACC32(i) LK_ACC16(i), LK_ACC16(i + 16)
#define LK_ACC64(i) LK_ACC32(i), LK_ACC32(i + 32)
#define LK_ACC128(i) LK_ACC64(i), LK_ACC64(i + 64)

#define LK_REGISTERS32                                                     \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LK_REGISTERS64                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LK_REGISTERS128                                                                          \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// N accumulator columns make N / 2 registers; the operands are numbered after them.
#define LK_WGMMA(N, COUNT, TYPE, A, B, P, T)                                                   \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" P                        \
               ", 0;\n"                                                                        \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE                  \
               " {" LK_REGISTERS##COUNT "}, %" A ", %" B ", accumulate, 1, 1, 0, %" T ";\n}\n" \
               : LK_ACC##COUNT(0)                                                              \
               : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposedB ? 1 : 0)                    \
               : "memory")

// d += A B, or d = A B where `accumulate` is 0. A is K-major; B is K-major, or N-major where
// kTransposedB. T is bf16 or fp16.
template <typename T, bool kTransposedB>
LK_DEVICE void wgmma(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  if constexpr (is_bf16<T>::value) {
    LK_WGMMA("64", 32, "bf16", "32", "33", "34", "35");
  } else {
    LK_WGMMA("64", 32, "f16", "32", "33", "34", "35");
  }
}

template <typename T, bool kTransposedB>
LK_DEVICE void wgmma(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
  if constexpr (is_bf16<T>::value) {
    LK_WGMMA("128", 64, "bf16", "64", "65", "66", "67");
  } else {
    LK_WGMMA("128", 64, "f16", "64", "65", "66", "67");
  }
}

template <typename T, bool kTransposedB>
LK_DEVICE void wgmma(float (&d)[128], uint64_t a, uint64_t b, int accumulate) {
  if constexpr (is_bf16<T>::value) {
    LK_WGMMA("256", 128, "bf16", "128", "129", "130", "131");
  } else {
    LK_WGMMA("256", 128, "f16", "128", "129", "130", "131");
  }
}

// The same with A in registers: those of lane l of warp w hold, two to a register, row 16 w + l / 4
// and columns 2 (l % 4) of A [64, 16], the row 8 below, then both again 8 columns on. So they are
// 8 neighbouring accumulators of an earlier product, rounded.
#define LK_WGMMA_REGISTERS(N, COUNT, TYPE, A0, A1, A2, A3, B, P, T)                            \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" P                        \
               ", 0;\n"                                                                        \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE                  \
               " {" LK_REGISTERS##COUNT "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" B         \
               ", accumulate, 1, 1, %" T ";\n}\n"                                              \
               : LK_ACC##COUNT(0)                                                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate),          \
                 "n"(kTransposedB ? 1 : 0)                                                     \
               : "memory")

template <typename T, bool kTransposedB>
LK_DEVICE void wgmma(float (&d)[32], const uint32_t* a, uint64_t b, int accumulate) {
  if constexpr (is_bf16<T>::value) {
    LK_WGMMA_REGISTERS("64", 32, "bf16", "32", "33", "34", "35", "36", "37", "38");
  } else {
    LK_WGMMA_REGISTERS("64", 32, "f16", "32", "33", "34", "35", "36", "37", "38");
  }
}

template <typename T, bool kTransposedB>
LK_DEVICE void wgmma(float (&d)[64], const uint32_t* a, uint64_t b, int accumulate) {
  if constexpr (is_bf16<T>::value) {
    LK_WGMMA_REGISTERS("128", 64, "bf16", "64", "65", "66", "67", "68", "69", "70");
  } else {
    LK_WGMMA_REGISTERS("128", 64, "f16", "64", "65", "66", "67", "68", "69", "70");
  }
}

#undef LK_WGMMA_REGISTERS
#undef LK_WGMMA
#undef LK_REGISTERS32
#undef LK_REGISTERS64
#undef LK_REGISTERS128
#undef LK_ACC4
#undef LK_ACC16
#undef LK_ACC32
#undef LK_ACC64
#undef LK_ACC128

template <int kCount>
LK_DEVICE void pin_registers(uint32_t (&a)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(a[i])::"memory");
}

// Hands registers back to, or takes them from, the other warpgroups of the block. Every warp of the
// warpgroup calls it; the sum over all warpgroups may not exceed what the block started with.
template <int kRegisters>
LK_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
LK_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Four 8x8 blocks of 16-bit elements to shared memory. Lane l gives the address of row l % 8 of
// block l / 8 and holds row l / 4, columns 2 (l % 4) + {0, 1} of each block, which is how
// accumulators lie.
LK_DEVICE void store_matrix_x4(uint32_t row_address, uint32_t r0, uint32_t r1, uint32_t r2,
                               uint32_t r3) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address),
      "r"(r0), "r"(r1), "r"(r2), "r"(r3)
      : "memory");
}

#endif

}  // namespace lora_kernels
