// K-extended GEMM with mma.sync: base product and low-rank terms in one accumulator.
//
// Math      C_i [M, N_i] = sum_t A_t B_t' (* keep mask of stream t) + bias_i for up to 8 problems.
//           Forward (kNK):  Y_g = [scaled_s_g | X] [B_g | W_g]^T + bias_g
//           Backward (kKN): dX = sum_g [dS_g | dY_g] [A_g ; W_g], the dS_g A_g under dropout masks
// Shapes    A_t [M, k_t]; B_t [N, k_t] (kNK) or [k_t, N] (kKN); unit column stride.
// Grid      x: output tiles of BM x BN of all problems, 8 rows of tiles at a time so that the tiles
//           that run together share operands in L2.
// Main loop the k-blocks of 32 of all terms in a row through a ring of STAGES buffers (cp.async);
//           a warp owns WM x WN of the tile; fragments of the next half block are loaded while the
//           present one is multiplied, and the wait for the next stage stands before the last half.
//           Masked terms come first: their 16 x 8 products are formed in registers of their own per
//           k-block and added under the mask.
// Bytes     A once per column of tiles and B once per row of tiles, mostly from L2; C once.
// Epilogue  bias in fp32, one rounding to T, through shared memory to rows of 16-byte stores.
// Numerics  one fp32 sum over the terms in order, k ascending.
// Limits    16-bit T, 16 terms; M, N, k < 2^31. A rank is padded to 32 inside the main loop.
#pragma once

#include "../../common/barrier.cuh"
#include "../../common/mma.cuh"
#include "../../common/tile.cuh"
#include "dropout.cuh"
#include "split.h"

namespace lora_kernels::lora_linear::cuda {

struct GemmArgs {
  GemmParams p;
  int first_tile[kMaxGroup];  // blockIdx.x of each problem's first tile
  int tiles_m;
};

template <int BM_, int BN_, int WM_, int WN_, int STAGES_, int BLOCKS_PER_SM_>
struct GemmShape {
  static constexpr int BM = BM_, BN = BN_, BK = 32, WM = WM_, WN = WN_, STAGES = STAGES_;
  static constexpr int kBlocksPerSm = BLOCKS_PER_SM_;
  static constexpr int kWarpsM = BM / WM, kWarpsN = BN / WN, kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kTileA = BM * BK, kTileB = BN * BK;  // elements
  static constexpr int kRowC = BN + 8;  // elements of a row of the staged C: no bank conflicts
  static constexpr size_t kPipeline = static_cast<size_t>(STAGES) * (kTileA + kTileB) * 2;
  static constexpr size_t kStaged = static_cast<size_t>(BM) * kRowC * 2;
  static constexpr size_t kShared = kPipeline > kStaged ? kPipeline : kStaged;
  static_assert(WN % 32 == 0 && WM % 16 == 0);
};

// Walks the k-blocks of a problem's terms.
struct TermCursor {
  int term;   // index into GemmParams::term
  int64_t k;  // first column of the block

  LK_DEVICE void skip_empty(const GemmParams& p, int end) {
    while (term < end && k >= p.term[term].k) {
      ++term;
      k = 0;
    }
  }
};

template <class T, OperandLayout kLayout, class S, bool kAligned>
struct GemmBlock {
  static constexpr int BM = S::BM, BN = S::BN, BK = S::BK, WM = S::WM, WN = S::WN;
  static constexpr int kMma = WM / 16, kNmma = WN / 8, kSteps = BK / 16;
  static constexpr bool kKN = kLayout == OperandLayout::kKN;

  const GemmParams& p;
  const GemmProblem& problem;
  T* shared;
  int thread, lane, warp_m, warp_n, end_term;
  int rows, cols;  // of C in this tile
  int64_t row0, col0;
  float acc[kMma][kNmma][4];

  LK_DEVICE GemmBlock(const GemmArgs& args, int index, int64_t tile_m, int64_t tile_n,
                      unsigned char* memory)
      : p(args.p), problem(args.p.problem[index]), shared(reinterpret_cast<T*>(memory)),
        thread(threadIdx.x) {
    lane = thread % 32;
    warp_m = thread / 32 % S::kWarpsM;
    warp_n = thread / 32 / S::kWarpsM;
    end_term = problem.first_term + problem.terms;
    row0 = tile_m * BM;
    col0 = tile_n * BN;
    rows = static_cast<int>(p.m - row0 < BM ? p.m - row0 : BM);
    cols = static_cast<int>(problem.n - col0 < BN ? problem.n - col0 : BN);
#pragma unroll
    for (int i = 0; i < kMma; ++i) {
#pragma unroll
      for (int j = 0; j < kNmma; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[i][j][e] = 0.0f;
      }
    }
  }

  LK_DEVICE T* tile_a(int stage) const { return shared + stage * (S::kTileA + S::kTileB); }
  LK_DEVICE T* tile_b(int stage) const { return tile_a(stage) + S::kTileA; }

  // Loads the block at the cursor, if there is one, and moves the cursor on. Commits in any case.
  LK_DEVICE void load(TermCursor& at, int stage) const {
    if (at.term < end_term) {
      const GemmTerm& t = p.term[at.term];
      const int64_t left = t.k - at.k;
      const int depth = static_cast<int>(left < BK ? left : BK);
      load_tile<BM, BK, S::kThreads, kAligned>(
          tile_a(stage), static_cast<const T*>(t.a) + row0 * t.lda + at.k, t.lda, rows, depth,
          thread);
      const T* b = static_cast<const T*>(t.b);
      if constexpr (kKN) {
        load_tile<BK, BN, S::kThreads, kAligned>(tile_b(stage), b + at.k * t.ldb + col0, t.ldb,
                                                 depth, cols, thread);
      } else {
        load_tile<BN, BK, S::kThreads, kAligned>(tile_b(stage), b + col0 * t.ldb + at.k, t.ldb,
                                                 cols, depth, thread);
      }
      at.k += BK;
      at.skip_empty(p, end_term);
    }
    cp_async_commit();
  }

  LK_DEVICE void load_a(const T* tile, int kk, int i, uint32_t (&a)[4]) const {
    const int row = warp_m * WM + 16 * i + lane % 16;
    ldmatrix_x4<false>(a, tile + tile_offset<BK>(row, 2 * kk + lane / 16));
  }

  // B fragments of two neighbouring 8-column blocks.
  LK_DEVICE void load_b(const T* tile, int kk, int j, uint32_t (&b)[4]) const {
    const int col = warp_n * WN + 8 * j;
    if constexpr (kKN) {
      ldmatrix_x4<true>(b, tile + tile_offset<BN>(16 * kk + lane % 16, col / 8 + lane / 16));
    } else {
      ldmatrix_x4<false>(b, tile + tile_offset<BK>(col + lane % 8 + lane / 16 * 8,
                                                   2 * kk + lane / 8 % 2));
    }
  }

  struct Fragments {
    uint32_t a[kMma][4], b[kNmma / 2][4];
  };

  LK_DEVICE void load_fragments(int stage, int kk, Fragments& f) const {
#pragma unroll
    for (int i = 0; i < kMma; ++i) load_a(tile_a(stage), kk, i, f.a[i]);
#pragma unroll
    for (int j = 0; j < kNmma / 2; ++j) load_b(tile_b(stage), kk, 2 * j, f.b[j]);
  }

  LK_DEVICE void multiply(const Fragments& f) {
#pragma unroll
    for (int i = 0; i < kMma; ++i) {
#pragma unroll
      for (int j = 0; j < kNmma; ++j) {
        mma_16816<T>(acc[i][j], f.a[i], f.b[j / 2][j % 2 * 2], f.b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

  // acc += keep mask * (A B of one k-block).
  LK_DEVICE void multiply_masked(int stage, int stream, const DropoutKey& key) {
    const int64_t row = row0 + warp_m * WM + lane / 4;
    const int col = static_cast<int>(col0) + warp_n * WN;
    const int block = col / 128, first_word = col % 128 / 32;
#pragma unroll 1
    for (int i = 0; i < kMma; ++i) {
      float product[kNmma][4] = {};
#pragma unroll
      for (int kk = 0; kk < kSteps; ++kk) {
        uint32_t a[4];
        load_a(tile_a(stage), kk, i, a);
#pragma unroll
        for (int j = 0; j < kNmma; j += 2) {
          uint32_t b[4];
          load_b(tile_b(stage), kk, j, b);
          mma_16816<T>(product[j], a, b[0], b[1]);
          mma_16816<T>(product[j + 1], a, b[2], b[3]);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {  // 8-column blocks pair, pair + 4, ...
          uint32_t words[4];
          key.words(row + 16 * i + 8 * half, block, 4 * pair + lane % 4, stream, words);
#pragma unroll
          for (int w = 0; w < WN / 32; ++w) {
            uint32_t word = words[w];
#pragma unroll
            for (int other = 1; other + w < 4; ++other) {
              if (first_word == other) word = words[other + w];
            }
            float* c = product[4 * w + pair] + 2 * half;
            c[0] = key.keeps_low(word) ? c[0] : 0.0f;
            c[1] = key.keeps_high(word) ? c[1] : 0.0f;
          }
        }
      }
      add_row(i, product);
    }
  }

  // acc[i] += product with a run-time i that never becomes an address.
  LK_DEVICE void add_row(int i, const float (&product)[kNmma][4]) {
#pragma unroll
    for (int row = 0; row < kMma; ++row) {
      if (row != i) continue;
#pragma unroll
      for (int j = 0; j < kNmma; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[row][j][e] += product[j][e];
      }
    }
  }

  LK_DEVICE float bias(int col) const {
    if (problem.bias == nullptr || col >= cols) return 0.0f;
    return load_as_float(problem.bias, col0 + col, problem.bias_dtype);
  }

  LK_DEVICE void store() const {
    __syncthreads();  // the pipeline's buffers are reused
#pragma unroll
    for (int j = 0; j < kNmma; ++j) {
      const int col = warp_n * WN + 8 * j + 2 * (lane % 4);
      const float low = bias(col), high = bias(col + 1);
#pragma unroll
      for (int i = 0; i < kMma; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = warp_m * WM + 16 * i + lane / 4 + 8 * half;
          *reinterpret_cast<uint32_t*>(shared + row * S::kRowC + col) =
              pack2<T>(acc[i][j][2 * half] + low, acc[i][j][2 * half + 1] + high);
        }
      }
    }
    __syncthreads();
    constexpr int kChunks = BN / kChunk;
    const bool wide = aligned16(problem.c, problem.ldc);
    T* c = static_cast<T*>(problem.c) + row0 * problem.ldc + col0;
    for (int e = thread; e < rows * kChunks; e += S::kThreads) {
      const int row = e / kChunks, col = e % kChunks * kChunk;
      const T* from = shared + row * S::kRowC + col;
      T* to = c + row * problem.ldc + col;
      if (wide && col + kChunk <= cols) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      } else {
        for (int i = 0; i < kChunk && col + i < cols; ++i) to[i] = from[i];
      }
    }
  }
};

template <class T, OperandLayout kLayout, class S, bool kAligned>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksPerSm)
    gemm_sm80_kernel(const __grid_constant__ GemmArgs args) {
  using Block = GemmBlock<T, kLayout, S, kAligned>;
  constexpr int STAGES = S::STAGES, kSteps = Block::kSteps;
  LK_DYNAMIC_SHARED(shared);
  int index = 0;
  while (index + 1 < args.p.problems &&
         static_cast<int>(blockIdx.x) >= args.first_tile[index + 1]) {
    ++index;
  }
  // Columns of kGroup tiles one after the other.
  constexpr int kGroup = 8;
  const int tile = static_cast<int>(blockIdx.x) - args.first_tile[index];
  const int tiles_n = static_cast<int>(ceil_div(args.p.problem[index].n, S::BN));
  const int group = tile / (kGroup * tiles_n), in_group = tile % (kGroup * tiles_n);
  const int left = args.tiles_m - group * kGroup, height = left < kGroup ? left : kGroup;
  Block block(args, index, group * kGroup + in_group % height, in_group / height, shared);

  const DropoutKey key(args.p.dropout);
  const GemmParams& p = args.p;
  TermCursor loading{block.problem.first_term, 0};
  loading.skip_empty(p, block.end_term);
  TermCursor using_{loading};
  for (int s = 0; s < STAGES - 1; ++s) block.load(loading, s);

  int stage = 0;
  if (key.threshold != 0) {
    while (using_.term < block.end_term && p.term[using_.term].stream >= 0) {
      cp_async_wait<STAGES - 2>();
      pipeline_barrier();
      block.load(loading, (stage + STAGES - 1) % STAGES);
      block.multiply_masked(stage, p.term[using_.term].stream, key);
      using_.k += S::BK;
      using_.skip_empty(p, block.end_term);
      stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
  }

  int blocks = 0;  // that are left
  for (TermCursor c = using_; c.term < block.end_term; ++c.term, c.k = 0) {
    blocks += static_cast<int>((p.term[c.term].k - c.k + S::BK - 1) / S::BK);
  }
  typename Block::Fragments fragments[2];
  cp_async_wait<STAGES - 2>();
  pipeline_barrier();
  if (blocks > 0) block.load_fragments(stage, 0, fragments[0]);
  for (; blocks > 0; --blocks) {
    const int next = stage + 1 == STAGES ? 0 : stage + 1;
    const int free = stage == 0 ? STAGES - 1 : stage - 1;
#pragma unroll
    for (int kk = 0; kk < kSteps; ++kk) {
      if (kk == kSteps - 1) {
        cp_async_wait<STAGES - 2>();
        pipeline_barrier();
        block.load_fragments(next, 0, fragments[(kk + 1) % 2]);
      } else {
        block.load_fragments(stage, kk + 1, fragments[(kk + 1) % 2]);
      }
      if (kk == 0) block.load(loading, free);
      block.multiply(fragments[kk % 2]);
    }
    stage = next;
  }
  cp_async_wait<0>();
  block.store();
}

}  // namespace lora_kernels::lora_linear::cuda
