// Gradient of Q with mma.sync, without atomics.
//
// Math      the scores are made again, as in key_gradients_sm80.cuh:
//             dz_ij = p_ij (w_ij dO_i v_j - delta_i) (1 - tanh^2)    dq_i = scale sum_j dz_ij k_j
// Shapes    q, dO, dq [B, S, H, D], k, v [B, Sk, Hk, D]; lse, delta [B, H, S].
// Grid      x: tiles of 128 queries, those with the most keys first; y: query heads.
// Main loop blocks of 32 keys that some query of the tile sees, the next K and V
//           copied while this block is multiplied; a warp owns 32 queries (D = 128: 16). dz stays
//           in registers, as the left operand of the third product.
// Bytes     Q, dO and dq once, K and V once per tile of queries, mostly from L2.
// Numerics  fp32 scores and sums; dz is rounded to T as an operand; one rounding at the end.
// Resources (ptxas 13.0, sm_80) D = 64: 226 registers (modified 244), 48 KiB shared, two blocks per
//           SM; D = 128: 194 (202), 96 KiB, one block of 8 warps; no spills.
// Limits    as forward_sm80.cuh. The two score products are those of the gradients of K and V made
//           a second time: 7 products in place of 5 are the price of one order of addition
//           without a workspace.
#pragma once

#include "../../common/barrier.cuh"
#include "../../common/quad.cuh"
#include "launch.h"
#include "products.cuh"
#include "scores.cuh"

namespace lora_kernels::attention::cuda {

template <int D>
struct QueryShape {
  static constexpr int kRows = 128, kKeys = 32, MT = D == 64 ? 2 : 1;
  static constexpr int NT = kKeys / 8, kThreads = 32 * kRows / (16 * MT);
  static constexpr int kTile = kKeys * D;  // elements of a tile of K or V
  static constexpr size_t kShared = (2 * kRows * D + 4 * kTile) * 2;
  static_assert(kShared <= kSharedMemoryNeeded);
};

template <class T, int D, bool kModified>
struct QueryBlock {
  using S = QueryShape<D>;
  static constexpr int MT = S::MT, NT = S::NT;

  const BackwardParams& params;
  const AttentionParams& p;
  const Sequence& seq;
  const Window window;
  const Exponent<kModified> exponent;
  int head, row0, lane, warp;
  T *tile_q, *tile_do, *stages;
  const T *k, *v;
  float dq[MT][D / 8][4], lse[MT][2], delta[MT][2];

  LK_DEVICE QueryBlock(const BackwardParams& params_, const Sequence& s, int head_,
                       unsigned char* memory)
      : params(params_),
        p(params_.a),
        seq(s),
        window(params_.a, s),
        exponent(params_.a, s.b, head_),
        head(head_) {
    row0 = s.tile * S::kRows;
    lane = threadIdx.x % 32;
    warp = threadIdx.x / 32;
    tile_q = reinterpret_cast<T*>(memory);
    tile_do = tile_q + S::kRows * D;
    stages = tile_do + S::kRows * D;
    const int kv_head = head / (p.heads / p.kv_heads);
    k = at<T>(p.k, s.b, s.first_key, 0, kv_head);
    v = at<T>(p.v, s.b, s.first_key, 0, kv_head);
    const int64_t first = statistic(p, s, head);
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row_of(i, h);
        const float own = row < s.rows ? params.lse[first + row] : -kInfinity;
        lse[i][h] = own == -kInfinity ? kInfinity : own * kLog2E;
        delta[i][h] = row < s.rows ? params.delta[first + row] : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) dq[i][j][e] = 0.0f;
      }
    }
  }

  LK_DEVICE int row_of(int i, int h) const {
    return row0 + 16 * MT * warp + 16 * i + lane / 4 + 8 * h;
  }

  LK_DEVICE T* tile_k(int stage) const { return stages + stage * 2 * S::kTile; }
  LK_DEVICE T* tile_v(int stage) const { return tile_k(stage) + S::kTile; }

  LK_DEVICE void load_queries() const {
    load_rows<T, D, S::kRows, S::kThreads>(
        tile_q, at<T>(p.q, seq.b, seq.first_row, row0, head), p.q.row, seq.rows - row0);
    load_rows<T, D, S::kRows, S::kThreads>(tile_do,
                                           at<T>(params.dout, seq.b, seq.first_row, row0, head),
                                           params.dout.row, seq.rows - row0);
  }

  LK_DEVICE void load(int key, int stage) const {
    load_rows<T, D, S::kKeys, S::kThreads>(tile_k(stage), k + key * p.k.row, p.k.row,
                                           seq.keys - key);
    load_rows<T, D, S::kKeys, S::kThreads>(tile_v(stage), v + key * p.v.row, p.v.row,
                                           seq.keys - key);
    cp_async_commit();
  }

  // dp to dz (without the scale).
  LK_DEVICE void differentiate(const float (&s)[MT][NT][4], float (&dp)[MT][NT][4], int key,
                               const Keep& keep) const {
    const bool all = window.covers(row0, S::kRows, key, S::kKeys);
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row_of(i, h);
        const Span seen = window.keys_of(row);
        [[maybe_unused]] uint32_t bits = ~0u;
        if constexpr (kModified) {
          if (p.drop_threshold != 0) bits = keep.bits<S::kKeys>(row, key, lane % 4);
        }
#pragma unroll
        for (int j = 0; j < NT; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int column = key + 8 * j + 2 * (lane % 4) + e;
            float &gradient = dp[i][j][2 * h + e], derivative;
            const float value = exponent.value(s[i][j][2 * h + e], row + window.offset - column,
                                               derivative);
            float weight = exp2_of(value * exponent.factor - lse[i][h]);
            if (!all && (column < seen.low || column > seen.high)) weight = 0.0f;
            if constexpr (kModified) {
              gradient = Keep::bit(bits, j, e) ? gradient * p.keep_scale : 0.0f;
            }
            gradient = weight * (gradient - delta[i][h]);
            if constexpr (kModified) gradient *= derivative;
          }
        }
      }
    }
  }

  LK_DEVICE void store() const {
    __syncthreads();  // the tile of Q is reused
    stage_rows<T, D, MT>(dq, p.scale, tile_q, 16 * MT * warp);
    __syncthreads();
    store_rows<T, D, S::kRows, S::kThreads>(
        tile_q, at<T>(params.dq, seq.b, seq.first_row, row0, head), params.dq.row,
        seq.rows - row0);
  }
};

template <class T, int D, bool kModified>
__global__ void __launch_bounds__(QueryShape<D>::kThreads, D == 64 ? 2 : 1)
    attention_query_gradients_sm80_kernel(const __grid_constant__ BackwardParams params) {
  using S = QueryShape<D>;
  LK_DYNAMIC_SHARED(shared);
  const AttentionParams& p = params.a;
  const int place = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  const Sequence seq = find_sequence<S::kRows, false>(p, place);
  if (seq.b < 0) return;
  QueryBlock<T, D, kModified> block(params, seq, static_cast<int>(blockIdx.y), shared);
  const int last_row = (block.row0 + S::kRows < seq.rows ? block.row0 + S::kRows : seq.rows) - 1;
  const int low = block.window.keys_of(block.row0).low;
  const int begin = (low < 0 ? 0 : low) / S::kKeys * S::kKeys;
  const int end = block.window.keys_of(last_row).high + 1;
  const Keep keep(p, seq.b, block.head);

  if (begin < end) {
    block.load_queries();
    block.load(begin, 0);
  }
  int stage = 0;
  for (int key = begin; key < end; key += S::kKeys) {
    cp_async_wait<0>();
    pipeline_barrier();
    if (key + S::kKeys < end) block.load(key + S::kKeys, stage ^ 1);
    float s[S::MT][S::NT][4], dp[S::MT][S::NT][4];
    const int own = 16 * S::MT * block.warp;
    multiply_rows<T, D>(block.tile_q, own, block.tile_k(stage), s);
    multiply_rows<T, D>(block.tile_do, own, block.tile_v(stage), dp);
    block.differentiate(s, dp, key, keep);
    accumulate<T, D>(dp, block.tile_k(stage), block.dq);
    stage ^= 1;
  }
  cp_async_wait<0>();
  block.store();
}

template <class T, int D, bool kModified>
cudaError_t launch_query_gradients(const BackwardParams& p, cudaStream_t stream) {
  using S = QueryShape<D>;
  const int64_t places = count_places(p.a, p.a.rows, S::kRows);
  if (places > INT32_MAX) return cudaErrorInvalidValue;
  return launch_kernel(attention_query_gradients_sm80_kernel<T, D, kModified>,
                       dim3(static_cast<unsigned>(places), static_cast<unsigned>(p.a.heads)),
                       S::kThreads, S::kShared, stream, p);
}

template <class T>
cudaError_t run_query_gradients(const BackwardParams& p, cudaStream_t stream) {
  if (modified(p.a)) {
    return p.a.head_dim == 64 ? launch_query_gradients<T, 64, true>(p, stream)
                              : launch_query_gradients<T, 128, true>(p, stream);
  }
  return p.a.head_dim == 64 ? launch_query_gradients<T, 64, false>(p, stream)
                            : launch_query_gradients<T, 128, false>(p, stream);
}

}  // namespace lora_kernels::attention::cuda
