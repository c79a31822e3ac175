// Dropout inside the kernels: the generator's words become AND masks of operand registers, or
// factors of accumulators. Definition: lora_kernels/ops/_philox.py.
//
// A register of a 16-bit mma operand holds columns k and k + 1 (k even), which are the two halves
// of one word; the words of one call belong to k, k + 32, k + 64 and k + 96 of a 128-column block.
// So a thread that owns columns 2t, 2t + 1 of every group of 8 uses whole calls.
#pragma once

#include "../../common/gpu.h"
#include "../../common/philox.h"
#include "params.h"

namespace lora_kernels::lora_linear::cuda {

struct DropoutKey {
  uint32_t bound, key0, key1;  // bound: the threshold in the upper half
  bool drops_all;              // then `bound` has no meaning and the caller leaves the sum at zero

  LK_DEVICE explicit DropoutKey(const Dropout& d)
      : bound(d.threshold << 16), drops_all(d.threshold > 0xffffu) {
    key0 = d.key[0];
    key1 = d.key[1];
    if (d.threshold != 0 && d.seed != nullptr) {
      const uint64_t seed = static_cast<uint64_t>(*d.seed);
      key0 = static_cast<uint32_t>(seed);
      key1 = static_cast<uint32_t>(seed >> 32);
    }
  }

  // Words of the four column pairs (128 * block + 32 * w + 2 * pair) of one row.
  LK_DEVICE void words(int64_t row, int block, int pair, int stream, uint32_t (&w)[4]) const {
    if (LK_FAULT(kShiftedMask)) ++row;
    philox_words(key0, key1, static_cast<uint32_t>(16 * block + pair), static_cast<uint32_t>(row),
                 static_cast<uint32_t>(stream), w);
  }

  // Keeps the compiler from holding the 14 round keys in registers from call to call.
  LK_DEVICE void forget_schedule() {
#if !defined(LK_EMULATOR)
    asm volatile("" : "+r"(key0), "+r"(key1));
#endif
  }

  LK_DEVICE bool keeps_low(uint32_t word) const { return word << 16 >= bound; }
  LK_DEVICE bool keeps_high(uint32_t word) const { return word >= bound; }

  // A register of two elements without the dropped ones.
  LK_DEVICE uint32_t keep(uint32_t pair, uint32_t word) const {
    if (!keeps_low(word)) pair &= 0xffff0000u;
    if (!keeps_high(word)) pair &= 0x0000ffffu;
    return pair;
  }
};

}  // namespace lora_kernels::lora_linear::cuda
