// Barriers of a block.
#pragma once

#include "gpu.h"

namespace lora_kernels {

// Named barrier 1..15 of `threads` threads (a multiple of 32); 0 is the one of __syncthreads.
LK_DEVICE void named_barrier(int id, int threads) {
#if defined(LK_EMULATOR)
  emulator::barrier(id, threads);
#else
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Arrives at a named barrier without waiting; `threads` counts those that arrive and those that wait.
LK_DEVICE void named_barrier_arrive(int id, int threads) {
#if defined(LK_EMULATOR)
  emulator::barrier_arrive(id, threads);
#else
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
#endif
}

// The barrier of a pipelined main loop.
LK_DEVICE void pipeline_barrier() {
  if (LK_FAULT(kMissingBarrier)) return;
  __syncthreads();
}

}  // namespace lora_kernels
