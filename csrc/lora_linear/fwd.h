// Forward, written once for every engine and compiled once per instruction set.
//
//   Y = X W^T + bias + scaling * S B^T,   S = drop(X) A^T
//
// A thread owns a range of row strips (and of columns). Per chunk of rows: X is packed, S comes
// from the packed strip while it is in L1, then Y = [X | s S] [W | B]^T in one accumulator. X is
// read once, S and Y are written once. The update is that of S as it is stored, so a given S takes
// the place of its product without changing a bit of Y. A member of rank 0 is a layer without an adapter.
#pragma once

#include "masks.h"
#include "product.h"

namespace lora_kernels::lora_linear {
namespace {

template <class E>
struct FwdBuffers {
  int64_t strips;  // per chunk
  typename E::TA *x, *dropped, *s[kMaxGroup];
  typename E::T* s_rows;  // of one strip and member, where another thread writes S
  float *shrink, *sums;
  typename E::Tail tail;
  uint32_t* masks;  // of one strip and member

  FwdBuffers(const FwdParams& p, int64_t max_strips, Arena& arena) {
    const int64_t kp = round_up(p.k, E::KR);
    strips = chunk_strips<E>(max_strips);
    x = arena.take<typename E::TA>(strips * E::MR * kp);
    int64_t widest = 0;
    for (int g = 0; g < p.members; ++g) {
      s[g] = arena.take<typename E::TA>(strips * E::MR * round_up(p.member[g].rank, E::KR));
      widest = std::max(widest, round_up(p.member[g].rank, E::NV));
    }
    s_rows = arena.take<typename E::T>(E::MR * widest);
    shrink = arena.take<float>(E::MR * widest);
    sums = arena.take<float>(panel_floats<E>(strips, kp + round_up(widest, E::KR)));
    for (float*& tile : tail.tiles) tile = arena.take<float>(E::MR * E::NR);
    const bool drops = p.dropout.threshold != 0;
    dropped = arena.take<typename E::TA>(drops ? E::MR * kp : 0);
    masks = arena.take<uint32_t>(drops ? E::MR * mask_words(p.k) : 0);
  }
};

template <class E>
void fwd(const FwdParams& p, Grid grid, int thread, void* workspace) {
  using T = typename E::T;
  using TA = typename E::TA;
  using TB = typename E::TB;
  E::enter();
  const int64_t kp = round_up(p.k, E::KR);
  const int part_n = thread % grid.threads_n;
  const int64_t all_strips = (p.m + E::MR - 1) / E::MR;
  const Range own = share(all_strips, thread / grid.threads_n, grid.threads_m);
  Arena arena(workspace);
  FwdBuffers<E> buf(p, strips_per_thread<E>(p.m, grid), arena);
  for (int64_t c0 = own.begin; c0 < own.end; c0 += buf.strips) {
    const int64_t c1 = std::min(c0 + buf.strips, own.end);
    for (int64_t i = c0; i < c1; ++i) {
      const int64_t row = i * E::MR, rows = std::min<int64_t>(E::MR, p.m - row);
      TA* strip = buf.x + (i - c0) * E::MR * kp;
      E::pack_a(static_cast<const T*>(p.x) + row * p.ldx, p.ldx, rows, p.k, strip);
      for (int g = 0; g < p.members; ++g) {
        const FwdMember& w = p.member[g];
        TA* s_strip = buf.s[g] + (i - c0) * E::MR * round_up(w.rank, E::KR);
        if (p.given_s != nullptr) {
          E::pack_a_scaled(static_cast<const T*>(p.given_s) + row * p.lds + w.s_column, p.lds, rows,
                           w.rank, w.scaling, s_strip);
          continue;
        }
        const TA* input = strip;
        if (p.dropout.threshold != 0 && w.rank != 0) {
          make_masks(p.dropout, row, rows, p.k, static_cast<uint32_t>(g), buf.masks);
          E::mask_a(strip, rows, p.k, buf.masks, mask_words(p.k), buf.dropped);
          input = buf.dropped;
        }
        const int64_t ld = round_up(w.rank, E::NV);
        multiply_strip<E>(input, static_cast<const TB*>(w.a_packed), kp, w.rank, rows, buf.shrink,
                          ld);
        if (p.keep_scale != 1.0f) {
          for (int64_t e = 0; e < rows * ld; ++e) buf.shrink[e] *= p.keep_scale;
        }
        T* s = part_n == 0 ? static_cast<T*>(p.s) + row * p.lds + w.s_column : buf.s_rows;
        const int64_t lds = part_n == 0 ? p.lds : ld;
        E::store(buf.shrink, ld, rows, w.rank, nullptr, s, lds);
        E::pack_a_scaled(s, lds, rows, w.rank, w.scaling, s_strip);
      }
    }
    for (int g = 0; g < p.members; ++g) {
      const FwdMember& w = p.member[g];
      const bool stream = streams<E>(w.y, w.ldy, p.m, w.n);
      const Term<E> terms[2] = {
          {buf.x, static_cast<const TB*>(w.w_packed), kp},
          {buf.s[g], static_cast<const TB*>(w.b_packed), round_up(w.rank, E::KR)}};
      multiply<E>(terms, 2, c1 - c0, w.n,
                  share((w.n + E::NR - 1) / E::NR, part_n, grid.threads_n), buf.sums, buf.tail,
                  [&](int64_t i, int64_t j) {
                    const int64_t row = (c0 + i) * E::MR, n0 = j * E::NR;
                    return Output<E>{static_cast<T*>(w.y) + row * w.ldy + n0,
                                     w.ldy,
                                     std::min<int64_t>(E::MR, p.m - row),
                                     std::min<int64_t>(E::NR, w.n - n0),
                                     w.bias ? w.bias + n0 : nullptr,
                                     nullptr,
                                     stream};
                  });
    }
  }
  E::leave();
}

}  // namespace
}  // namespace lora_kernels::lora_linear
