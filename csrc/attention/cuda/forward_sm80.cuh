// Attention forward with mma.sync: scores, online softmax and output in registers.
//
// Math      reference.py of the op. For each query a maximum m and a sum l are kept over the keys
//           seen so far; a block of keys rescales l and the output by 2^(m_old - m_new) (Milakov
//           and Gimelshein 2018, arXiv 1805.02867; Dao 2023, arXiv 2307.08691). A sink joins l at
//           the end.
// Shapes    q, out [B, S, H, D], k, v [B, Sk, Hk, D], lse [B, H, S] (packed: params.h).
// Grid      x: tiles of 128 queries, those with the most keys first; y: query heads, so that the
//           heads of a group and the tiles of a head run together and share K and V in L2.
// Main loop blocks of 64 keys (D = 128: 32) that some query of the tile sees; a warp owns 32 queries. V is copied
//           (cp.async) while scores are multiplied, the next K while softmax and output are.
// Bytes     Q and out once, K and V once per tile of queries, mostly from L2; no scores.
// Numerics  fp32 scores, softmax and sums; the weights are rounded to T for the second product,
//           l is summed before that; the output is rounded once.
// Resources (ptxas 13.0, sm_80) D = 64: 223 registers (modified 254), 32 KiB shared; D = 128: 252
//           (255), 48 KiB; two blocks per SM by registers; no spills.
// Limits    16-bit T, D 64 or 128, rows of 16 bytes; B, S, Sk <= 2^30.
#pragma once

#include "../../common/barrier.cuh"
#include "../../common/quad.cuh"
#include "launch.h"
#include "products.cuh"
#include "scores.cuh"

namespace lora_kernels::attention::cuda {

// 64 keys beside 128 columns of output do not fit the registers.
template <int D>
struct ForwardShape {
  static constexpr int kRows = 128, kKeys = D == 64 ? 64 : 32;
  static constexpr int MT = 2, NT = kKeys / 8, kThreads = 128;
  static constexpr size_t kShared = static_cast<size_t>(kRows + 2 * kKeys) * D * 2;
  static_assert(kShared <= kSharedMemoryNeeded);
};

template <class T, int D, bool kModified>
struct ForwardBlock {
  using S = ForwardShape<D>;
  static constexpr int MT = S::MT, NT = S::NT;

  const AttentionParams& p;
  const Sequence& seq;
  const Window window;
  const Exponent<kModified> exponent;
  int head, row0, lane, warp;
  T *tile_q, *tile_k, *tile_v;
  const T *k, *v;  // first key of the sequence and head
  float out[MT][D / 8][4], most[MT][2], sum[MT][2];

  LK_DEVICE ForwardBlock(const AttentionParams& p_, const Sequence& s, int head_,
                         unsigned char* memory)
      : p(p_), seq(s), window(p_, s), exponent(p_, s.b, head_), head(head_) {
    row0 = s.tile * S::kRows;
    lane = threadIdx.x % 32;
    warp = threadIdx.x / 32;
    tile_q = reinterpret_cast<T*>(memory);
    tile_k = tile_q + S::kRows * D;
    tile_v = tile_k + S::kKeys * D;
    const int kv_head = head / (p.heads / p.kv_heads);
    k = at<T>(p.k, s.b, s.first_key, 0, kv_head);
    v = at<T>(p.v, s.b, s.first_key, 0, kv_head);
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        most[i][h] = -kInfinity;
        sum[i][h] = 0.0f;
      }
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[i][j][e] = 0.0f;
      }
    }
  }

  LK_DEVICE int row_of(int i, int h) const { return row0 + 32 * warp + 16 * i + lane / 4 + 8 * h; }

  LK_DEVICE void load_queries() const {
    load_rows<T, D, S::kRows, S::kThreads>(
        tile_q, at<T>(p.q, seq.b, seq.first_row, row0, head), p.q.row, seq.rows - row0);
  }
  LK_DEVICE void load_keys(int key) const {
    load_rows<T, D, S::kKeys, S::kThreads>(tile_k, k + key * p.k.row, p.k.row, seq.keys - key);
    cp_async_commit();
  }
  LK_DEVICE void load_values(int key) const {
    load_rows<T, D, S::kKeys, S::kThreads>(tile_v, v + key * p.v.row, p.v.row, seq.keys - key);
    cp_async_commit();
  }

  // Raw scores to values whose multiple by exponent.factor is the exponent; -inf where hidden.
  LK_DEVICE void modify(float (&s)[MT][NT][4], int key) const {
    const bool all = window.covers(row0, S::kRows, key, S::kKeys);
    if (!kModified && all) return;
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row_of(i, h);
        const Span seen = window.keys_of(row);
#pragma unroll
        for (int j = 0; j < NT; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int column = key + 8 * j + 2 * (lane % 4) + e;
            float& score = s[i][j][2 * h + e];
            float unused;
            score = exponent.value(score, row + window.offset - column, unused);
            if (!all && (column < seen.low || column > seen.high)) score = -kInfinity;
          }
        }
      }
    }
  }

  // Scores to weights; rescales what has been summed.
  LK_DEVICE void soften(float (&s)[MT][NT][4]) {
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = most[i][h];
#pragma unroll
        for (int j = 0; j < NT; ++j) {
          top = larger(top, larger(s[i][j][2 * h], s[i][j][2 * h + 1]));
        }
        top = quad_max(top);
        const float base = top == -kInfinity ? 0.0f : top * exponent.factor;
        const float correction = exp2_of(most[i][h] * exponent.factor - base);
        most[i][h] = top;
        float total = sum[i][h] * correction;
#pragma unroll
        for (int j = 0; j < NT; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& weight = s[i][j][2 * h + e];
            weight = exp2_of(weight * exponent.factor - base);
            total += weight;
          }
        }
        sum[i][h] = total;
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
          out[i][j][2 * h] *= correction;
          out[i][j][2 * h + 1] *= correction;
        }
      }
    }
  }

  LK_DEVICE void drop(float (&s)[MT][NT][4], int key, const Keep& keep) const {
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t bits = keep.bits<S::kKeys>(row_of(i, h), key, lane % 4);
#pragma unroll
        for (int j = 0; j < NT; ++j) {
          if (!Keep::bit(bits, j, 0)) s[i][j][2 * h] = 0.0f;
          if (!Keep::bit(bits, j, 1)) s[i][j][2 * h + 1] = 0.0f;
        }
      }
    }
  }

  // Division by l, the sink's share, lse, and the rows out through the tile of Q.
  LK_DEVICE void finish(const ForwardParams& params) {
    const float sink = p.sinks == nullptr ? -kInfinity : p.sinks[head] * kLog2E;
    float* lse = params.lse + statistic(p, seq, head);
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float own = most[i][h] == -kInfinity ? -kInfinity : most[i][h] * exponent.factor;
        const float top = larger(own, sink), base = top == -kInfinity ? 0.0f : top;
        const float share = exp2_of(own - base);
        const float total = quad_sum(sum[i][h]) * share + exp2_of(sink - base);
        const bool none = total == 0.0f;
        const float factor = p.keep_scale * share / total;
        if (lane % 4 == 0 && row_of(i, h) < seq.rows) {
          lse[row_of(i, h)] = none ? -kInfinity : (base + std::log2(total)) * kLn2;
        }
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
          out[i][j][2 * h] = none ? 0.0f : out[i][j][2 * h] * factor;
          out[i][j][2 * h + 1] = none ? 0.0f : out[i][j][2 * h + 1] * factor;
        }
      }
    }
    __syncthreads();  // the tile of Q is reused
    stage_rows<T, D, MT>(out, 1.0f, tile_q, 32 * warp);
    __syncthreads();
    T* to = at<T>(params.out, seq.b, seq.first_row, row0, head);
    store_rows<T, D, S::kRows, S::kThreads>(tile_q, to, params.out.row, seq.rows - row0);
  }
};

template <class T, int D, bool kModified>
__global__ void __launch_bounds__(ForwardShape<D>::kThreads, 2)
    attention_forward_sm80_kernel(const __grid_constant__ ForwardParams params) {
  using S = ForwardShape<D>;
  LK_DYNAMIC_SHARED(shared);
  const AttentionParams& p = params.a;
  const int place = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  const Sequence seq = find_sequence<S::kRows, false>(p, place);
  if (seq.b < 0) return;
  ForwardBlock<T, D, kModified> block(p, seq, static_cast<int>(blockIdx.y), shared);
  const int last_row = (block.row0 + S::kRows < seq.rows ? block.row0 + S::kRows : seq.rows) - 1;
  const int low = block.window.keys_of(block.row0).low;
  const int begin = (low < 0 ? 0 : low) / S::kKeys * S::kKeys;
  const int end = block.window.keys_of(last_row).high + 1;
  [[maybe_unused]] const Keep keep(p, seq.b, block.head);

  block.load_queries();
  if (begin < end) block.load_keys(begin);
  for (int key = begin; key < end; key += S::kKeys) {
    cp_async_wait<0>();
    pipeline_barrier();
    block.load_values(key);
    float s[S::MT][S::NT][4];
    multiply_rows<T, D>(block.tile_q, 32 * block.warp, block.tile_k, s);
    cp_async_wait<0>();
    pipeline_barrier();
    if (key + S::kKeys < end) block.load_keys(key + S::kKeys);
    block.modify(s, key);
    block.soften(s);
    if constexpr (kModified) {
      if (p.drop_threshold != 0) block.drop(s, key, keep);
    }
    accumulate<T, D>(s, block.tile_v, block.out);
  }
  cp_async_wait<0>();
  block.finish(params);
}

template <class T, int D, bool kModified>
cudaError_t launch_forward(const ForwardParams& p, cudaStream_t stream) {
  using S = ForwardShape<D>;
  const int64_t places = count_places(p.a, p.a.rows, S::kRows);
  if (places > INT32_MAX) return cudaErrorInvalidValue;
  return launch_kernel(attention_forward_sm80_kernel<T, D, kModified>,
                       dim3(static_cast<unsigned>(places), static_cast<unsigned>(p.a.heads)),
                       S::kThreads, S::kShared, stream, p);
}

template <class T>
cudaError_t run_forward(const ForwardParams& p, cudaStream_t stream) {
  if (modified(p.a)) {
    return p.a.head_dim == 64 ? launch_forward<T, 64, true>(p, stream)
                              : launch_forward<T, 128, true>(p, stream);
  }
  return p.a.head_dim == 64 ? launch_forward<T, 64, false>(p, stream)
                            : launch_forward<T, 128, false>(p, stream);
}

}  // namespace lora_kernels::attention::cuda
