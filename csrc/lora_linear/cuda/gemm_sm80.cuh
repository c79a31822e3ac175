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
// Resources (ptxas 13.0, sm_80) forward, backward, backward with masks:
//           128 x 256 of 8 warps   220, 234, 246 registers, 96 KiB shared, 1 block per SM
//           128 x 128 of 4 warps   236, 236, 248 registers, 64 KiB shared, 2 blocks per SM
//           64 x 64 of 4 warps     106, 112, 120 registers, 32 KiB shared, 4 blocks per SM
//           No spills. The loop over whole blocks of the first holds 64 HMMA in 132 (forward) or
//           142 instructions per warp and k-block.
// Limits    16-bit T, 16 terms; M, N, k < 2^31, row strides <= 2^24. A rank is padded to 32
//           inside the main loop.
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

// Which rows of B a tile multiplies: those of its columns. An op that wants the columns of C in
// another order (lora_qkv) has a policy of its own; it fills row_b before the first load.
struct ColumnsInOrder {
  static constexpr bool kInOrder = true;
};

// Walks the k-blocks of a problem's terms. A thread copies chunks that lie `*_turn` elements apart.
template <class T>
struct TermCursor {
  int term;  // index into GemmParams::term
  int left;  // k's of the term from here on, > 0 unless the terms are at their end
  const T *a, *b;
  int a_turn, b_turn;
};

template <class T, OperandLayout kLayout, class S, bool kAligned, class Columns = ColumnsInOrder>
struct GemmBlock {
  using Element = T;
  using Shape = S;
  static constexpr int BM = S::BM, BN = S::BN, BK = S::BK, WM = S::WM, WN = S::WN;
  static constexpr int kMma = WM / 16, kNmma = WN / 8, kSteps = BK / 16;
  static constexpr int kWords = WN / 32;  // generator words of a row of the warp's tile
  static constexpr bool kKN = kLayout == OperandLayout::kKN;

  const GemmParams& p;
  const GemmProblem& problem;
  T* shared;
  int thread, lane, warp_m, warp_n, end_term;
  int rows, cols;  // of C in this tile
  int row0, col0;  // of C; INT32_MAX bounds both extents
  float acc[kMma][kNmma][4];

  LK_DEVICE GemmBlock(const GemmArgs& args, int index, int tile_m, int tile_n,
                      unsigned char* memory)
      : p(args.p),
        problem(args.p.problem[index]),
        shared(reinterpret_cast<T*>(memory)),
        thread(threadIdx.x) {
    lane = thread % 32;
    warp_m = thread / 32 % S::kWarpsM;
    warp_n = thread / 32 / S::kWarpsM;
    end_term = problem.first_term + problem.terms;
    row0 = tile_m * BM;
    col0 = tile_n * BN;
    rows = static_cast<int>(p.m - row0 < BM ? p.m - row0 : BM);
    cols = static_cast<int>(problem.n - col0 < BN ? problem.n - col0 : BN);
  }

  LK_DEVICE void clear() {
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

  using Cursor = TermCursor<T>;
  // How the threads share the copies of a tile: chunk thread % kChunks of every kStep-th row.
  static constexpr int kChunksA = BK / kChunk, kStepA = S::kThreads / kChunksA;
  static constexpr int kColsB = kKN ? BN : BK, kRowsB = kKN ? BK : BN;
  static constexpr int kChunksB = kColsB / kChunk, kStepB = S::kThreads / kChunksB;
  static constexpr int kTurnsA = BM / kStepA, kTurnsB = kRowsB / kStepB;
  static_assert(kTurnsA * kStepA == BM && kTurnsB * kStepB == kRowsB);
  // Then neither chunk nor swizzle of a thread depends on the turn.
  static_assert(kStepA % 8 == 0 && kStepB % 8 == 0);

  // Row of B of this thread's turns; without kInOrder.
  int row_b[Columns::kInOrder ? 1 : kTurnsB];
  static_assert(Columns::kInOrder || !kKN);

  LK_DEVICE const T* source_b(const Cursor& at, int turn) const {
    if constexpr (Columns::kInOrder) return at.b + turn * static_cast<int64_t>(at.b_turn);
    return at.b + static_cast<int64_t>(row_b[turn]) * at.b_turn;
  }

  // To the first block at or after (term, 0).
  LK_DEVICE void enter(Cursor& at, int term) const {
    while (term < end_term && p.term[term].k == 0) ++term;
    at.term = term;
    at.left = 0;
    if (term >= end_term) return;
    const GemmTerm& t = p.term[term];
    const int row_a = thread / kChunksA, first_b = thread / kChunksB;
    at.left = static_cast<int>(t.k);
    at.a = static_cast<const T*>(t.a) + (static_cast<int64_t>(row0) + row_a) * t.lda +
           thread % kChunksA * kChunk;
    at.b = static_cast<const T*>(t.b) + thread % kChunksB * kChunk +
           (!Columns::kInOrder ? 0
            : kKN              ? first_b * t.ldb + col0
                               : (static_cast<int64_t>(col0) + first_b) * t.ldb);
    at.a_turn = static_cast<int>(kStepA * t.lda);
    at.b_turn = static_cast<int>((Columns::kInOrder ? kStepB : 1) * t.ldb);
  }

  LK_DEVICE void advance(Cursor& at) const {
    at.a += BK;
    at.b += kKN ? kTurnsB * static_cast<int64_t>(at.b_turn) : BK;
    at.left -= BK;
  }

  // Blocks from the cursor on that load_whole() can take.
  LK_DEVICE int whole_blocks(const Cursor& at) const {
    if (!kAligned || (kKN && cols % kChunk != 0)) return 0;
    return at.left / BK;
  }

  // A block of BK k's, whose chunks exist as a whole or not at all. No branches: the copies are
  // issued between products.
  LK_DEVICE void load_whole(Cursor& at, int stage) const {
    T* to_a = tile_a(stage) + tile_offset<BK>(thread / kChunksA, thread % kChunksA);
#pragma unroll
    for (int i = 0; i < kTurnsA; ++i) {
      cp_async16_if(to_a + i * kStepA * BK, at.a + i * static_cast<int64_t>(at.a_turn),
                    thread / kChunksA + i * kStepA < rows);
    }
    T* to_b = tile_b(stage) + tile_offset<kColsB>(thread / kChunksB, thread % kChunksB);
#pragma unroll
    for (int i = 0; i < kTurnsB; ++i) {
      const bool exists =
          kKN ? thread % kChunksB * kChunk < cols : thread / kChunksB + i * kStepB < cols;
      cp_async16_if(to_b + i * kStepB * kColsB, source_b(at, i), exists);
    }
    advance(at);
    cp_async_commit();
  }

  // Any block, if there is one; moves the cursor on. Commits in any case.
  LK_DEVICE void load(Cursor& at, int stage) const {
    if (at.term < end_term) {
      const int chunk_a = thread % kChunksA, chunk_b = thread % kChunksB;
      const int valid_a = clamp_chunk(at.left - chunk_a * kChunk);
      const int valid_b = clamp_chunk((kKN ? cols : at.left) - chunk_b * kChunk);
      T* to_a = tile_a(stage) + tile_offset<BK>(thread / kChunksA, chunk_a);
#pragma unroll
      for (int i = 0; i < kTurnsA; ++i) {
        const bool exists = thread / kChunksA + i * kStepA < rows;
        copy_chunk<kAligned>(to_a + i * kStepA * BK, at.a + i * static_cast<int64_t>(at.a_turn),
                             exists ? valid_a : 0);
      }
      T* to_b = tile_b(stage) + tile_offset<kColsB>(thread / kChunksB, chunk_b);
#pragma unroll
      for (int i = 0; i < kTurnsB; ++i) {
        const bool exists = thread / kChunksB + i * kStepB < (kKN ? at.left : cols);
        copy_chunk<kAligned>(to_b + i * kStepB * kColsB, source_b(at, i), exists ? valid_b : 0);
      }
      advance(at);
      if (at.left <= 0) enter(at, at.term + 1);
    }
    cp_async_commit();
  }

  // Fragment addresses: the swizzle of a row does not change 16 rows further on, so the steps over
  // rows are constants and those over chunks an exclusive or.
  LK_DEVICE void load_a(const T* tile, int kk, int i, uint32_t (&a)[4]) const {
    const int first = tile_offset<BK>(warp_m * WM + lane % 16, lane / 16);
    ldmatrix_x4<false>(a, tile + (first ^ (16 * kk)) + 16 * i * BK);
  }

  // B fragments of the neighbouring 8-column blocks j and j + 1 (j even).
  LK_DEVICE void load_b(const T* tile, int kk, int j, uint32_t (&b)[4]) const {
    if constexpr (kKN) {
      const int first = tile_offset<BN>(lane % 16, warp_n * WN / 8 + lane / 16);
      ldmatrix_x4<true>(b, tile + (first ^ (8 * j)) + 16 * kk * BN);
    } else {
      const int first = tile_offset<BK>(warp_n * WN + lane % 8 + lane / 16 * 8, lane / 8 % 2);
      ldmatrix_x4<false>(b, tile + (first ^ (16 * kk)) + 8 * j * BK);
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

  // One k-block: products of `stage`, copies into the buffer that has just become free, and the
  // first fragments of the next stage.
  template <bool kWhole>
  LK_DEVICE void step(Cursor& loading, int& stage, Fragments (&fragments)[2]) {
    static_assert(kSteps == 2);
    const int next = stage + 1 == S::STAGES ? 0 : stage + 1;
    const int free = stage == 0 ? S::STAGES - 1 : stage - 1;
    if constexpr (kWhole) {
      load_fragments(stage, 1, fragments[1]);
      load_whole(loading, free);
    } else {
      load(loading, free);  // first: it needs registers
      load_fragments(stage, 1, fragments[1]);
    }
    multiply(fragments[0]);
    cp_async_wait<S::STAGES - 2>();
    pipeline_barrier();
    load_fragments(next, 0, fragments[0]);
    multiply(fragments[1]);
    stage = next;
  }

  // acc += keep mask * (A B of one k-block).
  LK_DEVICE void multiply_masked(int stage, int stream, const DropoutKey& key) {
    const int row = row0 + warp_m * WM + lane / 4, col = col0 + warp_n * WN;
    const int block = col / 128, first_word = col % 128 / 32;
#pragma unroll 1
    for (int i = 0; i < kMma; ++i) {
#pragma unroll
      for (int q = 0; q < 4; q += 2) {  // 8-column blocks q, q + 1, q + 4, q + 5: words are shared
        float product[kNmma / 2][4] = {};
#pragma unroll
        for (int kk = 0; kk < kSteps; ++kk) {
          uint32_t a[4];
          load_a(tile_a(stage), kk, i, a);
#pragma unroll
          for (int w = 0; w < kWords; ++w) {
            uint32_t b[4];
            load_b(tile_b(stage), kk, 4 * w + q, b);
            mma_16816<T>(product[2 * w], a, b[0], b[1]);
            mma_16816<T>(product[2 * w + 1], a, b[2], b[3]);
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int second = 0; second < 2; ++second) {
            uint32_t words[4];
            DropoutKey here = key;
            here.forget_schedule();
            here.words(row + 16 * i + 8 * half, block, 4 * (q + second) + lane % 4, stream, words);
#pragma unroll
            for (int w = 0; w < kWords; ++w) {
              const uint32_t word = pick(words, first_word + w);
              float* c = product[2 * w + second] + 2 * half;
              add(i, 4 * w + q + second, 2 * half, key.keeps_low(word) ? c[0] : 0.0f);
              add(i, 4 * w + q + second, 2 * half + 1, key.keeps_high(word) ? c[1] : 0.0f);
            }
          }
        }
      }
    }
  }

  LK_DEVICE static uint32_t pick(const uint32_t (&words)[4], int w) {
    return w == 0 ? words[0] : w == 1 ? words[1] : w == 2 ? words[2] : words[3];
  }

  // acc[i][j][e] += value for a run-time i that never becomes an address.
  LK_DEVICE void add(int i, int j, int e, float value) {
#pragma unroll
    for (int row = 0; row < kMma; ++row) acc[row][j][e] += row == i ? value : 0.0f;
  }

  LK_DEVICE float bias(int col) const {
    if (problem.bias == nullptr || col >= cols) return 0.0f;
    return load_as_float(problem.bias, static_cast<int64_t>(col0) + col, problem.bias_dtype);
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
    T* c = static_cast<T*>(problem.c) + static_cast<int64_t>(row0) * problem.ldc + col0;
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

// The tile of this block; `order` runs before its first load, `finish` has the sum of all terms.
template <class Block, bool kMasked, class Order, class Finish>
LK_DEVICE void gemm_tile(const GemmArgs& args, unsigned char* shared, Order order, Finish finish) {
  constexpr int STAGES = Block::Shape::STAGES;
  int index = 0;
  while (index + 1 < args.p.problems &&
         static_cast<int>(blockIdx.x) >= args.first_tile[index + 1]) {
    ++index;
  }
  // Columns of kGroup tiles one after the other.
  constexpr int kGroup = 8;
  const int tile = static_cast<int>(blockIdx.x) - args.first_tile[index];
  const int tiles_n = static_cast<int>(ceil_div(args.p.problem[index].n, Block::BN));
  const int group = tile / (kGroup * tiles_n), in_group = tile % (kGroup * tiles_n);
  const int left = args.tiles_m - group * kGroup, height = left < kGroup ? left : kGroup;
  Block block(args, index, group * kGroup + in_group % height, in_group / height, shared);

  order(block);

  const GemmParams& p = args.p;
  typename Block::Cursor loading;
  block.enter(loading, block.problem.first_term);
  int term = loading.term;  // that is multiplied next
#pragma unroll 1
  for (int s = 0; s < STAGES - 1; ++s) block.load(loading, s);

  block.clear();
  int stage = 0;
  if constexpr (kMasked) {
    const DropoutKey key(p.dropout);
    for (; term < block.end_term && p.term[term].stream >= 0; ++term) {
      for (int64_t k = 0; k < p.term[term].k; k += Block::BK) {
        cp_async_wait<STAGES - 2>();
        pipeline_barrier();
        block.load(loading, (stage + STAGES - 1) % STAGES);
        if (!key.drops_all) block.multiply_masked(stage, p.term[term].stream, key);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
      }
    }
  }

  int blocks = 0;  // that are left
  for (; term < block.end_term; ++term) {
    blocks += static_cast<int>((p.term[term].k + Block::BK - 1) / Block::BK);
  }
  typename Block::Fragments fragments[2];
  cp_async_wait<STAGES - 2>();
  pipeline_barrier();
  if (blocks > 0) block.load_fragments(stage, 0, fragments[0]);
  while (blocks > 0) {
    const int whole = block.whole_blocks(loading);
    const int count = whole < blocks ? whole : blocks;
#pragma unroll 1
    for (int i = 0; i < count; ++i) block.template step<true>(loading, stage, fragments);
    blocks -= count;
    if (blocks > 0) {
      if (loading.term < block.end_term && loading.left <= 0)
        block.enter(loading, loading.term + 1);
      block.template step<false>(loading, stage, fragments);
      --blocks;
    }
  }
  cp_async_wait<0>();
  finish(block);
}

template <class T, OperandLayout kLayout, class S, bool kAligned, bool kMasked>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksPerSm)
    gemm_sm80_kernel(const __grid_constant__ GemmArgs args) {
  using Block = GemmBlock<T, kLayout, S, kAligned>;
  LK_DYNAMIC_SHARED(shared);
  gemm_tile<Block, kMasked>(args, shared, [](Block&) {}, [](Block& block) { block.store(); });
}

}  // namespace lora_kernels::lora_linear::cuda
