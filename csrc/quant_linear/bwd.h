// Backward, written once for every engine of lora_linear and compiled once per instruction set.
//
//   dX = dY W + (dS A) * D,   dS = scaling / P(keep) * dY B,   dA = dS^T (X * D),   dB = s dY^T S
//
// Phases: (0) A and B packed, dropout masks; (1) split over rows: dY packed, dS from the packed
// strip, then dB and dA with the rows of a chunk as their k; (2) dX, split over columns (dx_panels.h).
// dA and dB partials are fp32 and per thread.
// Numerics: W in the dtype of dX, fp32 accumulation, one rounding at the store.
#pragma once

#include "dx_panels.h"

namespace lora_kernels::quant_linear {
namespace {

template <class E>
struct BwdOwn {
  int64_t chunk;
  typename E::TB* outer;
  typename E::TA* left;
  float* shrink;
  DxPass<E> dx;
  int64_t bytes;

  BwdOwn(const BwdParams& p, void* base) {
    chunk = lora_linear::chunk_strips<E>((p.m + E::MR - 1) / E::MR);
    lora_linear::Arena arena(base);
    const int64_t chunk_k = round_up(chunk * E::MR, E::KR);
    const bool sums_rows = p.da != nullptr || p.db != nullptr;
    left = arena.take<typename E::TA>(sums_rows ? round_up(p.rank, E::MR) * chunk_k : 0);
    outer = arena.take<typename E::TB>(sums_rows ? E::NR * chunk_k : 0);
    shrink = arena.take<float>(E::MR * round_up(p.rank, E::NV));
    dx = DxPass<E>(p, arena);
    bytes = arena.used();
  }
};

// Strips [own.begin, own.end) of a packed right operand from rows [k, n] of an adapter.
template <class E>
void pack_right_rows(const Adapter& src, int64_t k, int64_t n, Span own, typename E::TB* dst) {
  const int64_t kp = round_up(k, E::KR);
  for (int64_t j = own.begin; j < own.end; ++j) {
    const int64_t n0 = j * E::NR, valid = std::min<int64_t>(E::NR, n - n0);
    const int64_t width = strip_width<E>(n, n0);
    const auto pack = [&](const auto* from) {
      E::template pack_b_rows<std::remove_const_t<std::remove_pointer_t<decltype(from)>>>(
          from + n0, src.ld, k, valid, width, nullptr, 0, 0, dst + n0 * kp);
    };
    if (src.dtype == Dtype::kFloat32) {
      pack(static_cast<const float*>(src.data));
    } else {
      pack(static_cast<const typename E::T*>(src.data));
    }
  }
}

template <class E>
void prepare(const BwdParams& p, const BwdShared<E>& shared, int thread, int threads) {
  const int64_t k = p.weight->k, n = p.weight->n;
  if (p.rank == 0) return;
  if (p.dropout.threshold != 0) {
    const Span rows = share(p.m, thread, threads);
    lora_linear::make_masks(p.dropout, p.row0 + rows.begin, rows.end - rows.begin, k, 0,
                            shared.masks + rows.begin * mask_words(k));
  }
  pack_right_rows<E>(p.a, p.rank, k, share((k + E::NR - 1) / E::NR, thread, threads), shared.a);
  pack_right_rows<E>(p.b, n, p.rank, share((p.rank + E::NR - 1) / E::NR, thread, threads),
                     shared.bt);
}

// out [rank_padded, ld] += L^T R over `rows` rows; L [rows, rank], R [rows, n].
template <class E>
void add_outer(const typename E::T* l, int64_t ldl, const typename E::T* r, int64_t ldr,
               int64_t rows, int64_t rank, int64_t n, const uint32_t* masks, int64_t ldmask,
               const BwdOwn<E>& own, float* out) {
  const int64_t rows_k = round_up(rows, E::KR), ld = round_up(n, E::NV);
  for (int64_t r0 = 0; r0 < rank; r0 += E::MR) {
    E::pack_a_t(l + r0, ldl, std::min<int64_t>(E::MR, rank - r0), rows, own.left + r0 * rows_k);
  }
  for (int64_t n0 = 0; n0 < n; n0 += E::NR) {
    const int64_t width = strip_width<E>(n, n0);
    E::template pack_b_rows<typename E::T>(r + n0, ldr, rows, std::min<int64_t>(E::NR, n - n0),
                                           width, masks, n0, ldmask, own.outer);
    for (int64_t r0 = 0; r0 < rank; r0 += E::MR) {
      const Segment<E> segment{own.left + r0 * rows_k, own.outer, rows_k};
      E::micro(&segment, 1, std::min<int64_t>(E::MR, rank - r0), width, out + r0 * ld + n0, ld,
               true);
    }
  }
}

template <class E>
void pass_rows(const BwdParams& p, const BwdShared<E>& shared, const BwdOwn<E>& own, int thread,
               int threads) {
  using T = typename E::T;
  const int64_t k = p.weight->k, n = p.weight->n, words = mask_words(k);
  const Span strips = share(shared.strips, thread, threads);
  const int64_t ld = round_up(p.rank, E::NV), rank_padded = round_up(p.rank, E::MR);
  const bool needs_ds = p.rank > 0 && (p.dx != nullptr || p.da != nullptr);
  for (int64_t i0 = strips.begin; i0 < strips.end; i0 += own.chunk) {
    const int64_t i1 = std::min(i0 + own.chunk, strips.end);
    const int64_t row0 = i0 * E::MR, chunk_rows = std::min(i1 * E::MR, p.m) - row0;
    for (int64_t i = i0; i < i1; ++i) {
      if (p.dx == nullptr && p.da == nullptr) break;
      const int64_t row = i * E::MR, rows = std::min<int64_t>(E::MR, p.m - row);
      typename E::TA* strip = shared.dy + row * shared.np;
      E::pack_a(static_cast<const T*>(p.dy) + row * p.lddy, p.lddy, rows, n, strip);
      if (!needs_ds) continue;
      lora_linear::multiply_strip<E>(strip, shared.bt, shared.np, p.rank, rows, own.shrink, ld);
      const float factor = p.scaling * p.keep_scale;
      for (int64_t e = 0; e < rows * ld; ++e) own.shrink[e] *= factor;
      if (p.da != nullptr) {
        E::store(own.shrink, ld, rows, p.rank, nullptr, shared.ds_rows + row * p.rank, p.rank);
      }
      E::pack_a_f32(own.shrink, ld, rows, p.rank, 1.0f, shared.ds + row * shared.rk);
    }
    if (p.db != nullptr) {
      add_outer<E>(static_cast<const T*>(p.s) + row0 * p.lds, p.lds,
                   static_cast<const T*>(p.dy) + row0 * p.lddy, p.lddy, chunk_rows, p.rank, n,
                   nullptr, 0, own, p.db + thread * rank_padded * round_up(n, E::NV));
    }
    if (p.da != nullptr) {
      const bool drops = p.dropout.threshold != 0;
      add_outer<E>(shared.ds_rows + row0 * p.rank, p.rank,
                   static_cast<const T*>(p.x) + row0 * p.ldx, p.ldx, chunk_rows, p.rank, k,
                   drops ? shared.masks + row0 * words : nullptr, words, own,
                   p.da + thread * rank_padded * round_up(k, E::NV));
    }
  }
}

template <class E>
void bwd(const BwdParams& p, int phase, int thread, int threads, void* shared_memory,
           void* own_memory) {
  const BwdShared<E> shared(p, shared_memory);
  BwdOwn<E> own(p, own_memory);
  if (phase == 0) return prepare<E>(p, shared, thread, threads);
  E::enter();
  if (phase == 1) {
    pass_rows<E>(p, shared, own, thread, threads);
  } else if (p.dx != nullptr) {
    own.dx.run(p, shared, thread, threads);
  }
  E::leave();
}

template <class E>
Job<BwdParams> bwd_job() {
  return {3, [](const BwdParams& p) { return BwdShared<E>(p, nullptr).bytes; },
          [](const BwdParams& p) { return BwdOwn<E>(p, nullptr).bytes; }, bwd<E>};
}

}  // namespace
}  // namespace lora_kernels::quant_linear
