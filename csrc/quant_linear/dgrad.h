// dX, written once for every engine of lora_linear and compiled once per instruction set.
//
//   dX = dY W + (dS A) * D,   dS = scaling / P(keep) * dY B
//
// Phases: (0) dY, A and B packed, dropout masks; (1) dS per strip of rows; (2) dX, split over its
// columns. In (2) a panel of columns of W is decoded and packed, and all rows of dY pass it; the
// low-rank product joins in the accumulator.
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
struct DgradShared {
  using TA = typename E::TA;
  using TB = typename E::TB;
  int64_t strips, np, rk;
  TA *dy, *ds;
  TB *a, *bt;
  uint32_t* masks;
  int64_t bytes;

  DgradShared(const DgradParams& p, void* base) {
    const int64_t k = p.weight->k;
    np = round_up(p.weight->n, E::KR);
    rk = round_up(p.rank, E::KR);
    strips = (p.m + E::MR - 1) / E::MR;
    lora_linear::Arena arena(base);
    dy = arena.take<TA>(strips * E::MR * np);
    ds = arena.take<TA>(strips * E::MR * rk);
    a = arena.take<TB>(rk * round_up(k, E::NV));
    bt = arena.take<TB>(p.rank > 0 ? np * round_up(p.rank, E::NV) : 0);
    const bool drops = p.rank > 0 && p.dropout.threshold != 0;
    masks = arena.take<uint32_t>(drops ? p.m * mask_words(k) : 0);
    bytes = arena.used();
  }
};

template <class E>
struct DgradOwn {
  int64_t panel_strips, chunk;
  typename E::T* rows;
  typename E::TB* panel;
  float *shrink, *sums, *lora_tile, *extra[2];
  typename E::Tail tail;
  int64_t bytes;

  DgradOwn(const DgradParams& p, void* base) {
    const int64_t np = round_up(p.weight->n, E::KR), rk = round_up(p.rank, E::KR);
    panel_strips = std::min<int64_t>(E::COLUMNS / E::NR, (p.weight->k + E::NR - 1) / E::NR);
    chunk = lora_linear::chunk_strips<E>((p.m + E::MR - 1) / E::MR);
    lora_linear::Arena arena(base);
    rows = arena.take<typename E::T>(kWeightRows * panel_strips * E::NR);
    panel = arena.take<typename E::TB>(np * panel_strips * E::NR);
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
void pack_dgrad(const DgradParams& p, const DgradShared<E>& shared, int thread, int threads) {
  const int64_t k = p.weight->k, n = p.weight->n;
  Span own = share(shared.strips, thread, threads);
  for (int64_t i = own.begin; i < own.end; ++i) {
    const int64_t row = i * E::MR, rows = std::min<int64_t>(E::MR, p.m - row);
    E::pack_a(static_cast<const typename E::T*>(p.dy) + row * p.lddy, p.lddy, rows, n,
              shared.dy + row * shared.np);
    if (p.rank > 0 && p.dropout.threshold != 0) {
      lora_linear::make_masks(p.dropout, p.row0 + row, rows, k, 0,
                              shared.masks + row * mask_words(k));
    }
  }
  if (p.rank == 0) return;
  pack_right_rows<E>(p.a, p.rank, k, share((k + E::NR - 1) / E::NR, thread, threads), shared.a);
  pack_right_rows<E>(p.b, n, p.rank, share((p.rank + E::NR - 1) / E::NR, thread, threads),
                     shared.bt);
}

template <class E>
void shrink_dgrad(const DgradParams& p, const DgradShared<E>& shared, const DgradOwn<E>& own,
                  int thread, int threads) {
  const Span strips = share(shared.strips, thread, threads);
  const int64_t ld = round_up(p.rank, E::NV);
  for (int64_t i = strips.begin; i < strips.end; ++i) {
    const int64_t row = i * E::MR, rows = std::min<int64_t>(E::MR, p.m - row);
    lora_linear::multiply_strip<E>(shared.dy + row * shared.np, shared.bt, shared.np, p.rank, rows,
                                   own.shrink, ld);
    E::pack_a_f32(own.shrink, ld, rows, p.rank, p.scaling * p.keep_scale,
                  shared.ds + row * shared.rk);
  }
}

// Columns [k0, k0 + columns) of W as a packed right operand of dY W.
template <class E>
void pack_panel(const Weight& w, int64_t k0, int64_t columns, const DgradOwn<E>& own) {
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
void multiply_dgrad(const DgradParams& p, const DgradShared<E>& shared, DgradOwn<E>& own,
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
void dgrad(const DgradParams& p, int phase, int thread, int threads, void* shared_memory,
           void* own_memory) {
  const DgradShared<E> shared(p, shared_memory);
  DgradOwn<E> own(p, own_memory);
  if (phase == 0) return pack_dgrad<E>(p, shared, thread, threads);
  E::enter();
  if (phase == 1) {
    if (p.rank > 0) shrink_dgrad<E>(p, shared, own, thread, threads);
  } else {
    multiply_dgrad<E>(p, shared, own, thread, threads);
  }
  E::leave();
}

template <class E>
Job<DgradParams> dgrad_job() {
  return {3, [](const DgradParams& p) { return DgradShared<E>(p, nullptr).bytes; },
          [](const DgradParams& p) { return DgradOwn<E>(p, nullptr).bytes; }, dgrad<E>};
}

}  // namespace
}  // namespace lora_kernels::quant_linear
