// Attention backward for Hopper: one kernel for dk and dv, the same one for dq; no atomics.
//
// Math      key_gradients_sm80.cuh and query_gradients_sm80.cuh, without softcap, ALiBi, dropout.
// Roles     two tiles of 128 rows stay (K, V; for dq: Q, dO), tiles of 64 rows of the two others
//           stream by (U, W: Q, dO; for dq: K, V). With X, Y the resident ones and p, dz as there:
//             s = X U^T    dp = Y W^T    first += dz U    second += p W (dv only)
//           Warpgroup 0 is the producer: a thread copies, a warp brings the statistics of queries;
//           warpgroups 1 and 2 own 64 resident rows each.
// Grid      x: tiles of 128 keys (queries, those with the most keys first); y: key (query) heads.
//           For dk and dv a block goes over the query heads of its group in order.
// Operands  s, dp: from shared memory. The sums: p and dz are accumulators, rounded, in registers,
//           U and W as N-major operands, so nothing is transposed or written to shared memory.
// Overlap   the products of one warpgroup run during the other's exponentials.
// Packed    rows of a streamed tile that belong to the next sequence are cleared.
// Bytes     the resident tensors and the gradients once; the streamed ones once per resident tile.
// Limits    as check_backward_sm90 says.
#pragma once

#include "../../common/barrier.cuh"
#include "../../common/mbarrier.cuh"
#include "../../common/quad.cuh"
#include "../../common/tma.cuh"
#include "../../common/wgmma.cuh"
#include "backward_sm90_params.h"
#include "backward_sm90_schedule.h"
#include "scores.cuh"

namespace lora_kernels::attention::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(LK_EMULATOR)

// What a block goes over: streamed rows begin to end (in steps of kSm90Stream) of `heads` heads.
template <bool kOfKeys>
struct GradientWork {
  Sequence seq;
  Window window;
  int own_head, first_head, heads;  // resident; streamed
  int own0, own_rows;               // first resident row, rows of the resident side
  int begin, end, stream_rows;

  LK_DEVICE GradientWork(const AttentionParams& p, const Sequence& s)
      : seq(s), window(p, s), own_head(static_cast<int>(blockIdx.y)) {
    const int group = p.heads / p.kv_heads;
    first_head = kOfKeys ? own_head * group : own_head / group;
    heads = kOfKeys ? group : 1;
    own0 = s.tile * 128;
    own_rows = kOfKeys ? s.keys : s.rows;
    stream_rows = kOfKeys ? s.rows : s.keys;
    const int last = (own0 + 128 < own_rows ? own0 + 128 : own_rows) - 1;
    const int low = kOfKeys ? window.rows_of(own0).low : window.keys_of(own0).low;
    const int high = kOfKeys ? window.rows_of(last).high : window.keys_of(last).high;
    begin = (low < 0 ? 0 : low) / kSm90Stream * kSm90Stream;
    end = high < stream_rows - 1 ? high + 1 : stream_rows;
  }
};

template <int D, bool kOfKeys>
LK_DEVICE void produce_gradients(const Sm90BackwardParams& p, const GradientWork<kOfKeys>& work,
                                 uint32_t resident, uint32_t stages, uint32_t barriers) {
  using G = Sm90Gradients<D>;
  const int b = p.f.a.cu_rows == nullptr ? work.seq.b : 0;
  const int first_own = (kOfKeys ? work.seq.first_key : work.seq.first_row) + work.own0;
  const int first_stream = kOfKeys ? work.seq.first_row : work.seq.first_key;
  const TensorMap* x = kOfKeys ? &p.k : &p.q;
  const TensorMap* y = kOfKeys ? &p.v : &p.dout;
  const TensorMap* u = kOfKeys ? &p.q : &p.k;
  const TensorMap* w = kOfKeys ? &p.dout : &p.v;
  mbarrier_arrive_expect(barriers, 2 * G::kResidentBytes);
  for (int box = 0; box < G::kBoxes; ++box) {
    for (int half = 0; half < 2; ++half) {
      const uint32_t to = resident + box * G::kResidentBoxBytes + half * G::kStreamBoxBytes;
      tma_load(to, x, barriers, 64 * box, first_own + 64 * half, work.own_head, b);
      tma_load(to + G::kResidentBytes, y, barriers, 64 * box, first_own + 64 * half, work.own_head,
               b);
    }
  }
  RingPlace<G::kStages> place;
#pragma unroll 1
  for (int head = work.first_head; head < work.first_head + work.heads; ++head) {
#pragma unroll 1
    for (int row = work.begin; row < work.end; row += kSm90Stream) {
      const uint32_t full = barriers + 8 * G::full(place.stage);
      const uint32_t to = stages + place.stage * G::kStageBytes;
      mbarrier_wait(barriers + 8 * G::empty(place.stage), place.phase ^ 1);
      mbarrier_arrive_expect(full, G::kStageBytes);
      for (int box = 0; box < G::kBoxes; ++box) {
        tma_load(to + box * G::kStreamBoxBytes, u, full, 64 * box, first_stream + row, head, b);
        tma_load(to + G::kStreamBytes + box * G::kStreamBoxBytes, w, full, 64 * box,
                 first_stream + row, head, b);
      }
      place.advance();
    }
  }
}

// lse (log 2, +inf where there is no row or the row has no key) and delta of the streamed queries,
// by one warp; every lane arrives.
template <int D>
LK_DEVICE void bring_statistics(const BackwardParams& p, const GradientWork<true>& work,
                                float* statistics, uint32_t barriers) {
  using G = Sm90Gradients<D>;
  const int lane = threadIdx.x % 32;
  RingPlace<G::kStages> place;
#pragma unroll 1
  for (int head = work.first_head; head < work.first_head + work.heads; ++head) {
    const int64_t first = statistic(p.a, work.seq, head);
#pragma unroll 1
    for (int row = work.begin; row < work.end; row += kSm90Stream) {
      mbarrier_wait(barriers + 8 * G::empty(place.stage), place.phase ^ 1);
      float* to = statistics + place.stage * 2 * kSm90Stream;
#pragma unroll
      for (int i = lane; i < kSm90Stream; i += 32) {
        const bool there = row + i < work.seq.rows;
        const float lse = there ? p.lse[first + row + i] : -kInfinity;
        to[i] = lse == -kInfinity ? kInfinity : lse * kLog2E;
        to[kSm90Stream + i] = there ? p.delta[first + row + i] : 0.0f;
      }
      mbarrier_arrive(barriers + 8 * G::full(place.stage));
      place.advance();
    }
  }
}

// One of the two consumer warpgroups. Named barriers: 3 joins both, 4 and 5 join one.
template <class T, int D, bool kOfKeys>
struct GradientConsumer {
  using G = Sm90Gradients<D>;

  const BackwardParams& p;
  const GradientWork<kOfKeys>& work;
  unsigned char* generic;  // ordinary address of `resident`
  int consumer, thread;
  uint32_t resident, stages, barriers;
  const float* statistics;
  float factor;
  float s[32], dp[32], first[D / 2], second[kOfKeys ? D / 2 : 1], lse[2], delta[2];
  uint32_t weights[kOfKeys ? 16 : 1], dz[16];

  LK_DEVICE GradientConsumer(const BackwardParams& p_, const GradientWork<kOfKeys>& w,
                             unsigned char* memory, int consumer_, uint32_t resident_,
                             uint32_t stages_, uint32_t barriers_, const float* statistics_)
      : p(p_),
        work(w),
        generic(memory),
        consumer(consumer_),
        thread(static_cast<int>(threadIdx.x % 128)),
        resident(resident_),
        stages(stages_),
        barriers(barriers_),
        statistics(statistics_),
        factor(p_.a.scale * kLog2E) {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) {
      first[i] = 0.0f;
      if constexpr (kOfKeys) second[i] = 0.0f;
    }
    if constexpr (!kOfKeys) {
      const int64_t from = statistic(p.a, w.seq, w.own_head);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = own_of(h);
        const float value = row < w.seq.rows ? p.lse[from + row] : -kInfinity;
        lse[h] = value == -kInfinity ? kInfinity : value * kLog2E;
        delta[h] = row < w.seq.rows ? p.delta[from + row] : 0.0f;
      }
    }
  }

  LK_DEVICE int own_of(int h) const {
    return work.own0 + 64 * consumer + 16 * (thread / 32) + thread % 32 / 4 + 8 * h;
  }

  // Rows of the streamed tiles from `from` on become zero.
  LK_DEVICE void clear_rows(uint32_t tiles, int from) const {
    unsigned char* at = generic + (tiles - resident);
    constexpr int kChunks = 2 * 8 * G::kBoxes;  // of both tiles
    for (int e = from * kChunks + 128 * consumer + thread; e < kSm90Stream * kChunks; e += 256) {
      const int row = e / kChunks, chunk = e % kChunks;
      *reinterpret_cast<uint4*>(at + chunk / 8 * G::kStreamBoxBytes +
                                swizzle_128b(row, chunk % 8)) = make_uint4(0, 0, 0, 0);
    }
    async_proxy_fence();
    named_barrier(3, 256);
  }

  LK_DEVICE void issue_scores(uint32_t tiles) {
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      wgmma<T, false>(s, row_operand(resident, 64 * consumer, i), stream_row_operand(tiles, i),
                      i > 0);
    }
    wgmma_commit();
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      wgmma<T, false>(dp, row_operand(resident + G::kResidentBytes, 64 * consumer, i),
                      stream_row_operand(tiles + G::kStreamBytes, i), i > 0);
    }
    wgmma_commit();
  }

  LK_DEVICE void issue_sums(uint32_t tiles) {
#pragma unroll
    for (int i = 0; i < kSm90Stream / 16; ++i) {
      if constexpr (kOfKeys) {
        wgmma<T, true>(second, &weights[4 * i], stream_sum_operand(tiles + G::kStreamBytes, i), 1);
      }
      wgmma<T, true>(first, &dz[4 * i], stream_sum_operand(tiles, i), 1);
    }
    wgmma_commit();
  }

  // Scores to weights.
  LK_DEVICE void weigh(int row0, int stage) {
    const bool all = kOfKeys ? work.window.covers(row0, kSm90Stream, work.own0, 128)
                             : work.window.covers(work.own0, 128, row0, kSm90Stream);
    const float* row_lse = statistics + stage * 2 * kSm90Stream;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Span seen = kOfKeys ? work.window.rows_of(own_of(h)) : work.window.keys_of(own_of(h));
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& weight = s[4 * j + 2 * h + e];
          const int column = 8 * j + 2 * (thread % 4) + e;
          weight = exp2_of(weight * factor - (kOfKeys ? row_lse[column] : lse[h]));
          if (!all && (row0 + column < seen.low || row0 + column > seen.high)) weight = 0.0f;
        }
      }
    }
  }

  // dp to the gradient of the scores, and both to operands.
  LK_DEVICE void differentiate(int stage) {
    const float* row_delta = statistics + stage * 2 * kSm90Stream + kSm90Stream;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int column = 8 * (i / 4) + 2 * (thread % 4) + i % 2;
      dp[i] = s[i] * (dp[i] - (kOfKeys ? row_delta[column] : delta[i / 2 % 2]));
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if constexpr (kOfKeys) weights[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
      dz[i] = pack2<T>(dp[2 * i], dp[2 * i + 1]);
    }
  }

  LK_DEVICE void sweep() {
    RingPlace<G::kStages> place;
    const bool packed = p.a.cu_rows != nullptr;
    mbarrier_wait(barriers, 0);
#pragma unroll 1
    for (int head = 0; head < work.heads; ++head) {
#pragma unroll 1
      for (int row = work.begin; row < work.end; row += kSm90Stream) {
        const uint32_t tiles = stages + place.stage * G::kStageBytes;
        mbarrier_wait(barriers + 8 * G::full(place.stage), place.phase);
        if (packed && row + kSm90Stream > work.stream_rows) {
          clear_rows(tiles, work.stream_rows - row);
        }
        wgmma_fence();
        issue_scores(tiles);
        wgmma_wait<1>();
        pin_registers(s);
        weigh(row, place.stage);
        wgmma_wait<0>();
        pin_registers(dp);
        differentiate(place.stage);
        pin_registers(first);
        pin_registers(second);
        pin_registers(weights);
        pin_registers(dz);
        wgmma_fence();
        issue_sums(tiles);
        wgmma_wait<0>();
        pin_registers(first);
        pin_registers(second);
        pin_registers(weights);
        pin_registers(dz);
        if (thread % 32 == 0) mbarrier_arrive(barriers + 8 * G::empty(place.stage));
        __syncwarp();
        place.advance();
      }
    }
  }

  // factor * sums, rounded, out through this consumer's rows of a resident tile.
  template <class Out>
  LK_DEVICE void store(const float (&sums)[D / 2], float scale, uint32_t tile, const Out& out) const {
    const int warp = thread / 32, lane = thread % 32;
    const uint32_t row = 64 * consumer + 16 * warp + lane % 16;
#pragma unroll
    for (int j = 0; j < D / 8; j += 2) {
      const float* v = &sums[4 * j];
      store_matrix_x4(tile + j / 8 * G::kResidentBoxBytes + swizzle_128b(row, j % 8 + lane / 16),
                      pack2<T>(scale * v[0], scale * v[1]), pack2<T>(scale * v[2], scale * v[3]),
                      pack2<T>(scale * v[4], scale * v[5]), pack2<T>(scale * v[6], scale * v[7]));
    }
    __syncwarp();
    named_barrier(4 + consumer, 128);
    constexpr int kChunks = D / 8;
    const int own = work.own0 + 64 * consumer;
    const int at_row = kOfKeys ? work.seq.first_key : work.seq.first_row;
    T* to = at<T>(out, work.seq.b, at_row, own, work.own_head);
    const unsigned char* from = generic + (tile - resident);
#pragma unroll 4
    for (int e = thread; e < 64 * kChunks; e += 128) {
      const int i = e / kChunks, chunk = e % kChunks;
      if (own + i >= work.own_rows) break;
      *reinterpret_cast<uint4*>(to + i * out.row + 8 * chunk) =
          *reinterpret_cast<const uint4*>(from + chunk / 8 * G::kResidentBoxBytes +
                                          swizzle_128b(64 * consumer + i, chunk % 8));
    }
  }

  LK_DEVICE void finish() const {
    if constexpr (kOfKeys) {
      store(first, p.a.scale, resident, p.dk);
      store(second, 1.0f, resident + G::kResidentBytes, p.dv);
    } else {
      store(first, p.a.scale, resident, p.dq);
    }
  }
};

#endif  // sm_90a

template <class T, int D, bool kOfKeys>
__global__ void __launch_bounds__(kSm90Threads, 1)
    attention_gradients_sm90_kernel(const __grid_constant__ Sm90BackwardParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(LK_EMULATOR)
  using G = Sm90Gradients<D>;
  LK_DYNAMIC_SHARED(shared);
  const int place = static_cast<int>(kOfKeys ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
  const Sequence seq = find_sequence<128, kOfKeys>(p.f.a, place);
  if (seq.b < 0) return;
  const GradientWork<kOfKeys> work(p.f.a, seq);
  const uint32_t resident =
      (shared_address(shared) + kSwizzlePeriod - 1) / kSwizzlePeriod * kSwizzlePeriod;
  const uint32_t stages = resident + 2 * G::kResidentBytes;
  const uint32_t after = stages + G::kStages * G::kStageBytes;
  const uint32_t barriers = after + G::kStages * G::kStatisticBytes;
  unsigned char* generic = shared + (resident - shared_address(shared));
  float* statistics = reinterpret_cast<float*>(generic + (after - resident));
  const int warpgroup = warp_uniform(static_cast<int>(threadIdx.x / 128));
  if (threadIdx.x == 0) {
    mbarrier_init(barriers, 1);
    for (int stage = 0; stage < G::kStages; ++stage) {
      mbarrier_init(barriers + 8 * G::full(stage), kOfKeys ? 1 + 32 : 1);
      mbarrier_init(barriers + 8 * G::empty(stage), kSm90ConsumerWarps);
    }
    mbarrier_init_fence();
    tma_prefetch(&p.q);
    tma_prefetch(&p.k);
    tma_prefetch(&p.v);
    tma_prefetch(&p.dout);
  }
  __syncthreads();
  const bool some = work.begin < work.end;
  if (warpgroup == 0) {
    give_registers<kSm90ProducerRegisters>();
    if (threadIdx.x == 0 && some) {
      produce_gradients<D, kOfKeys>(p, work, resident, stages, barriers);
    }
    if constexpr (kOfKeys) {
      if (threadIdx.x / 32 == 1 && some) bring_statistics<D>(p.f, work, statistics, barriers);
    }
    __syncwarp();
  } else {
    take_registers<kSm90ConsumerRegisters>();
    GradientConsumer<T, D, kOfKeys> consumer(p.f, work, generic, warpgroup - 1, resident, stages,
                                             barriers, statistics);
    if (some) consumer.sweep();
    consumer.finish();
  }
#endif
}

template <class T, int D, bool kOfKeys>
cudaError_t launch_gradients_sm90(const Sm90BackwardParams& p, cudaStream_t stream) {
  const AttentionParams& a = p.f.a;
  const int64_t places = count_places(a, kOfKeys ? a.keys : a.rows, 128);
  if (places > INT32_MAX) return cudaErrorInvalidValue;
  return launch_kernel(attention_gradients_sm90_kernel<T, D, kOfKeys>,
                       dim3(static_cast<unsigned>(places),
                            static_cast<unsigned>(kOfKeys ? a.kv_heads : a.heads)),
                       kSm90Threads, Sm90Gradients<D>::kSharedBytes, stream, p);
}

template <class T>
cudaError_t run_gradients_sm90(const Sm90BackwardParams& p, bool of_keys, cudaStream_t stream) {
  if (p.f.a.head_dim == 64) {
    return of_keys ? launch_gradients_sm90<T, 64, true>(p, stream)
                   : launch_gradients_sm90<T, 64, false>(p, stream);
  }
  return of_keys ? launch_gradients_sm90<T, 128, true>(p, stream)
                 : launch_gradients_sm90<T, 128, false>(p, stream);
}

}  // namespace lora_kernels::attention::cuda
