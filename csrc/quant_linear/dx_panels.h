// dX = dY W + (dS A) * D of the backward: a panel of columns of W is decoded and packed, and all rows
// of dY pass it; the low-rank product joins in the accumulator. tile_dx.h has the pass on tiles.
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
constexpr int64_t kRowsAhead = 16;   // fetched

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

// One thread's workspace for dX, and the pass over its columns.
template <class E>
class DxPass {
 public:
  DxPass() = default;
  DxPass(const BwdParams& p, lora_linear::Arena& arena) {
    const int64_t np = round_up(p.weight->n, E::KR), rk = round_up(p.rank, E::KR);
    panel_strips = std::min<int64_t>(E::COLUMNS / E::NR, (p.weight->k + E::NR - 1) / E::NR);
    chunk = lora_linear::chunk_strips<E>((p.m + E::MR - 1) / E::MR);
    rows = arena.take<typename E::T>(kWeightRows * panel_strips * E::NR);
    panel = arena.take<typename E::TB>(p.dx != nullptr ? np * panel_strips * E::NR : 0);
    sums = arena.take<float>(lora_linear::panel_floats<E>(chunk, np + rk));
    for (float*& tile : tail.tiles) tile = arena.take<float>(E::MR * E::NR);
    const bool drops = p.rank > 0 && p.dropout.threshold != 0;
    lora_tile = arena.take<float>(drops ? E::MR * E::NR : 0);
    for (float*& tile : extras) tile = arena.take<float>(drops ? E::MR * E::NR : 0);
  }
  void run(const BwdParams& p, const BwdShared<E>& shared, int thread, int threads);

 private:
  void pack_panel(const Weight& w, int64_t k0, int64_t columns);

  int64_t panel_strips, chunk;
  typename E::T* rows;
  typename E::TB* panel;
  float *sums, *lora_tile, *extras[2];
  typename E::Tail tail;
};

// Asks for the codes of columns [k0, k0 + columns) of row n: rows of a panel are pages apart, which no
// hardware prefetcher follows.
inline void fetch_codes(const Weight& w, int64_t n, int64_t k0, int64_t columns) {
  if (n >= w.n) return;
  const bool nibbles = w.layout == Layout::kFlat || w.layout == Layout::kInt4;
  const int64_t first = w.layout == Layout::kInt4 ? n * w.row_bytes : (nibbles ? n * w.k / 2 : n * w.k);
  const char* at = reinterpret_cast<const char*>(w.codes + first + (nibbles ? k0 / 2 : k0));
  for (int64_t i = 0; i < (nibbles ? columns / 2 : columns); i += 64) __builtin_prefetch(at + i);
}

// Columns [k0, k0 + columns) of W as a packed right operand of dY W.
template <class E>
void DxPass<E>::pack_panel(const Weight& w, int64_t k0, int64_t columns) {
  using T = typename E::T;
  const int64_t np = round_up(w.n, E::KR), ld = panel_strips * E::NR;
  for (int64_t n0 = 0; n0 < w.n; n0 += kWeightRows) {
    const int64_t count = std::min(kWeightRows, w.n - n0);
    for (int64_t i = 0; i < count; ++i) {
      fetch_codes(w, n0 + i + kRowsAhead, k0, columns);
      decode(w, n0 + i, k0, columns, rows + i * ld);
    }
    for (int64_t c0 = 0; c0 < columns; c0 += E::NR) {
      const int64_t width = strip_width<E>(columns, c0);
      E::template pack_b_rows<T>(rows + c0, ld, count, std::min<int64_t>(E::NR, columns - c0),
                                 width, nullptr, 0, 0, panel + c0 * np + n0 * width);
    }
  }
}

template <class E>
void DxPass<E>::run(const BwdParams& p, const BwdShared<E>& shared, int thread, int threads) {
  using T = typename E::T;
  using TB = typename E::TB;
  const int64_t k = p.weight->k, words = mask_words(k);
  const bool drops = p.rank > 0 && p.dropout.threshold != 0;
  const bool stream = lora_linear::streams<E>(p.dx, p.lddx, p.m, k);
  const Span strips = share((k + E::NR - 1) / E::NR, thread, threads);
  int parity = 0;
  for (int64_t j0 = strips.begin; j0 < strips.end; j0 += panel_strips) {
    const int64_t j1 = std::min(j0 + panel_strips, strips.end), k0 = j0 * E::NR;
    const int64_t columns = std::min(j1 * E::NR, k) - k0;
    pack_panel(*p.weight, k0, columns);
    for (int64_t i0 = 0; i0 < shared.strips; i0 += chunk) {
      const int64_t i1 = std::min(i0 + chunk, shared.strips);
      const Term<E> terms[2] = {{shared.dy + i0 * E::MR * shared.np, panel, shared.np},
                                {shared.ds + i0 * E::MR * shared.rk,
                                 static_cast<const TB*>(shared.a) + k0 * shared.rk, shared.rk}};
      lora_linear::multiply<E>(
          terms, p.rank > 0 && !drops ? 2 : 1, i1 - i0, columns, {0, j1 - j0}, sums, tail,
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
              float* extra = extras[parity ^= 1];
              const int64_t width = strip_width<E>(k, column);
              std::fill(extra, extra + E::MR * E::NR, 0.0f);
              const Segment<E> lora{shared.ds + row * shared.rk, shared.a + column * shared.rk,
                                    shared.rk};
              E::micro(&lora, 1, out.rows, width, lora_tile, E::NR, false);
              E::add_masked(lora_tile, out.rows, width, shared.masks + row * words, words,
                            column, extra);
              out.extra = extra;
            }
            return out;
          });
    }
  }
}

}  // namespace
}  // namespace lora_kernels::quant_linear
