// Tile shapes and shared memory of the sm_90a backward: plain integer code.
#pragma once

#include "forward_sm90_schedule.h"

namespace lora_kernels::attention::cuda {

constexpr int kSm90Stream = 64;  // rows of a streamed tile

// Two resident tiles [128, D], stages of two streamed tiles [64, D] and the statistics of 64
// queries, barriers. Tiles are D / 64 boxes of 64 columns.
template <int D>
struct Sm90Gradients {
  static constexpr int kBoxes = D / 64;
  static constexpr int kResidentBoxBytes = 128 * kTileRowBytes;
  static constexpr int kResidentBytes = kBoxes * kResidentBoxBytes;
  static constexpr int kStreamBoxBytes = kSm90Stream * kTileRowBytes;
  static constexpr int kStreamBytes = kBoxes * kStreamBoxBytes;
  static constexpr int kStages = 3;
  static constexpr int kStageBytes = 2 * kStreamBytes;
  static constexpr int kStatisticBytes = 2 * kSm90Stream * 4;  // lse, delta
  static constexpr int kBarriers = 1 + 2 * kStages;
  static constexpr int kSharedBytes = kSwizzlePeriod + 2 * kResidentBytes +
                                      kStages * (kStageBytes + kStatisticBytes) + 8 * kBarriers;
  static_assert(kSharedBytes <= 232448, "more shared memory than a block of sm_90 can have");

  LK_HOST_DEVICE static constexpr int full(int stage) { return 1 + stage; }
  LK_HOST_DEVICE static constexpr int empty(int stage) { return 1 + kStages + stage; }
};

// Operands for k16 step s. A streamed tile is read along its rows for the scores, and with k down
// the rows where it is summed up.
LK_HOST_DEVICE constexpr uint64_t stream_row_operand(uint32_t tile, int s) {
  return k_major_descriptor(tile + s / 4 * (kSm90Stream * kTileRowBytes),
                            static_cast<uint32_t>(s % 4));
}
LK_HOST_DEVICE constexpr uint64_t stream_sum_operand(uint32_t tile, int s) {
  return n_major_descriptor(tile, static_cast<uint32_t>(s), kSm90Stream * kTileRowBytes);
}

}  // namespace lora_kernels::attention::cuda
