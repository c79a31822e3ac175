// Kernel of gemm_sm90.h: persistent, warp-specialised, TMA in, wgmma, TMA out.
//
// Math: C [M, N] = sum over terms t of A_t [M, k_t] B_t, fp32 sum, one rounding at the store.
//   B_t is [N, k] (forward: W, B; K-major for wgmma) or [k, N] (dX: W, A; N-major, the
//   transposed-B form of wgmma, so neither W nor A is copied).
// Work: a cluster of one or two blocks takes 128 rows per block and kBlockN columns; tiles are
//   strided over the grid (place_tile). Warpgroup 0 is the producer, of which one thread works;
//   warpgroups 1 and 2 each multiply 64 rows.
// Pipeline: ring of stages [A 128 x 64 | B kBlockN x 64]. The terms are one long loop over k
//   blocks: a rank-r term is a block like any other, in which TMA fills what lies past r with
//   zeros and only ceil(r / 16) k16 steps are multiplied. `full` of a stage ends when the producer
//   has arrived and all bytes are there; `empty` when all consumer warps of all blocks that the
//   stage is filled for have arrived. One group of products runs while the next is issued.
// Cluster: each block loads its A and half of B, the half goes to both (multicast): B is read once
//   from L2 for two blocks.
// Masked terms (dropout in dX) come first. A single one is masked in place, in the accumulator
//   that the others are then added to. Several (a group) have masks of their own, so each is
//   multiplied by itself, masked and added to a second accumulator, which joins at the end; two of
//   128 x 256 do not fit the registers, so that kernel has 128 columns. Keep bits are drawn while
//   the products run, 8 columns per call, all 8 of them this thread's.
// Bytes: A and B once per tile through L2, C once. Numerics: as the tensor core accumulates.
// Limits: 16-byte aligned pointers and rows (check_sm90), extents below 2^31.
#pragma once

#include "../../common/barrier.cuh"
#include "../../common/mbarrier.cuh"
#include "../../common/tma.cuh"
#include "../../common/wgmma.cuh"
#include "dropout.cuh"
#include "gemm_sm90_kernels.h"
#include "gemm_sm90_params.h"
#include "gemm_sm90_schedule.h"

namespace lora_kernels::lora_linear::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct Sm90Work {
  int problem;
  int m;  // first row of this block
  int n;  // first column
};

template <int kBlockN>
LK_DEVICE Sm90Work find_work(const Sm90Params& p, int tile, int blocks, int rank) {
  int i = 0;
  while (i + 1 < p.problems && tile >= p.problem[i + 1].first_tile) ++i;
  const TilePlace place =
      place_tile(tile - p.problem[i].first_tile, p.m_blocks, p.problem[i].n_blocks, p.band);
  return {i, (place.m_block * blocks + rank) * kSm90BlockM, place.n_block * kBlockN};
}

template <int kBlockN, bool kTransposedB>
LK_DEVICE void produce(const Sm90Params& p, uint32_t stages, uint32_t barriers, int cluster,
                       int clusters, int blocks, int rank) {
  using Tile = Sm90Tile<kBlockN>;
  constexpr int kBoxes = kTransposedB ? kBlockN / 64 : kBlockN / 128;
  PipelinePlace place;
#pragma unroll 1
  for (int tile = cluster; tile < p.tiles; tile += clusters) {
    const Sm90Work work = find_work<kBlockN>(p, tile, blocks, rank);
    const Sm90Problem& problem = p.problem[work.problem];
    for (int t = problem.first_term; t < problem.first_term + problem.terms; ++t) {
      for (int k = 0; k < p.k[t]; k += kSm90BlockK) {
        const uint32_t full = barriers + 8 * place.stage;
        const uint32_t empty = full + 8 * Tile::kStages;
        const uint32_t a = stages + place.stage * Tile::kStageBytes;
        const uint32_t b = a + Tile::kABytes;
        mbarrier_wait_cluster(empty, place.phase ^ 1);
        mbarrier_arrive_expect(full, Tile::kStageBytes);
        tma_load(a, &p.a[t], full, k, work.m);
        for (int box = rank; box < kBoxes; box += blocks) {
          const uint32_t destination = b + box * (Tile::kBBytes / kBoxes);
          const int column = kTransposedB ? work.n + 64 * box : k;
          const int row = kTransposedB ? k : work.n + 128 * box;
          if (blocks == 1) {
            tma_load(destination, &p.b[t], full, column, row);
          } else {
            tma_load_multicast(destination, &p.b[t], full, column, row,
                               static_cast<uint16_t>((1u << blocks) - 1));
          }
        }
        place.advance<Tile::kStages>();
      }
    }
  }
}

// Gives a stage back to the producers of all blocks that fill it; every consumer warp does.
template <int kStages>
LK_DEVICE void release(uint32_t barriers, int stage, int blocks) {
  const int lane = threadIdx.x % 32;
  if (lane < blocks) mbarrier_arrive_cluster(barriers + 8 * (kStages + stage), lane);
  __syncwarp();  // what follows is for whole warps
}

template <bool kTransposedB>
LK_DEVICE uint64_t descriptor_b(uint32_t tile, int k16) {
  return kTransposedB ? n_major_descriptor(tile, k16, 64 * kTileRowBytes)
                      : k_major_descriptor(tile, k16);
}

// Keep bits of this thread's accumulators: bit 4 j + 2 h + e of keep[c] is register 4 j + 2 h + e
// of the 64 columns c.
template <int kBlockN>
LK_DEVICE void draw_keep_bits(const DropoutKey& key, int stream, int row, int n,
                              uint32_t (&keep)[kBlockN / 64]) {
  const int quad = threadIdx.x % 4;
#pragma unroll
  for (int c = 0; c < kBlockN / 64; ++c) keep[c] = 0;
#pragma unroll
  for (int block = 0; block < kBlockN / 128; ++block) {
#pragma unroll 1  // fewer draws at a time: registers
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t word[4];
        key.words(row + 8 * h, n / 128 + block, keep_pair(i, quad), stream, word);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const KeepPlace at = keep_place(block, w, i, h);
          keep[at.chunk] |= (key.keeps_low(word[w]) ? 1u : 0u) << at.bit |
                            (key.keeps_high(word[w]) ? 2u : 0u) << at.bit;
        }
      }
    }
  }
}

// The bias of columns t and t + 128 of a tile, for thread t of a consumer; 0 where there is none.
template <int kBlockN>
LK_DEVICE void load_biases(const Sm90Problem& problem, int n, float (&bias)[kBlockN / 128]) {
#pragma unroll
  for (int i = 0; i < kBlockN / 128; ++i) {
    const int column = n + 128 * i + static_cast<int>(threadIdx.x % 128);
    const bool there = problem.bias != nullptr && column < problem.n;
    bias[i] = there ? load_as_float(problem.bias, column, problem.bias_dtype) : 0.0f;
  }
}

// Bias, rounding, and out through two staging boxes of [64 rows, 64 columns] in turn.
template <typename T, int kBlockN>
LK_DEVICE void store_tile(const Sm90Params& p, const Sm90Work& work, uint32_t staging,
                          float* staged_bias, int consumer, const float (&bias)[kBlockN / 128],
                          const float (&d)[kBlockN / 2]) {
  using Tile = Sm90Tile<kBlockN>;
  const Sm90Problem& problem = p.problem[work.problem];
  const int thread = threadIdx.x % 128;
  const int warp = thread / 32, lane = thread % 32;
  const int row = work.m + 64 * consumer;
  // stmatrix: this lane's row, and whether its 8x8 block is the right one of a pair.
  const int staged_row = 16 * warp + lane % 16;
  const int right = lane / 16;
#pragma unroll
  for (int chunk = 0; chunk < kBlockN / 64; ++chunk) {
    const uint32_t box = staging + (2 * consumer + chunk % 2) * Tile::kBoxBytes;
    if (thread / 64 == chunk % 2) staged_bias[thread % 64] = bias[chunk / 2];
    if (thread == 0) tma_store_wait_read<1>();
    __syncwarp();
    named_barrier(1 + consumer, 128);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      uint32_t packed[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float* v = &d[32 * chunk + 4 * (j + i)];
        const float2 add = reinterpret_cast<const float2*>(staged_bias)[4 * (j + i) + lane % 4];
        packed[2 * i] = pack2<T>(v[0] + add.x, v[1] + add.y);
        packed[2 * i + 1] = pack2<T>(v[2] + add.x, v[3] + add.y);
      }
      store_matrix_x4(box + swizzle_128b(staged_row, j + right), packed[0], packed[1], packed[2],
                      packed[3]);
    }
    async_proxy_fence();
    named_barrier(1 + consumer, 128);
    if (thread == 0) {
      const int column = work.n + 64 * chunk;
      if (row < p.m && column < problem.n) tma_store(&p.c[work.problem], box, column, row);
      tma_store_commit();
    }
    __syncwarp();
  }
}

// d += the product of one term, one group of products in flight. `held` is the stage whose products
// may still run at return, or -1; `accumulate` is 0 where d has no value yet.
template <typename T, int kBlockN, bool kTransposedB>
LK_DEVICE void multiply_term(int k, uint32_t stages, uint32_t barriers, int consumer, int blocks,
                             PipelinePlace& place, int& held, int& accumulate,
                             float (&d)[kBlockN / 2]) {
  using Tile = Sm90Tile<kBlockN>;
  const TermBlocks k_blocks = term_blocks(k);
#pragma unroll 1
  for (int block = 0; block < k_blocks.full; ++block) {
    const uint32_t a = stages + place.stage * Tile::kStageBytes + consumer * Tile::kBoxBytes;
    const uint32_t b = stages + place.stage * Tile::kStageBytes + Tile::kABytes;
    mbarrier_wait(barriers + 8 * place.stage, place.phase);
    pin_registers(d);
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      wgmma<T, kTransposedB>(d, k_major_descriptor(a, s), descriptor_b<kTransposedB>(b, s),
                             accumulate);
      accumulate = 1;
    }
    wgmma_commit();
    wgmma_wait<1>();
    pin_registers(d);
    if (held >= 0) release<Tile::kStages>(barriers, held, blocks);
    held = place.stage;
    place.advance<Tile::kStages>();
  }
  if (k_blocks.tail > 0) {
    const uint32_t a = stages + place.stage * Tile::kStageBytes + consumer * Tile::kBoxBytes;
    const uint32_t b = stages + place.stage * Tile::kStageBytes + Tile::kABytes;
    mbarrier_wait(barriers + 8 * place.stage, place.phase);
#pragma unroll 1
    for (int s = 0; s < k_blocks.tail; ++s) {
      pin_registers(d);
      wgmma_fence();
      wgmma<T, kTransposedB>(d, k_major_descriptor(a, s), descriptor_b<kTransposedB>(b, s),
                             accumulate);
      wgmma_commit();
      accumulate = 1;
    }
    wgmma_wait<1>();
    pin_registers(d);
    if (held >= 0) release<Tile::kStages>(barriers, held, blocks);
    held = place.stage;
    place.advance<Tile::kStages>();
  }
}

// Waits for the products in flight and gives their stage back.
template <int kStages, int kCount>
LK_DEVICE void finish_products(uint32_t barriers, int blocks, int& held, float (&d)[kCount]) {
  wgmma_wait<0>();
  pin_registers(d);
  if (held >= 0) release<kStages>(barriers, held, blocks);
  held = -1;
}

// `finish` has the sums of a tile before they are rounded: (work, consumer, sums).
template <typename T, int kBlockN, bool kTransposedB, int kMasks, class Finish>
LK_DEVICE void consume(const Sm90Params& p, uint32_t stages, uint32_t staging, uint32_t barriers,
                       float* staged_bias, int consumer, int cluster, int clusters, int blocks,
                       int rank, Finish finish) {
  using Tile = Sm90Tile<kBlockN>;
  const int thread = threadIdx.x % 128;
  const DropoutKey key(p.dropout);
  PipelinePlace place;
#pragma unroll 1
  for (int tile = cluster; tile < p.tiles; tile += clusters) {
    const Sm90Work work = find_work<kBlockN>(p, tile, blocks, rank);
    const Sm90Problem& problem = p.problem[work.problem];
    float d[kBlockN / 2];
    [[maybe_unused]] float masked[kMasks == kSeveralMasks ? kBlockN / 2 : 1] = {};
    const int end = problem.first_term + problem.terms;
    int t = problem.first_term;
    int held = -1, accumulate = 0;
    float bias[kBlockN / 128];
    load_biases<kBlockN>(problem, work.n, bias);
    if constexpr (kMasks != kNoMask) {
      const int row = work.m + 64 * consumer + 16 * (thread / 32) + thread % 32 / 4;
#pragma unroll 1
      for (; t < end && p.stream[t] >= 0; ++t) {
        accumulate = 0;
        multiply_term<T, kBlockN, kTransposedB>(p.k[t], stages, barriers, consumer, blocks, place,
                                                held, accumulate, d);
        uint32_t keep[kBlockN / 64];
        draw_keep_bits<kBlockN>(key, p.stream[t], row, work.n, keep);
        finish_products<Tile::kStages>(barriers, blocks, held, d);
#pragma unroll
        for (int i = 0; i < kBlockN / 2; ++i) {
          const float value = (keep[i / 32] >> i % 32 & 1u) ? d[i] : 0.0f;
          if constexpr (kMasks == kOneMask) {
            d[i] = value;
          } else {
            masked[i] += value;
          }
        }
        if constexpr (kMasks == kOneMask) {
          ++t;
          break;
        }
      }
      if constexpr (kMasks == kSeveralMasks) accumulate = 0;
    }
#pragma unroll 1
    for (; t < end; ++t) {
      multiply_term<T, kBlockN, kTransposedB>(p.k[t], stages, barriers, consumer, blocks, place,
                                              held, accumulate, d);
    }
    finish_products<Tile::kStages>(barriers, blocks, held, d);
    if constexpr (kMasks == kSeveralMasks) {
#pragma unroll
      for (int i = 0; i < kBlockN / 2; ++i) d[i] += masked[i];
    }
    finish(work, consumer, d);
    store_tile<T, kBlockN>(p, work, staging, staged_bias, consumer, bias, d);
  }
  if (thread == 0) tma_store_wait_all();
  __syncwarp();
}

// All of a kernel; p lies in its arguments.
template <typename T, int kBlockN, bool kTransposedB, int kMasks, class Finish>
LK_DEVICE void gemm_sm90_tiles(const Sm90Params& p, Finish finish) {
  using Tile = Sm90Tile<kBlockN>;
  extern __shared__ uint8_t shared[];
  const uint32_t stages =
      (shared_address(shared) + kSwizzlePeriod - 1) / kSwizzlePeriod * kSwizzlePeriod;
  const uint32_t staging = stages + Tile::kStages * Tile::kStageBytes;
  const uint32_t barriers = staging + Tile::kStagingBytes + Tile::kBiasBytes;
  const int blocks = cluster_size();
  const int rank = cluster_rank();
  const int cluster = blockIdx.x / blocks;
  const int clusters = gridDim.x / blocks;
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      mbarrier_init(barriers + 8 * stage, 1);
      mbarrier_init(barriers + 8 * (Tile::kStages + stage), blocks * kSm90ConsumerWarps);
    }
    mbarrier_init_fence();
    for (int i = 0; i < p.problems; ++i) {
      const Sm90Problem& problem = p.problem[i];
      for (int t = problem.first_term; t < problem.first_term + problem.terms; ++t) {
        tma_prefetch(&p.a[t]);
        tma_prefetch(&p.b[t]);
      }
    }
  }
  __syncthreads();
  if (blocks > 1) cluster_barrier();

  if (warpgroup == 0) {
    give_registers<kSm90ProducerRegisters>();
    if (threadIdx.x == 0) {
      produce<kBlockN, kTransposedB>(p, stages, barriers, cluster, clusters, blocks, rank);
    }
    __syncwarp();
  } else {
    take_registers<kSm90ConsumerRegisters>();
    float* staged_bias =
        reinterpret_cast<float*>(shared + (staging + Tile::kStagingBytes - shared_address(shared)));
    consume<T, kBlockN, kTransposedB, kMasks>(p, stages, staging, barriers,
                                              staged_bias + 64 * (warpgroup - 1), warpgroup - 1,
                                              cluster, clusters, blocks, rank, finish);
  }
  // No block leaves while another one may still write to it or arrive at its barriers.
  if (blocks > 1) {
    __syncwarp();
    cluster_barrier();
  }
}

#endif  // sm_90a

template <typename T, int kBlockN, bool kTransposedB, int kMasks>
__global__ void __launch_bounds__(kSm90Threads, 1)
    gemm_sm90_kernel(const __grid_constant__ Sm90Params p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  gemm_sm90_tiles<T, kBlockN, kTransposedB, kMasks>(
      p, [](const Sm90Work&, int, float (&)[kBlockN / 2]) {});
#endif
}

}  // namespace lora_kernels::lora_linear::cuda
