// Attention forward for Hopper: warp-specialised, TMA in, wgmma.
//
// Math      that of forward_sm80.cuh, without softcap, ALiBi and dropout.
// Grid      x: tiles of 128 queries, those with the most keys first; y: query heads.
// Roles     warpgroup 0 is the producer, of which one thread copies Q and then K and V by blocks of
//           128 keys; warpgroups 1 and 2 own 64 queries each.
// Pipeline  K and V of a stage have barriers of their own. A consumer issues the scores of block
//           n + 1 and the output of block n together; the softmax of n + 1 runs while the latter
//           is multiplied. The warpgroups take turns at issuing (named barriers), so that one's
//           softmax runs during the other's products (Shah et al. 2024, arXiv 2407.08608).
// Operands  scores: Q and K from shared memory. Output: the weights are accumulators of the scores,
//           rounded, in registers, V from shared memory as the N-major operand, so it is never
//           transposed.
// Packed    a box may reach into the next sequence: its keys are masked, and its rows of V are
//           cleared before they are multiplied, as 0 times infinity would be NaN.
// Bytes     Q and out once, K and V once per tile of queries, mostly from L2.
// Numerics  as forward_sm80.cuh.
// Limits    as check_forward_sm90 says.
#pragma once

#include "../../common/barrier.cuh"
#include "../../common/mbarrier.cuh"
#include "../../common/quad.cuh"
#include "../../common/tma.cuh"
#include "../../common/wgmma.cuh"
#include "forward_sm90_params.h"
#include "forward_sm90_schedule.h"
#include "scores.cuh"

namespace lora_kernels::attention::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(LK_EMULATOR)

// The block of queries and the keys that it sees, begin to end in steps of kSm90Keys.
struct Sm90Work {
  Sequence seq;
  Window window;
  int head, kv_head, row0, begin, end;

  LK_DEVICE Sm90Work(const AttentionParams& p, const Sequence& s)
      : seq(s), window(p, s), head(static_cast<int>(blockIdx.y)) {
    kv_head = head / (p.heads / p.kv_heads);
    row0 = s.tile * kSm90Rows;
    const int last_row = (row0 + kSm90Rows < s.rows ? row0 + kSm90Rows : s.rows) - 1;
    const int low = window.keys_of(row0).low;
    begin = (low < 0 ? 0 : low) / kSm90Keys * kSm90Keys;
    end = window.keys_of(last_row).high + 1;
  }
};

template <int D>
LK_DEVICE void copy_tile(uint32_t tile, const TensorMap* map, uint32_t barrier, int row, int head,
                         int b) {
#pragma unroll
  for (int box = 0; box < Sm90Forward<D>::kBoxes; ++box) {
    tma_load(tile + box * Sm90Forward<D>::kBoxBytes, map, barrier, 64 * box, row, head, b);
  }
}

template <int D>
LK_DEVICE void produce(const Sm90ForwardParams& p, const Sm90Work& work, uint32_t tile_q,
                       uint32_t stages, uint32_t barriers) {
  using F = Sm90Forward<D>;
  const int b = p.f.a.cu_rows == nullptr ? work.seq.b : 0;
  mbarrier_arrive_expect(barriers, F::kTileBytes);
  copy_tile<D>(tile_q, &p.q, barriers, work.seq.first_row + work.row0, work.head, b);
  RingPlace<F::kStages> place;
#pragma unroll 1
  for (int key = work.begin; key < work.end; key += kSm90Keys) {
    const uint32_t k = stages + place.stage * F::kStageBytes;
    mbarrier_wait(barriers + 8 * F::empty_k(place.stage), place.phase ^ 1);
    mbarrier_arrive_expect(barriers + 8 * F::full_k(place.stage), F::kTileBytes);
    copy_tile<D>(k, &p.k, barriers + 8 * F::full_k(place.stage), work.seq.first_key + key,
                 work.kv_head, b);
    mbarrier_wait(barriers + 8 * F::empty_v(place.stage), place.phase ^ 1);
    mbarrier_arrive_expect(barriers + 8 * F::full_v(place.stage), F::kTileBytes);
    copy_tile<D>(k + F::kTileBytes, &p.v, barriers + 8 * F::full_v(place.stage),
                 work.seq.first_key + key, work.kv_head, b);
    place.advance();
  }
}

// One of the two consumer warpgroups. Named barriers: 1 and 2 are the turns of the consumers, 3
// joins both, 4 and 5 join the threads of one.
template <class T, int D>
struct Sm90Consumer {
  using F = Sm90Forward<D>;

  const Sm90ForwardParams& params;
  const Sm90Work& work;
  uint32_t tile_q, stages, barriers;
  unsigned char* generic;  // the address of tile_q for ordinary accesses
  int consumer, thread;
  float factor;
  float s[64], out[D / 2], most[2], sum[2];
  uint32_t weights[32];

  LK_DEVICE Sm90Consumer(const Sm90ForwardParams& p, const Sm90Work& w, unsigned char* memory,
                         int consumer_, uint32_t q, uint32_t stages_, uint32_t barriers_)
      : params(p),
        work(w),
        tile_q(q),
        stages(stages_),
        barriers(barriers_),
        generic(memory),
        consumer(consumer_),
        thread(static_cast<int>(threadIdx.x % 128)),
        factor(p.f.a.scale * kLog2E) {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] = 0.0f;
    most[0] = most[1] = -kInfinity;
    sum[0] = sum[1] = 0.0f;
  }

  LK_DEVICE void wait_for_turn() const { named_barrier(1 + consumer, 256); }
  LK_DEVICE void pass_turn() const { named_barrier_arrive(1 + (consumer ^ 1), 256); }

  LK_DEVICE void release(int barrier) const {
    if (thread % 32 == 0) mbarrier_arrive(barriers + 8 * barrier);
    __syncwarp();
  }

  LK_DEVICE int row_of(int h) const {
    return work.row0 + 64 * consumer + 16 * (thread / 32) + thread % 32 / 4 + 8 * h;
  }

  LK_DEVICE void issue_scores(uint32_t k) {
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      wgmma<T, false>(s, row_operand(tile_q, 64 * consumer, i), row_operand(k, 0, i), i > 0);
    }
    wgmma_commit();
  }

  LK_DEVICE void issue_output(uint32_t v) {
#pragma unroll
    for (int i = 0; i < kSm90Keys / 16; ++i) {
      wgmma<T, true>(out, &weights[4 * i], value_operand(v, i), 1);
    }
    wgmma_commit();
  }

  LK_DEVICE void mask(int key) {
    if (work.window.covers(work.row0, kSm90Rows, key, kSm90Keys)) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Span seen = work.window.keys_of(row_of(h));
      const int low = seen.low - key - 2 * (thread % 4), high = seen.high - key - 2 * (thread % 4);
#pragma unroll
      for (int j = 0; j < 16; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (8 * j + e < low || 8 * j + e > high) s[4 * j + 2 * h + e] = -kInfinity;
        }
      }
    }
  }

  // Scores to weights; `correction` is the factor of what has been summed.
  LK_DEVICE void soften(float (&correction)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = most[h];
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        top = larger(top, larger(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
      }
      top = quad_max(top);
      const float base = top == -kInfinity ? 0.0f : top * factor;
      correction[h] = exp2_of(most[h] * factor - base);
      most[h] = top;
      float total = sum[h] * correction[h];
#pragma unroll
      for (int j = 0; j < 16; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& weight = s[4 * j + 2 * h + e];
          weight = exp2_of(weight * factor - base);
          total += weight;
        }
      }
      sum[h] = total;
    }
  }

  LK_DEVICE void round_weights() {
#pragma unroll
    for (int i = 0; i < 32; ++i) weights[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
  }

  // Rows of V from `first` on become zero.
  LK_DEVICE void clear_values(uint32_t v, int first) const {
    unsigned char* tile = generic + (v - tile_q);
    constexpr int kChunks = 8 * F::kBoxes;
    for (int e = first * kChunks + 128 * consumer + thread; e < kSm90Keys * kChunks; e += 256) {
      const int row = e / kChunks, chunk = e % kChunks;
      *reinterpret_cast<uint4*>(tile + chunk / 8 * F::kBoxBytes +
                                swizzle_128b(row, chunk % 8)) = make_uint4(0, 0, 0, 0);
    }
    async_proxy_fence();
    named_barrier(3, 256);
  }

  LK_DEVICE void sweep() {
    if (consumer == 1) pass_turn();  // the first consumer begins
    RingPlace<F::kStages> at_k, at_v;
    float correction[2];
    mbarrier_wait(barriers, 0);
    mbarrier_wait(barriers + 8 * F::full_k(0), 0);
    wait_for_turn();
    wgmma_fence();
    issue_scores(stages);
    pass_turn();
    wgmma_wait<0>();
    pin_registers(s);
    release(F::empty_k(0));
    at_k.advance();
    mask(work.begin);
    soften(correction);
    round_weights();
#pragma unroll 1
    for (int key = work.begin + kSm90Keys; key < work.end; key += kSm90Keys) {
      const uint32_t k = stages + at_k.stage * F::kStageBytes;
      const uint32_t v = stages + at_v.stage * F::kStageBytes + F::kTileBytes;
      mbarrier_wait(barriers + 8 * F::full_k(at_k.stage), at_k.phase);
      mbarrier_wait(barriers + 8 * F::full_v(at_v.stage), at_v.phase);
      wait_for_turn();
      pin_registers(s);
      pin_registers(out);
      pin_registers(weights);
      wgmma_fence();
      issue_scores(k);
      issue_output(v);
      pass_turn();
      wgmma_wait<1>();
      pin_registers(s);
      release(F::empty_k(at_k.stage));
      mask(key);
      soften(correction);
      wgmma_wait<0>();
      pin_registers(out);
      pin_registers(weights);
      release(F::empty_v(at_v.stage));
      at_k.advance();
      at_v.advance();
#pragma unroll
      for (int i = 0; i < D / 2; ++i) out[i] *= correction[i / 2 % 2];
      round_weights();
    }
    const uint32_t v = stages + at_v.stage * F::kStageBytes + F::kTileBytes;
    mbarrier_wait(barriers + 8 * F::full_v(at_v.stage), at_v.phase);
    const int last = work.begin + (work.end - 1 - work.begin) / kSm90Keys * kSm90Keys;
    if (params.f.a.cu_keys != nullptr && last + kSm90Keys > work.seq.keys) {
      clear_values(v, work.seq.keys - last);
    }
    wait_for_turn();
    pin_registers(out);
    pin_registers(weights);
    wgmma_fence();
    issue_output(v);
    pass_turn();
    wgmma_wait<0>();
    pin_registers(out);
    if (consumer == 0) wait_for_turn();  // the last turn that was passed
  }

  // Division by l, the sink's share, lse, and the rows out through this consumer's rows of Q.
  LK_DEVICE void finish() {
    const AttentionParams& p = params.f.a;
    const float sink = p.sinks == nullptr ? -kInfinity : p.sinks[work.head] * kLog2E;
    float* lse = params.f.lse + statistic(p, work.seq, work.head);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float own = most[h] == -kInfinity ? -kInfinity : most[h] * factor;
      const float top = larger(own, sink), base = top == -kInfinity ? 0.0f : top;
      const float share = exp2_of(own - base);
      const float total = quad_sum(sum[h]) * share + exp2_of(sink - base);
      const bool none = total == 0.0f;
      const float scale = share / total;
      if (thread % 4 == 0 && row_of(h) < work.seq.rows) {
        lse[row_of(h)] = none ? -kInfinity : (base + std::log2(total)) * kLn2;
      }
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& value = out[4 * j + 2 * h + e];
          value = none ? 0.0f : value * scale;
        }
      }
    }
    const int warp = thread / 32, lane = thread % 32;
    const uint32_t row = 64 * consumer + 16 * warp + lane % 16;
#pragma unroll
    for (int j = 0; j < D / 8; j += 2) {
      const uint32_t box = tile_q + j / 8 * F::kBoxBytes;
      const float* v = &out[4 * j];
      store_matrix_x4(box + swizzle_128b(row, j % 8 + lane / 16), pack2<T>(v[0], v[1]),
                      pack2<T>(v[2], v[3]), pack2<T>(v[4], v[5]), pack2<T>(v[6], v[7]));
    }
    __syncwarp();
    named_barrier(4 + consumer, 128);
    constexpr int kChunks = D / 8;
    const int first = work.row0 + 64 * consumer;
    T* to = at<T>(params.f.out, work.seq.b, work.seq.first_row, first, work.head);
#pragma unroll 4
    for (int e = thread; e < 64 * kChunks; e += 128) {
      const int i = e / kChunks, chunk = e % kChunks;
      if (first + i >= work.seq.rows) break;
      *reinterpret_cast<uint4*>(to + i * params.f.out.row + 8 * chunk) =
          *reinterpret_cast<const uint4*>(generic + chunk / 8 * F::kBoxBytes +
                                          swizzle_128b(64 * consumer + i, chunk % 8));
    }
  }
};

#endif  // sm_90a

template <class T, int D>
__global__ void __launch_bounds__(kSm90Threads, 1)
    attention_forward_sm90_kernel(const __grid_constant__ Sm90ForwardParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(LK_EMULATOR)
  using F = Sm90Forward<D>;
  LK_DYNAMIC_SHARED(shared);
  const Sequence seq =
      find_sequence<kSm90Rows, false>(p.f.a, static_cast<int>(gridDim.x - 1 - blockIdx.x));
  if (seq.b < 0) return;
  const Sm90Work work(p.f.a, seq);
  const uint32_t tile_q =
      (shared_address(shared) + kSwizzlePeriod - 1) / kSwizzlePeriod * kSwizzlePeriod;
  const uint32_t stages = tile_q + F::kTileBytes;
  const uint32_t barriers = stages + F::kStages * F::kStageBytes;
  const int warpgroup = warp_uniform(static_cast<int>(threadIdx.x / 128));
  if (threadIdx.x == 0) {
    mbarrier_init(barriers, 1);
    for (int stage = 0; stage < F::kStages; ++stage) {
      mbarrier_init(barriers + 8 * F::full_k(stage), 1);
      mbarrier_init(barriers + 8 * F::full_v(stage), 1);
      mbarrier_init(barriers + 8 * F::empty_k(stage), kSm90ConsumerWarps);
      mbarrier_init(barriers + 8 * F::empty_v(stage), kSm90ConsumerWarps);
    }
    mbarrier_init_fence();
    tma_prefetch(&p.q);
    tma_prefetch(&p.k);
    tma_prefetch(&p.v);
  }
  __syncthreads();
  if (warpgroup == 0) {
    give_registers<kSm90ProducerRegisters>();
    if (threadIdx.x == 0 && work.begin < work.end) produce<D>(p, work, tile_q, stages, barriers);
    __syncwarp();
  } else {
    take_registers<kSm90ConsumerRegisters>();
    Sm90Consumer<T, D> consumer(p, work, shared + (tile_q - shared_address(shared)), warpgroup - 1,
                                tile_q, stages, barriers);
    if (work.begin < work.end) consumer.sweep();
    consumer.finish();
  }
#endif
}

template <class T, int D>
cudaError_t launch_forward_sm90_kernel(const Sm90ForwardParams& p, cudaStream_t stream) {
  const int64_t places = count_places(p.f.a, p.f.a.rows, kSm90Rows);
  if (places > INT32_MAX) return cudaErrorInvalidValue;
  return launch_kernel(attention_forward_sm90_kernel<T, D>,
                       dim3(static_cast<unsigned>(places), static_cast<unsigned>(p.f.a.heads)),
                       kSm90Threads, Sm90Forward<D>::kSharedBytes, stream, p);
}

template <class T>
cudaError_t run_forward_sm90(const Sm90ForwardParams& p, cudaStream_t stream) {
  return p.f.a.head_dim == 64 ? launch_forward_sm90_kernel<T, 64>(p, stream)
                              : launch_forward_sm90_kernel<T, 128>(p, stream);
}

}  // namespace lora_kernels::attention::cuda
