// One pass over dY: dS and dB of every member of a group.
//
// Math      ds[m, c] = scaling * keep_scale * sum_n dy[m, n] b[n, c]
//           db[n, c] = scaling * sum_m dy[m, n] s[m, c]
// Shapes    per member dY [M, N] row stride lddy, B [N, rank], S [M, rank]; ds [M, padded
//           columns of the group] with zeros in the padding; dB [N, rank] in a dtype of its own.
// Grid      x: over the members' (512 columns of dY) x (RN ranks), y: share of M in steps of 64
//           rows. Eight warps. A block walks down its rows; each [64, 256] tile of dY goes to
//           shared memory once and is the A operand of both products, read as rows for dS and, by
//           transposing loads, as columns for dB.
// Bytes     dY once (once per RN ranks beyond 64), S and B a few times from L2. Partial sums: dS is
//           written and read once per 512 columns, dB once per share of M; per byte of dY that is
//           4 rank / 512 + 4 rank / (rows of a share), e.g. 1/8 + 1/8 at rank 16 and 512 rows.
// Numerics  fp32 accumulation; partial sums added in a fixed order by dy_sum_kernel; one
//           rounding to T for dS, one to the dtype of dB.
// Resources (ptxas 13.0, sm_80) at RN = 16, 32, 64: 111, 153, 250 registers; 118, 140, 144 KiB of
//           shared memory; 1 block per SM, of which two thirds (half at RN = 64) is dY under way.
// Limits    16-bit T, rank <= 256, members <= 8; M < 2^31 rows, N < 2^31.
#pragma once

#include "../../common/barrier.cuh"
#include "../../common/mma.cuh"
#include "../../common/tile.cuh"
#include "params.h"
#include "split.h"

namespace lora_kernels::lora_linear::cuda {

struct DyPlan {
  int first_block;      // blockIdx.x of the member's first block
  int column_blocks;    // of 512 columns
  int rank_chunks;      // of RN ranks
  int64_t ds_partials;  // floats before this member's [column_blocks, M, padded rank]
  int64_t db_partials;  // floats before this member's [splits, N, padded rank]
  int64_t db_elements;  // elements of dB before this member's
};

struct DyPassArgs {
  DyPassParams p;
  DyPlan plan[kMaxGroup];
  int splits;
  int64_t rows_per_split;  // multiple of 64
  int64_t ds_elements;     // M * padded columns of the group, 0 when dS is not wanted
  int64_t db_elements;     // sum of N * rank over the members whose dB is wanted
  float* partials;
};

// kSmall: for 99 KiB of shared memory, and without 16-byte rows.
template <int RN_, bool kSmall>
struct DyShape {
  static constexpr int RN = RN_;
  static constexpr int kRows = 64, kSub = 256, kSubs = 2, kColumns = kSub * kSubs;
  static constexpr int kThreads = 256;
  static constexpr int kStages = RN <= 32 && !kSmall ? 3 : 2;
  static constexpr int kTileDy = kRows * kSub, kTileS = kRows * RN, kTileB = kColumns * RN;
  static constexpr size_t kShared = (kStages * (kTileDy + kTileS) + kTileB) * 2;
};

template <class T, class Shape, bool kAligned>
struct DyBlock {
  static constexpr int RN = Shape::RN;
  static constexpr int kRows = Shape::kRows, kSub = Shape::kSub, kSubs = Shape::kSubs;
  static constexpr int kHalf = RN / 2;  // ranks of dS per warp

  const DyPassArgs& args;
  const DyMember& w;
  const DyPlan& plan;
  T* shared;
  int thread, lane, warp, column_block, ranks;
  int64_t n0, rank0, m_begin, m_end;
  float acc_ds[kHalf / 8][4];
  float acc_db[kSubs][2][RN / 8][4];

  LK_DEVICE DyBlock(const DyPassArgs& args_, int member, unsigned char* memory)
      : args(args_),
        w(args_.p.member[member]),
        plan(args_.plan[member]),
        shared(reinterpret_cast<T*>(memory)),
        thread(threadIdx.x) {
    lane = thread % 32;
    warp = thread / 32;
    const int block = static_cast<int>(blockIdx.x) - plan.first_block;
    column_block = block / plan.rank_chunks;
    n0 = static_cast<int64_t>(column_block) * Shape::kColumns;
    rank0 = static_cast<int64_t>(block % plan.rank_chunks) * RN;
    ranks = static_cast<int>(w.rank - rank0 < RN ? w.rank - rank0 : RN);
    m_begin = static_cast<int64_t>(blockIdx.y) * args.rows_per_split;
    m_end = m_begin + args.rows_per_split < args.p.m ? m_begin + args.rows_per_split : args.p.m;
    for (int s = 0; s < kSubs; ++s) {
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < RN / 8; ++j) {
          for (int e = 0; e < 4; ++e) acc_db[s][i][j][e] = 0.0f;
        }
      }
    }
  }

  LK_DEVICE T* tile_b() const { return shared; }
  LK_DEVICE T* tile_dy(int stage) const {
    return shared + Shape::kTileB + stage * (Shape::kTileDy + Shape::kTileS);
  }
  LK_DEVICE T* tile_s(int stage) const { return tile_dy(stage) + Shape::kTileDy; }

  LK_DEVICE int columns_from(int64_t n, int most) const {
    const int64_t left = w.n - n;
    return left < 0 ? 0 : static_cast<int>(left < most ? left : most);
  }

  LK_DEVICE void load_b() const {
    if (args.p.ds == nullptr) return;
    load_tile<Shape::kColumns, RN, Shape::kThreads, kAligned>(
        tile_b(), static_cast<const T*>(w.b) + n0 * w.ldb + rank0, w.ldb,
        columns_from(n0, Shape::kColumns), ranks, thread);
  }

  // Step i: rows m_begin + 64 (i / kSubs), columns n0 + 256 (i % kSubs).
  LK_DEVICE void load(int i, int stage) const {
    const int64_t m = m_begin + static_cast<int64_t>(i / kSubs) * kRows, n = n0 + i % kSubs * kSub;
    const int rows = static_cast<int>(m_end - m < kRows ? m_end - m : kRows);
    load_tile<kRows, kSub, Shape::kThreads, kAligned>(tile_dy(stage),
                                                      static_cast<const T*>(w.dy) + m * w.lddy + n,
                                                      w.lddy, rows, columns_from(n, kSub), thread);
    if (w.db == nullptr) return;
    load_tile<kRows, RN, Shape::kThreads, kAligned>(
        tile_s(stage), static_cast<const T*>(w.s) + m * w.lds + rank0, w.lds, rows, ranks, thread);
  }

  LK_DEVICE void clear_ds() {
    for (int j = 0; j < kHalf / 8; ++j) {
      for (int e = 0; e < 4; ++e) acc_ds[j][e] = 0.0f;
    }
  }

  // Warp: 16 rows (warp % 4), half of the ranks (warp / 4), the 256 columns of a tile.
  LK_DEVICE void multiply_ds(int stage, int sub) {
    const T *dy = tile_dy(stage), *b_tile = tile_b();
    const int rank = warp / 4 * kHalf;
#pragma unroll 4
    for (int kk = 0; kk < kSub / 16; ++kk) {
      uint32_t a[4];
      ldmatrix_x4<false>(a,
                         dy + tile_offset<kSub>(16 * (warp % 4) + lane % 16, 2 * kk + lane / 16));
      const int row = sub * kSub + 16 * kk + lane % 16;
      if constexpr (kHalf == 8) {
        uint32_t b[2];
        ldmatrix_x2<true>(b, b_tile + tile_offset<RN>(row, rank / 8));
        mma_16816<T>(acc_ds[0], a, b[0], b[1]);
      } else {
#pragma unroll
        for (int j = 0; j < kHalf / 8; j += 2) {
          uint32_t b[4];
          ldmatrix_x4<true>(b, b_tile + tile_offset<RN>(row, rank / 8 + j + lane / 16));
          mma_16816<T>(acc_ds[j], a, b[0], b[1]);
          mma_16816<T>(acc_ds[j + 1], a, b[2], b[3]);
        }
      }
    }
  }

  // Warp: 32 columns of the tile (rows of dB), all ranks, the 64 rows of the tile as k.
  LK_DEVICE void multiply_db(int stage, float (&acc)[2][RN / 8][4]) {
    const T *dy = tile_dy(stage), *s_tile = tile_s(stage);
#pragma unroll
    for (int kk = 0; kk < kRows / 16; ++kk) {
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // Matrices in the order of an A fragment: columns + 8, then rows + 8.
        const int row = 16 * kk + lane % 8 + lane / 16 * 8;
        ldmatrix_x4<true>(a[i], dy + tile_offset<kSub>(row, 4 * warp + 2 * i + lane / 8 % 2));
      }
#pragma unroll
      for (int j = 0; j < RN / 8; j += 2) {
        uint32_t b[4];
        ldmatrix_x4<true>(b, s_tile + tile_offset<RN>(16 * kk + lane % 16, j + lane / 16));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma_16816<T>(acc[i][j], a[i], b[0], b[1]);
          mma_16816<T>(acc[i][j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }

  LK_DEVICE void store_ds(int64_t m) const {
    const int64_t rank_padded = padded_rank(w.rank);
    float* out = args.partials + plan.ds_partials +
                 static_cast<int64_t>(column_block) * args.p.m * rank_padded;
    for (int j = 0; j < kHalf / 8; ++j) {
      for (int h = 0; h < 2; ++h) {
        const int64_t row = m + 16 * (warp % 4) + lane / 4 + 8 * h;
        const int64_t column = rank0 + warp / 4 * kHalf + 8 * j + 2 * (lane % 4);
        if (row >= m_end || column >= rank_padded) continue;
        out[row * rank_padded + column] = acc_ds[j][2 * h];
        out[row * rank_padded + column + 1] = acc_ds[j][2 * h + 1];
      }
    }
  }

  LK_DEVICE void store_db() const {
    const int64_t rank_padded = padded_rank(w.rank);
    float* out =
        args.partials + plan.db_partials + static_cast<int64_t>(blockIdx.y) * w.n * rank_padded;
#pragma unroll
    for (int s = 0; s < kSubs; ++s) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < RN / 8; ++j) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int64_t n = n0 + s * kSub + 32 * warp + 16 * i + lane / 4 + 8 * h;
            const int64_t column = rank0 + 8 * j + 2 * (lane % 4);
            if (n >= w.n || column >= rank_padded) continue;
            out[n * rank_padded + column] = acc_db[s][i][j][2 * h];
            out[n * rank_padded + column + 1] = acc_db[s][i][j][2 * h + 1];
          }
        }
      }
    }
  }
};

template <class T, class Shape, bool kAligned>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    dy_pass_kernel(const __grid_constant__ DyPassArgs args) {
  constexpr int kStages = Shape::kStages, kSubs = Shape::kSubs;
  LK_DYNAMIC_SHARED(shared);
  int member = 0;
  while (member + 1 < args.p.members &&
         static_cast<int>(blockIdx.x) >= args.plan[member + 1].first_block) {
    ++member;
  }
  DyBlock<T, Shape, kAligned> block(args, member, shared);
  const bool want_ds = args.p.ds != nullptr, want_db = block.w.db != nullptr;
  if (!want_ds && !want_db) return;
  const int64_t tiles = (block.m_end - block.m_begin + Shape::kRows - 1) / Shape::kRows;
  const int steps = static_cast<int>(tiles) * kSubs;
  block.load_b();
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) block.load(s, s);
    cp_async_commit();
  }
  int stage = 0;
  for (int i = 0; i < steps; i += kSubs) {
    block.clear_ds();
#pragma unroll
    for (int sub = 0; sub < kSubs; ++sub) {
      cp_async_wait<kStages - 2>();
      pipeline_barrier();
      const int next = i + sub + kStages - 1;
      if (next < steps) block.load(next, (stage + kStages - 1) % kStages);
      cp_async_commit();
      if (want_ds) block.multiply_ds(stage, sub);
      if (want_db) block.multiply_db(stage, block.acc_db[sub]);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    if (want_ds) block.store_ds(block.m_begin + static_cast<int64_t>(i / kSubs) * Shape::kRows);
  }
  if (want_db) block.store_db();
}

// One thread per element of ds (padding included), then per element of the dBs.
template <class T>
__global__ void __launch_bounds__(256) dy_sum_kernel(const __grid_constant__ DyPassArgs args) {
  const DyPassParams& p = args.p;
  int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i < args.ds_elements) {
    const int64_t columns = args.ds_elements / p.m, row = i / columns, column = i % columns;
    for (int g = 0; g < p.members; ++g) {
      const DyMember& w = p.member[g];
      const int64_t rank_padded = padded_rank(w.rank), c = column - w.padded_column;
      if (c < 0 || c >= rank_padded) continue;
      const float* in = args.partials + args.plan[g].ds_partials + row * rank_padded + c;
      float sum = 0.0f;
      for (int b = 0; b < args.plan[g].column_blocks; ++b) sum += in[b * p.m * rank_padded];
      const float value = c < w.rank ? w.scaling * p.keep_scale * sum : 0.0f;
      narrow(value, static_cast<T*>(p.ds)[row * p.ldds + column]);
    }
    return;
  }
  i -= args.ds_elements;
  if (i >= args.db_elements) return;
  int g = p.members - 1;
  while (p.member[g].db == nullptr || i < args.plan[g].db_elements) --g;
  const DyMember& w = p.member[g];
  const int64_t e = i - args.plan[g].db_elements, n = e / w.rank, c = e % w.rank;
  const int64_t rank_padded = padded_rank(w.rank);
  const float* in = args.partials + args.plan[g].db_partials + n * rank_padded + c;
  float sum = 0.0f;
  for (int z = 0; z < args.splits; ++z) sum += in[z * w.n * rank_padded];
  store_from_float(w.db, n * w.lddb + c, w.db_dtype, w.scaling * sum);
}

}  // namespace lora_kernels::lora_linear::cuda
