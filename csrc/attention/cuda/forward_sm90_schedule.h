// Tile shapes, shared memory and pipeline bookkeeping of the sm_90a forward: plain integer code,
// shared by the kernel, its launcher and the CPU tests (tests/csrc/test_attention_sm90.cpp).
#pragma once

#include <cstdint>

#include "../../common/host_device.h"
#include "../../common/smem_tile.h"

namespace lora_kernels::attention::cuda {

constexpr int kSm90Rows = 128;         // two consumer warpgroups of 64 queries
constexpr int kSm90Keys = 128;         // of a block
constexpr int kSm90Threads = 3 * 128;  // one producer and two consumer warpgroups
constexpr int kSm90ConsumerWarps = 8;
// At entry each thread has the share of three equal warpgroups, in steps of 8: 65536 / 384 -> 168.
constexpr int kSm90ProducerRegisters = 40;
constexpr int kSm90ConsumerRegisters = 232;
static_assert(kSm90ProducerRegisters + 2 * kSm90ConsumerRegisters <= 3 * 168);

// A tile is D / 64 boxes of [128 rows, 64 columns], swizzled; shared memory is the tile of Q, the
// stages of [K tile | V tile] and the barriers.
template <int D>
struct Sm90Forward {
  static constexpr int kBoxes = D / 64;
  static constexpr int kBoxBytes = 128 * kTileRowBytes;
  static constexpr int kTileBytes = kBoxes * kBoxBytes;
  static constexpr int kStages = D == 64 ? 4 : 2;
  static constexpr int kStageBytes = 2 * kTileBytes;
  static constexpr int kBarriers = 1 + 4 * kStages;
  static constexpr int kSharedBytes =
      kSwizzlePeriod + kTileBytes + kStages * kStageBytes + 8 * kBarriers;
  static_assert(kSharedBytes <= 232448, "more shared memory than a block of sm_90 can have");

  // Barriers: Q is there; then per stage K is there, V is there, K is read, V is read.
  LK_HOST_DEVICE static constexpr int full_k(int stage) { return 1 + stage; }
  LK_HOST_DEVICE static constexpr int full_v(int stage) { return 1 + kStages + stage; }
  LK_HOST_DEVICE static constexpr int empty_k(int stage) { return 1 + 2 * kStages + stage; }
  LK_HOST_DEVICE static constexpr int empty_v(int stage) { return 1 + 3 * kStages + stage; }
};

// A place in the ring of stages; `phase` is the parity of the round.
template <int kStages>
struct RingPlace {
  int stage = 0;
  uint32_t phase = 0;

  LK_HOST_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Operands of the products, for k16 step s. Scores: Q, rows 64 `consumer`.., and K, both [rows, D],
// k along the row. Output: V [keys, D], k down the rows, N-major.
LK_HOST_DEVICE constexpr uint64_t row_operand(uint32_t tile, int first_row, int s) {
  return k_major_descriptor(tile + s / 4 * (128 * kTileRowBytes) + first_row * kTileRowBytes,
                            static_cast<uint32_t>(s % 4));
}
LK_HOST_DEVICE constexpr uint64_t value_operand(uint32_t tile, int s) {
  return n_major_descriptor(tile, static_cast<uint32_t>(s), 128 * kTileRowBytes);
}

}  // namespace lora_kernels::attention::cuda
