// Gradients of K and V with mma.sync, without atomics.
//
// Math      with S = q k the scores are made again: p = 2^(exponent - lse), dP = dO v,
//             dv_j = sum_i p_ij w_ij dO_i        dz_ij = p_ij (w_ij dP_ij - delta_i) (1 - tanh^2)
//             dk_j = scale sum_i dz_ij q_i       w: dropout, 1 / P(keep) or 0
// Shapes    q, dO [B, S, H, D], k, v, dk, dv [B, Sk, Hk, D]; lse, delta [B, H, S].
// Grid      x: tiles of 128 keys, y: key heads. A block goes over the query heads of its group and,
//           in each, over the tiles of 32 queries that see one of its keys: one order of addition.
// Main loop keys are the rows of both score products (k q^T, v dO^T), so weights and dz are already
//           the left operands of the two that follow, and never leave the registers. A warp owns
//           32 keys (D = 64) or 16 (D = 128). Q, dO, their statistics and keep bits of the next
//           tile are copied while this one is multiplied.
// Bytes     K, V, dk, dv once; Q and dO once per tile of keys, mostly from L2.
// Numerics  fp32 scores and sums; weights and dz are rounded to T as operands; one rounding at the
//           end. Hidden rows (past the sequence, without a key) have lse = +inf, so weight 0.
// Resources (ptxas 13.0, sm_80) D = 64: 244 registers (modified 255), 50 KiB shared, two blocks per
//           SM; D = 128: 240 (252), 98 KiB, one block of 8 warps; no spills.
// Limits    as forward_sm80.cuh. With 16 keys per warp, operand loads take as long as the products.
#pragma once

#include "../../common/barrier.cuh"
#include "../../common/quad.cuh"
#include "launch.h"
#include "products.cuh"
#include "scores.cuh"

namespace lora_kernels::attention::cuda {

template <int D>
struct KeyShape {
  static constexpr int kKeys = 128, kRows = 32, MT = D == 64 ? 2 : 1;
  static constexpr int kSub = D == 64 ? 16 : 32, NT = kSub / 8;  // rows whose scores are held
  static constexpr int kWarps = kKeys / (16 * MT), kThreads = 32 * kWarps;
  static constexpr int kTile = kRows * D;                   // elements of a tile of Q or dO
  static constexpr int kKeepBytes = kRows * 16;             // of 128 keys
  static constexpr int kStatistics = 2 * kRows;             // lse, delta
  static constexpr size_t kStage = 2 * kTile * 2 + kStatistics * 4 + kKeepBytes;
  static constexpr size_t kShared = 2 * kKeys * D * 2 + 2 * kStage;
  static_assert(kShared <= kSharedMemoryNeeded);
};

template <class T, int D, bool kModified>
struct KeyBlock {
  using S = KeyShape<D>;
  static constexpr int MT = S::MT, NT = S::NT;

  const BackwardParams& params;
  const AttentionParams& p;
  const Sequence& seq;
  const Window window;
  int kv_head, key0, lane, warp;
  T *tile_k, *tile_v;
  unsigned char* stages;
  float dk[MT][D / 8][4], dv[MT][D / 8][4];

  LK_DEVICE KeyBlock(const BackwardParams& params_, const Sequence& s, int kv_head_,
                     unsigned char* memory)
      : params(params_), p(params_.a), seq(s), window(params_.a, s), kv_head(kv_head_) {
    key0 = s.tile * S::kKeys;
    lane = threadIdx.x % 32;
    warp = threadIdx.x / 32;
    tile_k = reinterpret_cast<T*>(memory);
    tile_v = tile_k + S::kKeys * D;
    stages = memory + 2 * S::kKeys * D * 2;
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) dk[i][j][e] = dv[i][j][e] = 0.0f;
      }
    }
  }

  LK_DEVICE T* tile_q(int stage) const {
    return reinterpret_cast<T*>(stages + stage * S::kStage);
  }
  LK_DEVICE T* tile_do(int stage) const { return tile_q(stage) + S::kTile; }
  LK_DEVICE float* statistics(int stage) const {
    return reinterpret_cast<float*>(tile_do(stage) + S::kTile);
  }
  LK_DEVICE unsigned char* keep_bytes(int stage) const {
    return reinterpret_cast<unsigned char*>(statistics(stage) + S::kStatistics);
  }

  LK_DEVICE void load_keys() const {
    load_rows<T, D, S::kKeys, S::kThreads>(
        tile_k, at<T>(p.k, seq.b, seq.first_key, key0, kv_head), p.k.row, seq.keys - key0);
    load_rows<T, D, S::kKeys, S::kThreads>(
        tile_v, at<T>(p.v, seq.b, seq.first_key, key0, kv_head), p.v.row, seq.keys - key0);
  }

  LK_DEVICE void load(int head, int row0, int stage) const {
    load_rows<T, D, S::kRows, S::kThreads>(
        tile_q(stage), at<T>(p.q, seq.b, seq.first_row, row0, head), p.q.row, seq.rows - row0);
    load_rows<T, D, S::kRows, S::kThreads>(tile_do(stage),
                                           at<T>(params.dout, seq.b, seq.first_row, row0, head),
                                           params.dout.row, seq.rows - row0);
    cp_async_commit();
    if (threadIdx.x < S::kRows) {
      const int row = row0 + static_cast<int>(threadIdx.x);
      const int64_t from = statistic(p, seq, head) + row;
      const float lse = row < seq.rows ? params.lse[from] : -kInfinity;
      statistics(stage)[threadIdx.x] = lse == -kInfinity ? kInfinity : lse * kLog2E;
      statistics(stage)[S::kRows + threadIdx.x] = row < seq.rows ? params.delta[from] : 0.0f;
    }
    if constexpr (kModified) {
      const Keep keep(p, seq.b, head);
      if (p.drop_threshold != 0) draw(keep, row0, stage);
    }
  }

  // Byte [row, pair]: bit 2 w + e tells whether key 32 w + 2 pair + e of the tile is kept.
  LK_DEVICE void draw(const Keep& keep, int row0, int stage) const {
#pragma unroll 1
    for (int call = threadIdx.x; call < S::kRows * 16; call += S::kThreads) {
      uint32_t words[4], bits = 0;
      keep.words(row0 + call / 16, seq.tile, call % 16, words);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        bits |= (keep.low(words[w]) ? 1u : 0u) << 2 * w | (keep.high(words[w]) ? 2u : 0u) << 2 * w;
      }
      keep_bytes(stage)[call] = static_cast<unsigned char>(bits);
    }
  }

  // s: scores to kept weights (without 1 / P(keep)), dp to dz (without the scale).
  LK_DEVICE void differentiate(float (&s)[MT][NT][4], float (&dp)[MT][NT][4], int head, int row0,
                               int sub, int stage) const {
    const Exponent<kModified> exponent(p, seq.b, head);
    const bool all = window.covers(row0 + sub, S::kSub, key0, S::kKeys);
    const bool drops = kModified && p.drop_threshold != 0;
    const float *lse = statistics(stage), *delta = lse + S::kRows;
#pragma unroll
    for (int j = 0; j < NT; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = sub + 8 * j + 2 * (lane % 4) + e;
        const float row_lse = lse[column], row_delta = delta[column];
#pragma unroll
        for (int i = 0; i < MT; ++i) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int own = 16 * MT * warp + 16 * i + lane / 4 + 8 * h;
            float &score = s[i][j][2 * h + e], &gradient = dp[i][j][2 * h + e], derivative;
            const int distance = row0 + column + window.offset - key0 - own;
            const float value = exponent.value(score, distance, derivative);
            float weight = exp2_of(value * exponent.factor - row_lse);
            if (!all) {
              const Span seen = window.rows_of(key0 + own);
              if (row0 + column < seen.low || row0 + column > seen.high) weight = 0.0f;
            }
            float kept = weight;
            if constexpr (kModified) {
              if (drops) {
                const uint32_t byte = keep_bytes(stage)[column * 16 + own % 32 / 2];
                const bool keep = byte >> (2 * (own / 32) + own % 2) & 1u;
                kept = keep ? weight : 0.0f;
                gradient = keep ? gradient * p.keep_scale : 0.0f;
              }
            }
            score = kept;
            gradient = weight * (gradient - row_delta);
            if constexpr (kModified) gradient *= derivative;
          }
        }
      }
    }
  }

  LK_DEVICE void store() {
    const int first = p.cu_keys == nullptr ? 0 : p.cu_keys[seq.b];  // not held until here
    __syncthreads();                                                // K's and V's tiles are reused
    stage_rows<T, D, MT>(dk, p.scale, tile_k, 16 * MT * warp);
    stage_rows<T, D, MT>(dv, p.keep_scale, tile_v, 16 * MT * warp);
    __syncthreads();
    store_rows<T, D, S::kKeys, S::kThreads>(
        tile_k, at<T>(params.dk, seq.b, first, key0, kv_head), params.dk.row,
        seq.keys - key0);
    store_rows<T, D, S::kKeys, S::kThreads>(
        tile_v, at<T>(params.dv, seq.b, first, key0, kv_head), params.dv.row,
        seq.keys - key0);
  }
};

template <class T, int D, bool kModified>
__global__ void __launch_bounds__(KeyShape<D>::kThreads, D == 64 ? 2 : 1)
    attention_key_gradients_sm80_kernel(const __grid_constant__ BackwardParams params) {
  using S = KeyShape<D>;
  LK_DYNAMIC_SHARED(shared);
  const AttentionParams& p = params.a;
  const Sequence seq = find_sequence<S::kKeys, true>(p, static_cast<int>(blockIdx.x));
  if (seq.b < 0) return;
  KeyBlock<T, D, kModified> block(params, seq, static_cast<int>(blockIdx.y), shared);
  const int last_key = (block.key0 + S::kKeys < seq.keys ? block.key0 + S::kKeys : seq.keys) - 1;
  const int low = block.window.rows_of(block.key0).low;
  const int high = block.window.rows_of(last_key).high;
  const int begin = (low < 0 ? 0 : low) / S::kRows * S::kRows;
  const int end = high < seq.rows - 1 ? high + 1 : seq.rows;
  const int group = p.heads / p.kv_heads, first_head = block.kv_head * group;

  if (begin < end) {
    block.load_keys();
    block.load(first_head, begin, 0);
    int stage = 0;
    for (int head = first_head; head < first_head + group; ++head) {
      for (int row = begin; row < end; row += S::kRows) {
        cp_async_wait<0>();
        pipeline_barrier();
        if (row + S::kRows < end) {
          block.load(head, row + S::kRows, stage ^ 1);
        } else if (head + 1 < first_head + group) {
          block.load(head + 1, begin, stage ^ 1);
        }
#pragma unroll 1
        for (int sub = 0; sub < S::kRows; sub += S::kSub) {
          const T *q = block.tile_q(stage) + sub * D, *dout = block.tile_do(stage) + sub * D;
          float s[S::MT][S::NT][4], dp[S::MT][S::NT][4];
          multiply_rows<T, D>(block.tile_k, 16 * S::MT * block.warp, q, s);
          multiply_rows<T, D>(block.tile_v, 16 * S::MT * block.warp, dout, dp);
          block.differentiate(s, dp, head, row, sub, stage);
          accumulate<T, D>(s, dout, block.dv);
          accumulate<T, D>(dp, q, block.dk);
        }
        stage ^= 1;
      }
    }
  }
  cp_async_wait<0>();
  block.store();
}

template <class T, int D, bool kModified>
cudaError_t launch_key_gradients(const BackwardParams& p, cudaStream_t stream) {
  using S = KeyShape<D>;
  const int64_t places = count_places(p.a, p.a.keys, S::kKeys);
  if (places > INT32_MAX) return cudaErrorInvalidValue;
  return launch_kernel(attention_key_gradients_sm80_kernel<T, D, kModified>,
                       dim3(static_cast<unsigned>(places), static_cast<unsigned>(p.a.kv_heads)),
                       S::kThreads, S::kShared, stream, p);
}

template <class T>
cudaError_t run_key_gradients(const BackwardParams& p, cudaStream_t stream) {
  if (modified(p.a)) {
    return p.a.head_dim == 64 ? launch_key_gradients<T, 64, true>(p, stream)
                              : launch_key_gradients<T, 128, true>(p, stream);
  }
  return p.a.head_dim == 64 ? launch_key_gradients<T, 64, false>(p, stream)
                            : launch_key_gradients<T, 128, false>(p, stream);
}

}  // namespace lora_kernels::attention::cuda
