// Forward of one task: a key head of a sequence and a chunk of rows.
#pragma once

#include "scores.h"

namespace lora_kernels::attention {
namespace {

constexpr int64_t kGroupRows = 32;  // rows whose visible keys are cut together in the products

// The rows of a chunk, and the keys that any of them sees, from a whole block on.
struct FwdTask {
  int64_t b, group, row0, row1, key0, key1, key_rows;  // key_rows: packed, padded
};

template <class E>
FwdTask fwd_task(const FwdParams& p, int64_t task) {
  FwdTask t{};
  const int64_t chunk = task % p.chunks;
  t.group = task / p.chunks % p.groups;
  t.b = task / p.chunks / p.groups;
  const Sequence& span = p.sequences[t.b];
  const int64_t step = round_up((span.rows + p.chunks - 1) / p.chunks, E::BR);
  t.row0 = std::min(span.rows, chunk * step);
  t.row1 = std::min(span.rows, t.row0 + step);
  if (t.row0 < t.row1) {
    const Range seen = Head(p, t.b, 0).seen(t.row0, t.row1);
    t.key0 = seen.begin / E::BC * E::BC;
    t.key1 = seen.empty() ? t.key0 : seen.end;
  }
  t.key_rows = round_up(t.key1 - t.key0, E::NR);
  return t;
}

template <class E>
struct FwdBuffers {
  using P = typename E::P;
  int64_t d, dv, depth;  // padded; depth: of the sums over d
  P *k, *v, *q, *weights, *staged;
  float *scores, *out, *top, *total;

  FwdBuffers(const Problem& p, int64_t key_rows, Arena& arena)
      : d(round_up(p.d, E::NR)), dv(round_up(p.dv, E::NR)), depth(round_up(p.d, E::KR)) {
    k = arena.take<P>(key_rows * d);
    v = arena.take<P>(key_rows * dv);
    q = arena.take<P>(E::BR * d);
    scores = arena.take<float>(E::BR * E::BC);
    weights = std::is_same_v<P, float> ? reinterpret_cast<P*>(scores)
                                       : arena.take<P>(E::BR * E::BC);
    staged = arena.take<P>(E::NR * std::max(d, dv));
    out = arena.take<float>(E::BR * dv);
    top = arena.take<float>(E::BR);
    total = arena.take<float>(E::BR);
  }
};

template <class E>
void pack_keys(const FwdParams& p, const FwdTask& t, FwdBuffers<E>& w) {
  using T = typename E::T;
  const Sequence& span = p.sequences[t.b];
  for (int64_t j = 0; j < t.key_rows; j += E::NR) {
    const int64_t at = span.key + t.key0 + j, rows = std::min<int64_t>(E::NR, t.key1 - t.key0 - j);
    stage<E>(row_of<T>(p.k, t.b, at, t.group), p.k.row, rows, p.d, E::NR, w.d, w.staged);
    pack_columns<E>(w.staged, w.d, w.k + j * w.d);
    stage<E>(row_of<T>(p.v, t.b, at, t.group), p.v.row, rows, p.dv, E::NR, w.dv, w.staged);
    pack_rows<E>(w.staged, w.dv, E::NR, j, t.key_rows * E::NR, w.v);
  }
}

// Scores of row i in columns [first, last) of a block become weights e^(z - max), those outside of
// `seen` (columns too) zero. Updates the row's maximum and sum; returns what earlier sums fade by.
template <class E, bool kPlain>
float softmax_row(const Head& head, int64_t i, int64_t j0, Range seen, int64_t first, int64_t last,
                  float* scores, typename E::P* weights, float& top, float& total) {
  constexpr int NR = E::NR;
  const Vec zeros[2] = {};
  if (seen.empty()) {
    for (int64_t c = first; c < last; c += NR) E::store_a(weights + c, zeros);
    return 1.0f;
  }
  const int64_t c0 = seen.begin / NR * NR, c1 = round_up(seen.end, NR);
  Vec highest[2] = {broadcast(-kInfinity), broadcast(-kInfinity)};
  for (int64_t c = c0; c < c1; c += NR) {
    const bool edge = c < seen.begin || c + NR > seen.end;
    for (int v = 0; v < 2; ++v) {
      const int64_t column = c + v * LK_LANES;
      Vec z = biased<kPlain>(head, i, j0 + column, load(scores + column));
      if (edge) {
        z = choose(lanes_between(seen.begin - column, seen.end - column), z,
                   broadcast(-kInfinity));
      }
      if constexpr (!kPlain) store_vec(scores + column, z);
      highest[v] = maximum(z, highest[v]);
    }
  }
  const float before = top, now = std::max(before, max_lanes(maximum(highest[0], highest[1])));
  const float base = now == -kInfinity ? 0.0f : now;
  const float factor = kPlain ? head.scale : 1.0f;
  Kept<E::BC> kept;
  const bool drops = !kPlain && head.dropout.threshold != 0;
  if (drops) kept.draw(head, i, j0);
  for (int64_t c = first; c < c0; c += NR) E::store_a(weights + c, zeros);
  Vec sum[2] = {};
  for (int64_t c = c0; c < c1; c += NR) {
    const bool edge = c < seen.begin || c + NR > seen.end;
    Vec e[2];
    for (int v = 0; v < 2; ++v) {
      const int64_t column = c + v * LK_LANES;
      e[v] = weights_of<E>(load(scores + column) * factor, base);
      if (edge) e[v] = select(lanes_between(seen.begin - column, seen.end - column), e[v]);
      sum[v] += e[v];
      if (drops) e[v] = select(kept.lanes(column), e[v]);
    }
    E::store_a(weights + c, e);
  }
  for (int64_t c = c1; c < last; c += NR) E::store_a(weights + c, zeros);
  const float fade = before == now ? 1.0f : std::exp(before - base);
  top = now;
  total = total * fade + sum_lanes(sum[0] + sum[1]);
  return fade;
}

template <class E, bool kPlain>
void fwd_rows(const FwdParams& p, const FwdTask& t, const Head& head, int64_t i0, int64_t i1,
              FwdBuffers<E>& w) {
  using T = typename E::T;
  const Sequence& span = head.span;
  const int64_t rows = i1 - i0;
  stage<E>(row_of<T>(p.q, t.b, span.row + i0, head.h), p.q.row, rows, p.d, rows, w.d, w.q);
  for (int64_t r = 0; r < rows; ++r) {
    w.top[r] = p.sinks != nullptr ? p.sinks[head.h] : -kInfinity;
    w.total[r] = w.top[r] == -kInfinity ? 0.0f : 1.0f;
  }
  bool touched[E::BR / kGroupRows] = {};
  const Range all = head.seen(i0, i1);
  for (int64_t j0 = all.begin / E::BC * E::BC; j0 < all.end; j0 += E::BC) {
    for (int64_t g = 0; g * kGroupRows < rows; ++g) {
      const int64_t r0 = g * kGroupRows, r1 = std::min(rows, r0 + kGroupRows);
      const Range seen = head.seen(i0 + r0, i0 + r1);
      const int64_t first = std::max<int64_t>(0, seen.begin - j0) / E::NR * E::NR;
      const int64_t last = round_up(std::min<int64_t>(E::BC, seen.end - j0), E::NR);
      if (last <= first) continue;
      float* scores = w.scores + r0 * E::BC;
      typename E::P* weights = w.weights + r0 * E::BC;
      float* out = w.out + r0 * w.dv;
      for (int64_t c = first; c < last; c += E::NR) {
        E::product(w.q + r0 * w.d, w.d, w.k + (j0 - t.key0 + c) * w.d, r1 - r0, w.depth, scores + c,
                   E::BC, false);
      }
      for (int64_t r = r0; r < r1; ++r) {
        const Range row = head.seen(i0 + r);
        const Range columns{std::max<int64_t>(0, row.begin - j0),
                            std::min<int64_t>(E::BC, row.end - j0)};
        const float fade =
            softmax_row<E, kPlain>(head, i0 + r, j0, columns, first, last, w.scores + r * E::BC,
                                   w.weights + r * E::BC, w.top[r], w.total[r]);
        if (fade != 1.0f && touched[g]) {
          float* o = w.out + r * w.dv;
          for (int64_t c = 0; c < w.dv; c += LK_LANES) store_vec(o + c, load(o + c) * fade);
        }
      }
      const int64_t strip = t.key_rows * E::NR;
      for (int64_t c = 0; c < w.dv; c += E::NR) {
        E::product(weights + first, E::BC,
                   w.v + c / E::NR * strip + (j0 - t.key0 + first) * E::NR, r1 - r0, last - first,
                   out + c, w.dv, touched[g]);
      }
      touched[g] = true;
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    T* out = row_to<T>(p.out, t.b, span.row + i0 + r, head.h);
    if (!touched[r / kGroupRows] || w.total[r] == 0.0f) {
      for (int64_t c = 0; c < p.dv; ++c) from_float(0.0f, out[c]);
    } else {
      store_row(w.out + r * w.dv, p.dv, head.keep_scale / w.total[r], out);
    }
    p.lse.data[t.b * p.lse.batch + head.h * p.lse.head + span.row + i0 + r] =
        w.total[r] == 0.0f ? -kInfinity : w.top[r] + std::log(w.total[r]);
  }
}

template <class E>
int64_t fwd_workspace(const FwdParams& p) {
  int64_t key_rows = 0;
  for (int64_t task = 0; task < p.batch * p.groups * p.chunks; ++task) {
    if (task / p.chunks % p.groups == 0) {
      key_rows = std::max(key_rows, fwd_task<E>(p, task).key_rows);
    }
  }
  Arena arena(nullptr);
  FwdBuffers<E>(p, key_rows, arena);
  return arena.used();
}

template <class E>
void fwd(const FwdParams& p, int64_t task, void* workspace) {
  const FwdTask t = fwd_task<E>(p, task);
  if (t.row0 == t.row1) return;
  Arena arena(workspace);
  FwdBuffers<E> w(p, t.key_rows, arena);
  E::enter();
  pack_keys<E>(p, t, w);
  const bool plain = is_plain(p);
  const int64_t heads = p.heads / p.groups;
  for (int64_t h = t.group * heads; h < (t.group + 1) * heads; ++h) {
    const Head head(p, t.b, h);
    for (int64_t i = t.row0; i < t.row1; i += E::BR) {
      const int64_t end = std::min<int64_t>(t.row1, i + E::BR);
      plain ? fwd_rows<E, true>(p, t, head, i, end, w) : fwd_rows<E, false>(p, t, head, i, end, w);
    }
  }
  E::leave();
}

}  // namespace
}  // namespace lora_kernels::attention
