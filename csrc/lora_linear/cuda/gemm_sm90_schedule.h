// Tile shapes, tile order and pipeline bookkeeping of the sm_90a GEMM: plain integer code, shared
// by the kernel, its launcher and the CPU tests (tests/csrc/test_gemm_sm90.cpp).
#pragma once

#include <cstdint>

#include "../../common/host_device.h"
#include "../../common/smem_tile.h"

namespace lora_kernels::lora_linear::cuda {

constexpr int kSm90BlockM = 128;  // two consumer warpgroups of 64 rows
constexpr int kSm90BlockK = 64;   // one swizzled row
constexpr int kSm90ConsumerWarps = 8;
constexpr int kSm90Threads = 3 * 128;  // one producer and two consumer warpgroups
constexpr int kSm90MaxCluster = 2;
// At entry each thread has the share of three equal warpgroups, in steps of 8: 65536 / 384 -> 168.
constexpr int kSm90ProducerRegisters = 40;
constexpr int kSm90ConsumerRegisters = 232;
static_assert(kSm90ProducerRegisters + 2 * kSm90ConsumerRegisters <= 3 * 168);

// Shared memory: stages of [A tile | B tile], two staging boxes and
// 64 biases for each consumer, barriers.
template <int kBlockN>
struct Sm90Tile {
  static constexpr int kABytes = kSm90BlockM * kTileRowBytes;
  static constexpr int kBBytes = kBlockN * kTileRowBytes;
  static constexpr int kStageBytes = kABytes + kBBytes;
  static constexpr int kBoxBytes = 64 * kTileRowBytes;  // 64 rows of 64 elements
  static constexpr int kStages = 192 * 1024 / kStageBytes;
  static constexpr int kStagingBytes = 2 * 2 * kBoxBytes;
  static constexpr int kBiasBytes = 2 * 64 * 4;
  static constexpr int kBarrierBytes = 2 * kStages * 8;
  static constexpr int kSharedBytes =
      kSwizzlePeriod + kStages * kStageBytes + kStagingBytes + kBiasBytes + kBarrierBytes;
  static_assert(kSharedBytes <= 232448, "more shared memory than a block of sm_90 can have");
};

// A place in the ring of stages; `phase` is the parity of the round.
struct PipelinePlace {
  int stage = 0;
  uint32_t phase = 0;

  template <int kStages>
  LK_HOST_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// The k blocks of one term: `full` of four k16 steps, then, where `tail` > 0, one of `tail` steps.
struct TermBlocks {
  int full;
  int tail;
};

LK_HOST_DEVICE constexpr TermBlocks term_blocks(int k) {
  return {k / kSm90BlockK, (k % kSm90BlockK + 15) / 16};
}

// Tiles are handed out to clusters. A cluster takes cluster_size neighbouring blocks of rows and
// one block of columns. Within one problem, bands of kBand row blocks are walked column by column,
// so that the operands that concurrent clusters read stay in L2.
constexpr int kSm90Band = 16;

struct TilePlace {
  int m_block;  // first row block of the cluster, in units of cluster_size blocks
  int n_block;
};

LK_HOST_DEVICE constexpr TilePlace place_tile(int tile, int m_blocks, int n_blocks, int band) {
  const int per_band = band * n_blocks;
  const int first = tile / per_band * band;
  const int height = m_blocks - first < band ? m_blocks - first : band;
  const int inside = tile % per_band;
  return {first + inside % height, inside / height};
}

// Draws of dropout against accumulators. Call i (0..3) of lane quad (lane % 4), for a row and 128
// columns, is pair keep_pair(i, quad) of _philox.py; the two halves of its word w decide registers
// `bit` and `bit` + 1 of the 64 columns `chunk`, h = 1 for the row 8 below. All 8 draws of a call
// belong to one thread.
struct KeepPlace {
  int chunk;
  int bit;
};

LK_HOST_DEVICE constexpr int keep_pair(int i, int quad) { return 4 * i + quad; }

LK_HOST_DEVICE constexpr KeepPlace keep_place(int block, int w, int i, int h) {
  return {2 * block + w / 2, 4 * (4 * (w % 2) + i) + 2 * h};
}

}  // namespace lora_kernels::lora_linear::cuda
