// LoRA projections whose heads leave the accumulators rotated: the K-extended GEMM of
// lora_linear/cuda/gemm_sm80.cuh with other columns and another epilogue.
//
// Math      Y_g [M, N_g] = [scaled_s_g | X] [B_g | W_g]^T + bias_g; of a rotated pair of channels
//           z1 = y1 cos1 - y2 sin1,  z2 = y2 cos2 + y1 sin2
// Shapes    as there; N_g = heads * D, D even. Row m is position m % S of sequence m / S.
// Grid      as there. A tile has BN / 2 pairs of channels: columns 2 j and 2 j + 1 of it are the
//           channels of pair j, R / 2 (half-rotated) or 1 (interleaved) apart, or, past the R
//           rotated channels, (D - R) / 2.
// Pairs     Only the addresses of rows of W and B change, each of which is read by itself anyway.
//           Both channels of a pair are then neighbours in one thread's accumulators: no tile has
//           to hold whole heads, so D needs to be even and no more, and threads exchange nothing.
//           Members without a rotation have their columns in order.
// Bytes     those of the GEMM, plus R entries of cos and sin for a row of every tile, from L2 or
//           L1 (at most BM * BN * 8 bytes against (BM + BN) * K * 2 of the operands). As a call of
//           its own the rotation would read and write q and k once more: at 8192 rows of 40 heads
//           of 128 in bf16 that is 168 MB, 50 us on an H100 beside 0.6 ms of products.
// Epilogue  bias and rotation in fp32, one rounding to T, through shared memory: first channels of
//           the pairs in the left half, second ones in the right half, so that a row leaves in runs
//           of 16 bytes where D and R are multiples of 16.
// Numerics  one fp32 sum per element, in the order of the GEMM; a position outside of the cache
//           gives NaN. Members that are not rotated have the bits of lora_linear's sm_80 GEMM.
// Resources (ptxas 13.0, sm_80) 128 x 128 of 4 warps: 232 registers, 64 KiB shared, 2 blocks per
//           SM; 64 x 64 of 4 warps: 110 registers, 120 without 16-byte rows, 32 KiB, 4 blocks.
// Limits    16-bit T, D even, 8 members, rows of the sequences < 2^31.
#pragma once

#include "../../lora_linear/cuda/gemm_sm80.cuh"
#include "../../rope/cuda/tables.cuh"
#include "launch.h"

namespace lora_kernels::lora_qkv::cuda {

struct ProjectArgs {
  lora::GemmArgs gemm;
  rope::cuda::Rotation rotation;
  int head_dim;
  int rotated[kMaxGroup];
};

struct ColumnsInPairs {
  static constexpr bool kInOrder = false;
};

// Where the two channels of pair i of a head lie.
struct PairPlace {
  int first, second;
  bool inside;  // of the rotated channels
};

LK_DEVICE PairPlace place_pair(int i, int head_dim, int channels, bool interleaved) {
  if (interleaved) return {2 * i, 2 * i + 1, 2 * i < channels};
  const int half = channels / 2;
  if (i < half) return {i, i + half, true};
  return {i + half, i + head_dim / 2, false};
}

// Heads of a problem; members without a rotated head have their columns in order.
struct Heads {
  int head_dim, channels, rotated;
  bool in_order;  // pairs are neighbours

  LK_DEVICE Heads(const ProjectArgs& args, int index)
      : head_dim(args.head_dim),
        channels(args.rotation.channels),
        rotated(args.rotated[index]),
        in_order(args.rotation.interleaved || args.rotated[index] == 0) {}

  // Columns of C of a pair.
  LK_DEVICE PairPlace of(int pair) const {
    const int half = head_dim / 2, head = pair / half;
    PairPlace place = place_pair(pair - head * half, head_dim, channels, in_order);
    place.first += head * head_dim;
    place.second += head * head_dim;
    place.inside = place.inside && head < rotated;
    return place;
  }
};

// Rows of W and B for this thread's turns of a tile; a tile column behind the last one reads none.
template <class Block>
LK_DEVICE void order_rows(Block& block, const Heads& heads) {
#pragma unroll
  for (int i = 0; i < Block::kTurnsB; ++i) {
    const int column = block.thread / Block::kChunksB + i * Block::kStepB;
    const PairPlace place = heads.of((block.col0 + column) / 2);
    block.row_b[i] = column >= block.cols ? 0 : column % 2 == 0 ? place.first : place.second;
  }
}

LK_DEVICE float bias_of(const lora::GemmProblem& problem, int column, bool exists) {
  if (problem.bias == nullptr || !exists) return 0.0f;
  return load_as_float(problem.bias, column, problem.bias_dtype);
}

// Bias, rotation, and the tile into shared memory: pair j at columns j and BN / 2 + j, or in order.
template <class Block>
LK_DEVICE void rotate_tile(const Block& block, const ProjectArgs& args, const Heads& heads) {
  using T = typename Block::Element;
  using S = typename Block::Shape;
  const int lane = block.lane, first_column = block.warp_n * S::WN + 2 * (lane % 4);
  PairPlace place[Block::kNmma];
  float low[Block::kNmma], high[Block::kNmma];
#pragma unroll
  for (int j = 0; j < Block::kNmma; ++j) {
    const int column = first_column + 8 * j;
    const bool exists = column < block.cols;
    place[j] = heads.of((block.col0 + column) / 2);
    low[j] = bias_of(block.problem, place[j].first, exists);
    high[j] = bias_of(block.problem, place[j].second, exists);
    // From here on channels of a head.
    const int head = place[j].first / heads.head_dim * heads.head_dim;
    place[j].first -= head;
    place[j].second -= head;
    place[j].inside = place[j].inside && exists;
  }
  __syncthreads();  // the pipeline's buffers are reused
#pragma unroll
  for (int i = 0; i < Block::kMma; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = block.warp_m * S::WM + 16 * i + lane / 4 + 8 * half;
      const bool exists = row < block.rows;
      const rope::cuda::TableRow at =
          exists ? rope::cuda::table_row(args.rotation, static_cast<uint32_t>(block.row0 + row))
                 : rope::cuda::TableRow{0, 0, true};
      T* staged = block.shared + row * S::kRowC;
#pragma unroll
      for (int j = 0; j < Block::kNmma; ++j) {
        float z1 = block.acc[i][j][2 * half] + low[j], z2 = block.acc[i][j][2 * half + 1] + high[j];
        if (place[j].inside && exists) {
          const rope::cuda::Rotation& r = args.rotation;
          const rope::cuda::PairFactors f = rope::cuda::pair_factors(
              load_channel(r.cos, at.cos, place[j].first),
              load_channel(r.cos, at.cos, place[j].second),
              load_channel(r.sin, at.sin, place[j].first),
              load_channel(r.sin, at.sin, place[j].second), false);
          const float y1 = z1, y2 = z2;
          z1 = at.known ? y1 * f.c1 + y2 * f.s1 : rope::cuda::not_a_number();
          z2 = at.known ? y2 * f.c2 + y1 * f.s2 : rope::cuda::not_a_number();
        }
        const int column = first_column + 8 * j;
        if (heads.in_order) {
          *reinterpret_cast<uint32_t*>(staged + column) = pack2<T>(z1, z2);
        } else {
          narrow(z1, staged[column / 2]);
          narrow(z2, staged[S::BN / 2 + column / 2]);
        }
      }
    }
  }
  __syncthreads();
}

// The staged tile to C, by 16 bytes where eight pairs are neighbours there too.
template <class Block>
LK_DEVICE void store_tile(const Block& block, const Heads& heads) {
  using T = typename Block::Element;
  using S = typename Block::Shape;
  constexpr int kChunks = S::BN / kChunk;
  const lora::GemmProblem& problem = block.problem;
  const bool runs = heads.in_order || (heads.head_dim % 16 == 0 && heads.channels % 16 == 0);
  const bool wide = runs && lora::aligned16(problem.c, problem.ldc);
  T* c = static_cast<T*>(problem.c) + static_cast<int64_t>(block.row0) * problem.ldc;
  for (int e = block.thread; e < block.rows * kChunks; e += S::kThreads) {
    const int row = e / kChunks, staged = e % kChunks * kChunk;
    const T* from = block.shared + row * S::kRowC + staged;
    T* to = c + row * problem.ldc;
    const bool second = !heads.in_order && staged >= S::BN / 2;
    // The tile column of the first element, and how far apart those of two neighbours are.
    const int step = heads.in_order ? 1 : 2;
    const int column = step * (second ? staged - S::BN / 2 : staged);
    const auto place = [&](int at) {
      if (heads.in_order) return block.col0 + at;
      const PairPlace found = heads.of((block.col0 + at) / 2);
      return second ? found.second : found.first;
    };
    if (wide && column + step * kChunk <= block.cols) {
      *reinterpret_cast<uint4*>(to + place(column)) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int i = 0; i < kChunk && column + step * i < block.cols; ++i) {
        to[place(column + step * i)] = from[i];
      }
    }
  }
}

template <class T, class S, bool kAligned>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksPerSm)
    project_sm80_kernel(const __grid_constant__ ProjectArgs args) {
  using Block = lora::GemmBlock<T, lora::OperandLayout::kNK, S, kAligned, ColumnsInPairs>;
  LK_DYNAMIC_SHARED(shared);
  lora::gemm_tile<Block, false>(
      args.gemm, shared,
      [&](Block& block) {
        const int index = static_cast<int>(&block.problem - args.gemm.p.problem);
        order_rows(block, Heads(args, index));
      },
      [&](Block& block) {
        const int index = static_cast<int>(&block.problem - args.gemm.p.problem);
        const Heads heads(args, index);
        rotate_tile(block, args, heads);
        store_tile(block, heads);
      });
}

}  // namespace lora_kernels::lora_qkv::cuda
