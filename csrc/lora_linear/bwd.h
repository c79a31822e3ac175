// Backward, written once for every engine and compiled once per instruction set.
//
//   dS = scaling / P(keep) * dY B,   dX = dY W + (dS A) * D,   dA = dS^T (X * D),   dB = s dY^T S
//
// A thread owns a range of row strips (and of output columns). Per chunk of rows: dY is packed and
// dS comes from the packed strip while it is in L1; dB and dA take the rows of the chunk as their
// k; then dX = [dY | dS] [W ; A] for the whole group in one accumulator. dY is read from memory
// once, dX written once. dA and dB partials are fp32 and per thread; the caller adds them in thread
// order, so results are bitwise equal from run to run at a fixed grid. A given dS is packed as it is.
#pragma once

#include "masks.h"
#include "product.h"

namespace lora_kernels::lora_linear {
namespace {

template <class E>
struct BwdBuffers {
  int64_t strips;  // per chunk
  typename E::TA *dy[kMaxGroup], *ds[kMaxGroup], *left;
  typename E::T* ds_rows[kMaxGroup];
  typename E::TB* panel;
  float *shrink, *sums, *lora_tile, *extra[2];
  typename E::Tail tail;
  uint32_t* masks[kMaxGroup];

  BwdBuffers(const BwdParams& p, int64_t max_strips, Arena& arena) {
    using TA = typename E::TA;
    int64_t n_total = 0, widest = 0;
    for (int g = 0; g < p.members; ++g) {
      n_total += round_up(p.member[g].n, E::KR) + round_up(p.member[g].rank, E::KR);
      widest = std::max(widest, round_up(p.member[g].rank, E::NV));
    }
    strips = chunk_strips<E>(max_strips);
    const int64_t rows = strips * E::MR, rows_k = round_up(rows, E::KR);
    for (int g = 0; g < p.members; ++g) {
      const BwdMember& w = p.member[g];
      dy[g] = arena.take<TA>(rows * round_up(w.n, E::KR));
      ds[g] = arena.take<TA>(rows * round_up(w.rank, E::KR));
      ds_rows[g] = arena.take<typename E::T>(p.given_ds == nullptr ? rows * w.rank : 0);
    }
    left = arena.take<TA>(round_up(widest, E::MR) * rows_k);
    panel = arena.take<typename E::TB>(E::NR * rows_k);
    shrink = arena.take<float>(E::MR * widest);
    sums = arena.take<float>(panel_floats<E>(strips, n_total));
    for (float*& tile : tail.tiles) tile = arena.take<float>(E::MR * E::NR);
    const bool drops = p.dropout.threshold != 0;
    lora_tile = arena.take<float>(drops ? E::MR * E::NR : 0);
    for (float*& tile : extra) tile = arena.take<float>(drops ? E::MR * E::NR : 0);
    for (int g = 0; g < p.members; ++g) {
      masks[g] = arena.take<uint32_t>(drops ? rows * mask_words(p.k) : 0);
    }
  }
};

// out [rank_padded, ld] += L^T R over the `rows` rows of a chunk; L [rows, rank], R [rows, n].
// Columns [cols.begin, cols.end) in strips of NR.
template <class E>
void accumulate_outer(const typename E::T* l, int64_t ldl, const typename E::T* r, int64_t ldr,
                      int64_t rows, int64_t rank, int64_t n, Range cols, const uint32_t* masks,
                      int64_t ldmask, const BwdBuffers<E>& buf, float* out) {
  const int64_t rows_k = round_up(rows, E::KR), ld = round_up(n, E::NV);
  for (int64_t r0 = 0; r0 < rank; r0 += E::MR) {
    E::pack_a_t(l + r0, ldl, std::min<int64_t>(E::MR, rank - r0), rows, buf.left + r0 * rows_k);
  }
  for (int64_t j = cols.begin; j < cols.end; ++j) {
    const int64_t n0 = j * E::NR, width = strip_width<E>(n, n0);
    E::template pack_b_rows<typename E::T>(r + n0, ldr, rows, std::min<int64_t>(E::NR, n - n0),
                                           width, masks, n0, ldmask, buf.panel);
    for (int64_t r0 = 0; r0 < rank; r0 += E::MR) {
      const Segment<E> segment{buf.left + r0 * rows_k, buf.panel, rows_k};
      E::micro(&segment, 1, std::min<int64_t>(E::MR, rank - r0), width, out + r0 * ld + n0, ld,
               true);
    }
  }
}

// extra [MR, NR] = sum over members of (dS A) * keep, for one tile of dX.
template <class E>
void masked_update(const BwdParams& p, const BwdBuffers<E>& buf, int64_t strip, int64_t row,
                   int64_t rows, int64_t k0, float* extra) {
  const int64_t width = strip_width<E>(p.k, k0), words = mask_words(p.k);
  std::fill(extra, extra + E::MR * E::NR, 0.0f);
  for (int g = 0; g < p.members; ++g) {
    const BwdMember& w = p.member[g];
    if (w.rank == 0) continue;
    const int64_t rk = round_up(w.rank, E::KR);
    const Segment<E> lora{buf.ds[g] + strip * E::MR * rk,
                          static_cast<const typename E::TB*>(w.a_packed) + k0 * rk, rk};
    E::micro(&lora, 1, rows, width, buf.lora_tile, E::NR, false);
    E::add_masked(buf.lora_tile, rows, width, buf.masks[g] + row * words, words, k0, extra);
  }
}

template <class E>
void bwd(const BwdParams& p, Grid grid, int thread, void* workspace) {
  using T = typename E::T;
  using TA = typename E::TA;
  using TB = typename E::TB;
  E::enter();
  const int part_n = thread % grid.threads_n;
  const int64_t all_strips = (p.m + E::MR - 1) / E::MR;
  const Range own = share(all_strips, thread / grid.threads_n, grid.threads_m);
  const Range k_cols = share((p.k + E::NR - 1) / E::NR, part_n, grid.threads_n);
  const int64_t words = mask_words(p.k);
  const bool drops = p.dropout.threshold != 0;
  bool need_ds = p.dx != nullptr;  // a given one is packed for dX alone
  for (int g = 0; g < p.members && p.given_ds == nullptr; ++g) {
    need_ds = need_ds || p.member[g].da != nullptr;
  }
  Arena arena(workspace);
  BwdBuffers<E> buf(p, strips_per_thread<E>(p.m, grid), arena);
  for (int64_t c0 = own.begin; c0 < own.end; c0 += buf.strips) {
    const int64_t c1 = std::min(c0 + buf.strips, own.end);
    const int64_t row0 = c0 * E::MR, chunk_rows = std::min(c1 * E::MR, p.m) - row0;
    for (int g = 0; g < p.members && need_ds; ++g) {
      const BwdMember& w = p.member[g];
      const int64_t np = round_up(w.n, E::KR), rk = round_up(w.rank, E::KR);
      const int64_t ld = round_up(w.rank, E::NV);
      for (int64_t i = c0; i < c1; ++i) {
        const int64_t row = i * E::MR, rows = std::min<int64_t>(E::MR, p.m - row);
        TA* strip = buf.dy[g] + (i - c0) * E::MR * np;
        E::pack_a(static_cast<const T*>(w.dy) + row * w.lddy, w.lddy, rows, w.n, strip);
        if (p.given_ds != nullptr) {
          E::pack_a(static_cast<const T*>(p.given_ds) + row * p.ldds + w.s_column, p.ldds, rows,
                    w.rank, buf.ds[g] + (i - c0) * E::MR * rk);
          continue;
        }
        multiply_strip<E>(strip, static_cast<const TB*>(w.bt_packed), np, w.rank, rows, buf.shrink,
                          ld);
        const float factor = w.scaling * p.keep_scale;
        for (int64_t e = 0; e < rows * ld; ++e) buf.shrink[e] *= factor;
        E::store(buf.shrink, ld, rows, w.rank, nullptr, buf.ds_rows[g] + (row - row0) * w.rank,
                 w.rank);
        E::pack_a_f32(buf.shrink, ld, rows, w.rank, 1.0f, buf.ds[g] + (i - c0) * E::MR * rk);
      }
    }
    for (int g = 0; g < p.members && drops; ++g) {
      if (p.member[g].rank == 0) continue;
      make_masks(p.dropout, row0, chunk_rows, p.k, static_cast<uint32_t>(g), buf.masks[g]);
    }
    for (int g = 0; g < p.members; ++g) {
      const BwdMember& w = p.member[g];
      if (w.db != nullptr) {
        const Range cols = share((w.n + E::NR - 1) / E::NR, part_n, grid.threads_n);
        float* partial = w.db + (thread / grid.threads_n) * round_up(w.rank, E::MR) *
                                    round_up(w.n, E::NV);
        accumulate_outer<E>(static_cast<const T*>(p.s) + row0 * p.lds + w.s_column, p.lds,
                            static_cast<const T*>(w.dy) + row0 * w.lddy, w.lddy, chunk_rows,
                            w.rank, w.n, cols, nullptr, 0, buf, partial);
      }
      if (w.da != nullptr) {
        float* partial = w.da + (thread / grid.threads_n) * round_up(w.rank, E::MR) *
                                    round_up(p.k, E::NV);
        const T* ds = buf.ds_rows[g];
        int64_t ldds = w.rank;
        if (p.given_ds != nullptr) {
          ds = static_cast<const T*>(p.given_ds) + row0 * p.ldds + w.s_column;
          ldds = p.ldds;
        }
        accumulate_outer<E>(ds, ldds, static_cast<const T*>(p.x) + row0 * p.ldx, p.ldx, chunk_rows, w.rank, p.k, k_cols, drops ? buf.masks[g] : nullptr,
                            words, buf, partial);
      }
    }
    if (p.dx == nullptr) continue;
    Term<E> terms[2 * kMaxGroup];
    int count = 0;
    for (int g = 0; g < p.members; ++g) {
      const BwdMember& w = p.member[g];
      terms[count++] = {buf.dy[g], static_cast<const TB*>(w.w_packed), round_up(w.n, E::KR)};
    }
    for (int g = 0; g < p.members && !drops; ++g) {
      const BwdMember& w = p.member[g];
      terms[count++] = {buf.ds[g], static_cast<const TB*>(w.a_packed), round_up(w.rank, E::KR)};
    }
    const bool stream = streams<E>(p.dx, p.lddx, p.m, p.k);
    int parity = 0;
    multiply<E>(terms, count, c1 - c0, p.k, k_cols, buf.sums, buf.tail,
                [&](int64_t i, int64_t j) {
                  const int64_t row = (c0 + i) * E::MR, k0 = j * E::NR;
                  Output<E> out{static_cast<T*>(p.dx) + row * p.lddx + k0,
                                p.lddx,
                                std::min<int64_t>(E::MR, p.m - row),
                                std::min<int64_t>(E::NR, p.k - k0),
                                nullptr,
                                nullptr,
                                stream};
                  if (drops) {
                    parity ^= 1;
                    masked_update<E>(p, buf, i, row - row0, out.rows, k0, buf.extra[parity]);
                    out.extra = buf.extra[parity];
                  }
                  return out;
                });
  }
  E::leave();
}

}  // namespace
}  // namespace lora_kernels::lora_linear
