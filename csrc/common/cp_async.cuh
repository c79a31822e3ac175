// Asynchronous copies from global to shared memory, 16 or 4 bytes each (sm_80 and newer).
#pragma once

#include "gpu.h"

namespace lora_kernels {

LK_DEVICE uint32_t shared_address(const void* p) {
#if defined(LK_EMULATOR)
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - emulator::dynamic_shared());
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#endif
}

// The first `bytes` (0..16) come from memory, the rest of the 16 is zero. With 0 nothing is read,
// but both addresses still have to be aligned to 16.
LK_DEVICE void cp_async16(void* shared, const void* global, int bytes) {
#if defined(LK_EMULATOR)
  emulator::cp_async(shared, global, 16, bytes);
#else
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes)
      : "memory");
#endif
}

// All 16 bytes, or zeros without reading when not `exists`.
LK_DEVICE void cp_async16_if(void* shared, const void* global, bool exists) {
#if defined(LK_EMULATOR)
  emulator::cp_async(shared, global, 16, exists ? 16 : 0);
#else
  asm volatile(
      "{\n.reg .pred skip;\nsetp.eq.u32 skip, %2, 0;\n"
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, skip;\n}\n" ::"r"(shared_address(shared)),
      "l"(global), "r"(static_cast<uint32_t>(exists))
      : "memory");
#endif
}

// Four bytes, aligned to 4, or zeros without reading.
LK_DEVICE void cp_async4_if(void* shared, const void* global, bool exists) {
#if defined(LK_EMULATOR)
  emulator::cp_async(shared, global, 4, exists ? 4 : 0);
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(shared)),
               "l"(global), "r"(exists ? 4 : 0)
               : "memory");
#endif
}

// Ends a group; groups complete in order.
LK_DEVICE void cp_async_commit() {
#if defined(LK_EMULATOR)
  emulator::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Waits until at most kPending of this thread's groups are under way. Other threads see the data
// after a barrier.
template <int kPending>
LK_DEVICE void cp_async_wait() {
#if defined(LK_EMULATOR)
  emulator::cp_async_wait(kPending + (LK_FAULT(kMissingWait) ? 1 : 0));
#else
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
#endif
}

}  // namespace lora_kernels
