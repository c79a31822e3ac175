// Faults that can be planted in a kernel, to see that the tests find them. Chosen at run time in
// emulator builds with -DLK_PLANTED_FAULTS; constant false, and gone, in every other build.
#pragma once

namespace lora_kernels::faults {

enum Fault : int {
  kNone = 0,
  kFragmentOrder = 1,   // two registers of an mma operand swapped
  kMissingBarrier = 2,  // a __syncthreads of the main loop left out
  kMissingWait = 3,     // cp.async waited for one group too few
  kShiftedMask = 4,     // dropout decided for the neighbouring row
  kWindowEdge = 5,      // a query sees one key too many
  kShiftedTable = 6,    // cos and sin of the next position
};

}  // namespace lora_kernels::faults

#if defined(LK_EMULATOR) && defined(LK_PLANTED_FAULTS)
#include "scheduler.h"
#define LK_FAULT(name) lora_kernels::emulator::planted(lora_kernels::faults::name)
#else
#define LK_FAULT(name) false
#endif
