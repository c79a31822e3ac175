// Backward, written once for every engine of lora_linear and compiled once per instruction set.
//
//   dX = dY W + (dS A) * D,   dS = scaling / P(keep) * dY B,   dA = dS^T (X * D),   dB = s dY^T S
//
// Phases: (0) A and B packed, dropout masks; (1) split over rows: dY packed, dS from the packed
// strip, then dB and dA with the rows of a chunk as their k; (2) split over columns of dX: a panel of
// columns of W is decoded and packed, and all rows of dY pass it; the low-rank product joins in the
// accumulator. dA and dB partials are fp32 and per thread.
// Numerics: W in the dtype of dX, fp32 accumulation, one rounding at the store.
#pragma once

#include "../lora_linear/masks.h"
#include "../lora_linear/product.h"
#include "decode.h"

namespace lora_kernels::quant_linear {
namespace {

using lora_linear::mask_words;
using lora_linear::Output;
using lora_linear::Segment;
using lora_linear::strip_width;
using lora_linear::Term;

constexpr int64_t kWeightRows = 32;  // decoded at a time

template <class E>
struct BwdShared {
  using TA = typename E::TA;
  using TB = typename E::TB;
  int64_t strips, np, rk;
  TA *dy, *ds;
  typename E::T* ds_rows;  // [m, rank]; for dA
  TB *a, *bt;
  uint32_t* masks;
  int64_t bytes;

  BwdShared(const BwdParams& p, void* base) {
    const int64_t k = p.weight->k;
    np = round_up(p.weight->n, E::KR);
    rk = round_up(p.rank, E::KR);
    strips = (p.m + E::MR - 1) / E::MR;
    lora_linear::Arena arena(base);
    const bool packs_dy = p.dx != nullptr || p.da != nullptr;
    dy = arena.take<TA>(packs_dy ? strips * E::MR * np : 0);
    ds_rows = arena.take<typename E::T>(p.da != nullptr ? p.m * p.rank : 0);
    ds = arena.take<TA>(strips * E::MR * rk);
    a = arena.take<TB>(rk * round_up(k, E::NV));
    bt = arena.take<TB>(p.rank > 0 ? np * round_up(p.rank, E::NV) : 0);
    const bool drops = p.rank > 0 && p.dropout.threshold != 0;
    masks = arena.take<uint32_t>(drops ? p.m * mask_words(k) : 0);
    bytes = arena.used();
  }
};

template <class E>
struct BwdOwn {
  int64_t panel_strips, chunk;
  typename E::T* rows;
  typename E::TB *panel, *outer;
  typename E::TA* left;
  float *shrink, *sums, *lora_tile, *extra[2];
  typename E::Tail tail;
  int64_t bytes;

  BwdOwn(const BwdParams& p, void* base) {
    const int64_t np = round_up(p.weight->n, E::KR), rk = round_up(p.rank, E::KR);
    panel_strips = std::min<int64_t>(E::COLUMNS / E::NR, (p.weight->k + E::NR - 1) / E::NR);
    chunk = lora_linear::chunk_strips<E>((p.m + E::MR - 1) / E::MR);
    lora_linear::Arena arena(base);
    rows = arena.take<typename E::T>(kWeightRows * panel_strips * E::NR);
    panel = arena.take<typename E::TB>(p.dx != nullptr ? np * panel_strips * E::NR : 0);
    const int64_t chunk_k = round_up(chunk * E::MR, E::KR);
    const bool sums_rows = p.da != nullptr || p.db != nullptr;
    left = arena.take<typename E::TA>(sums_rows ? round_up(p.rank, E::MR) * chunk_k : 0);
    outer = arena.take<typename E::TB>(sums_rows ? E::NR * chunk_k : 0);
    shrink = arena.take<float>(E::MR * round_up(p.rank, E::NV));
    sums = arena.take<float>(lora_linear::panel_floats<E>(chunk, np + rk));
    for (float*& tile : tail.tiles) tile = arena.take<float>(E::MR * E::NR);
    const bool drops = p.rank > 0 && p.dropout.threshold != 0;
    lora_tile = arena.take<float>(drops ? E::MR * E::NR : 0);
    for (float*& tile : extra) tile = arena.take<float>(drops ? E::MR * E::NR : 0);
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

// Columns [k0, k0 + columns) of W as a packed right operand of dY W.
template <class E>
void pack_panel(const Weight& w, int64_t k0, int64_t columns, const BwdOwn<E>& own) {
  using T = typename E::T;
  const int64_t np = round_up(w.n, E::KR), ld = own.panel_strips * E::NR;
  for (int64_t n0 = 0; n0 < w.n; n0 += kWeightRows) {
    const int64_t rows = std::min(kWeightRows, w.n - n0);
    for (int64_t i = 0; i < rows; ++i) decode(w, n0 + i, k0, columns, own.rows + i * ld);
    for (int64_t c0 = 0; c0 < columns; c0 += E::NR) {
      const int64_t width = strip_width<E>(columns, c0);
      E::template pack_b_rows<T>(own.rows + c0, ld, rows, std::min<int64_t>(E::NR, columns - c0),
                                 width, nullptr, 0, 0, own.panel + c0 * np + n0 * width);
    }
  }
}

template <class E>
void multiply_panels(const BwdParams& p, const BwdShared<E>& shared, BwdOwn<E>& own,
                    int thread, int threads) {
  using T = typename E::T;
  using TB = typename E::TB;
  const int64_t k = p.weight->k, words = mask_words(k);
  const bool drops = p.rank > 0 && p.dropout.threshold != 0;
  const bool stream = lora_linear::streams<E>(p.dx, p.lddx, p.m, k);
  const Span strips = share((k + E::NR - 1) / E::NR, thread, threads);
  int parity = 0;
  for (int64_t j0 = strips.begin; j0 < strips.end; j0 += own.panel_strips) {
    const int64_t j1 = std::min(j0 + own.panel_strips, strips.end), k0 = j0 * E::NR;
    const int64_t columns = std::min(j1 * E::NR, k) - k0;
    pack_panel<E>(*p.weight, k0, columns, own);
    for (int64_t i0 = 0; i0 < shared.strips; i0 += own.chunk) {
      const int64_t i1 = std::min(i0 + own.chunk, shared.strips);
      const Term<E> terms[2] = {{shared.dy + i0 * E::MR * shared.np, own.panel, shared.np},
                                {shared.ds + i0 * E::MR * shared.rk,
                                 static_cast<const TB*>(shared.a) + k0 * shared.rk, shared.rk}};
      lora_linear::multiply<E>(
          terms, p.rank > 0 && !drops ? 2 : 1, i1 - i0, columns, {0, j1 - j0}, own.sums, own.tail,
          [&](int64_t i, int64_t j) {
            const int64_t row = (i0 + i) * E::MR, column = k0 + j * E::NR;
            Output<E> out{static_cast<T*>(p.dx) + row * p.lddx + column,
                          p.lddx,
                          std::min<int64_t>(E::MR, p.m - row),
                          std::min<int64_t>(E::NR, k - column),
                          nullptr,
                          nullptr,
                          stream};
            if (drops) {
              float* extra = own.extra[parity ^= 1];
              const int64_t width = strip_width<E>(k, column);
              std::fill(extra, extra + E::MR * E::NR, 0.0f);
              const Segment<E> lora{shared.ds + row * shared.rk, shared.a + column * shared.rk,
                                    shared.rk};
              E::micro(&lora, 1, out.rows, width, own.lora_tile, E::NR, false);
              E::add_masked(own.lora_tile, out.rows, width, shared.masks + row * words, words,
                            column, extra);
              out.extra = extra;
            }
            return out;
          });
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
    multiply_panels<E>(p, shared, own, thread, threads);
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
