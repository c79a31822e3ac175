// Tensor copies between global and shared memory by the copy engine (PTX ISA,
// "cp.async.bulk.tensor"), sm_90 and later. Coordinates are in elements, innermost first. What lies
// outside of the tensor is read as zero, counts as transferred, and is never written.
#pragma once

#include <cuda.h>

#include "gpu.h"

namespace lora_kernels {

LK_DEVICE uint64_t map_address(const CUtensorMap* map) { return reinterpret_cast<uint64_t>(map); }

LK_DEVICE void tma_prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map_address(map)) : "memory");
}

// A box into this block's shared memory; its bytes complete on `barrier`.
LK_DEVICE void tma_load(uint32_t destination, const CUtensorMap* map, uint32_t barrier, int column,
                        int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(destination),
      "l"(map_address(map)), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// A box into the same place of every block whose bit is set in `blocks`; its bytes complete on the
// barrier at the address of `barrier` in each of them.
LK_DEVICE void tma_load_multicast(uint32_t destination, const CUtensorMap* map, uint32_t barrier,
                                  int column, int row, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(destination),
      "l"(map_address(map)), "r"(barrier), "r"(column), "r"(row), "h"(blocks)
      : "memory");
}

// A box from shared memory, as part of this thread's current bulk group.
LK_DEVICE void tma_store(const CUtensorMap* map, uint32_t source, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(
                   map_address(map)),
               "r"(source), "r"(column), "r"(row)
               : "memory");
}

LK_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// At most kPending of this thread's groups still read shared memory.
template <int kPending>
LK_DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// All of this thread's groups have been written.
LK_DEVICE void tma_store_wait_all() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Ordinary stores of this thread to shared memory become visible to the copy engine and to wgmma;
// a barrier with the thread that starts them follows.
LK_DEVICE void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace lora_kernels
