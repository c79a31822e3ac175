// Tensor copies between global and shared memory by the copy engine (PTX ISA,
// "cp.async.bulk.tensor"), sm_90 and later. Coordinates are in elements, innermost first. What lies
// outside of the tensor is read as zero, counts as transferred, and is never written.
#pragma once

#include "gpu.h"
#include "tensor_map.h"

namespace lora_kernels {

#if !defined(LK_EMULATOR)
LK_DEVICE uint64_t map_address(const TensorMap* map) { return reinterpret_cast<uint64_t>(map); }
#endif

LK_DEVICE void tma_prefetch([[maybe_unused]] const TensorMap* map) {
#if !defined(LK_EMULATOR)
  asm volatile("prefetch.tensormap [%0];" ::"l"(map_address(map)) : "memory");
#endif
}

// A box of a tensor of four dimensions.
LK_DEVICE void tma_load(uint32_t destination, const TensorMap* map, uint32_t barrier, int c0,
                        int c1, int c2, int c3) {
#if defined(LK_EMULATOR)
  emulator::tma_load(destination, map, barrier, {c0, c1, c2, c3});
#else
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(destination),
      "l"(map_address(map)), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
#endif
}

// Ordinary stores of this thread to shared memory become visible to the copy engine and to wgmma;
// a barrier with the thread that starts them follows.
LK_DEVICE void async_proxy_fence() {
#if !defined(LK_EMULATOR)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#if !defined(LK_EMULATOR)

// A box into this block's shared memory; its bytes complete on `barrier`.
LK_DEVICE void tma_load(uint32_t destination, const TensorMap* map, uint32_t barrier, int column,
                        int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(destination),
      "l"(map_address(map)), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// A box into the same place of every block whose bit is set in `blocks`; its bytes complete on the
// barrier at the address of `barrier` in each of them.
LK_DEVICE void tma_load_multicast(uint32_t destination, const TensorMap* map, uint32_t barrier,
                                  int column, int row, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(destination),
      "l"(map_address(map)), "r"(barrier), "r"(column), "r"(row), "h"(blocks)
      : "memory");
}

// A box from shared memory, as part of this thread's current bulk group.
LK_DEVICE void tma_store(const TensorMap* map, uint32_t source, int column, int row) {
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

#endif

}  // namespace lora_kernels
