// Transaction barriers in shared memory (PTX ISA, "mbarrier") and cluster barriers.
// sm_90 and later. Addresses are 32-bit shared-memory addresses.
#pragma once

#include "cp_async.cuh"

#if defined(LK_EMULATOR)
#include "emulator/hopper.h"
#endif

namespace lora_kernels {

LK_DEVICE void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
#if defined(LK_EMULATOR)
  emulator::mbarrier_init(barrier, arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
#endif
}

// Makes the initialisations visible to the copy engine and to the other blocks of the cluster; a
// barrier of the block or cluster follows.
LK_DEVICE void mbarrier_init_fence() {
#if !defined(LK_EMULATOR)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// One arrival, and `bytes` more to come from the copy engine before the phase ends.
LK_DEVICE void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
#if defined(LK_EMULATOR)
  emulator::mbarrier_arrive(barrier, bytes);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
#endif
}

// One arrival.
LK_DEVICE void mbarrier_arrive(uint32_t barrier) {
#if defined(LK_EMULATOR)
  emulator::mbarrier_arrive(barrier, 0);
#else
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}

// Returns when the phase of the given parity has ended. A barrier starts in phase 0: waiting for
// parity 1 then returns at once, for parity 0 only after the first phase has ended.
LK_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
#if defined(LK_EMULATOR)
  if (!LK_FAULT(kMissingWait)) emulator::mbarrier_wait(barrier, parity);
#else
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}

#if !defined(LK_EMULATOR)

// One arrival at the barrier that block `cta` of the cluster has at the same address.
LK_DEVICE void mbarrier_arrive_cluster(uint32_t barrier, uint32_t cta) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(barrier),
      "r"(cta)
      : "memory");
}

// The same where other blocks of the cluster arrive.
LK_DEVICE void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

LK_DEVICE uint32_t cluster_rank() {
  uint32_t value;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(value));
  return value;
}

LK_DEVICE uint32_t cluster_size() {
  uint32_t value;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(value));
  return value;
}

// All threads of all blocks of the cluster.
LK_DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

#endif

}  // namespace lora_kernels
