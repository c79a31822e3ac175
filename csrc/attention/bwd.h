// Backward of one task: a key head of a sequence and a chunk of keys.
//
// With S = Q K^T in blocks of rows x keys, the transposed sums dV^T += dO^T P and dK^T += Q^T dS take
// P and dS as right operands just as they come, row by row, and dQ += dS K takes dS as a left one.
#pragma once

#include "scores.h"

namespace lora_kernels::attention {
namespace {

constexpr int64_t kBwdGroup = 32;  // rows whose visible keys are cut together in the products

template <class E>
struct BwdBuffers {
  using P = typename E::P;
  int64_t d, dv, keys;  // padded
  int64_t depth, depth_v;  // of the sums over d
  P *k_columns, *k_rows, *v_columns;
  float *dk, *dv_sum;            // [keys / NR][d][NR]
  P *q, *dout, *q_t, *dout_t;    // of a block of rows
  float *scores, *dp, *dq;
  P *p_strips, *ds_strips, *ds_rows, *staged;

  BwdBuffers(const Problem& p, int64_t key_rows, Arena& arena)
      : d(round_up(p.d, E::NR)), dv(round_up(p.dv, E::NR)), keys(key_rows),
        depth(round_up(p.d, E::KR)), depth_v(round_up(p.dv, E::KR)) {
    k_columns = arena.take<P>(keys * d);
    k_rows = arena.take<P>(keys * d);
    v_columns = arena.take<P>(keys * dv);
    dk = arena.take<float>(keys * d);
    dv_sum = arena.take<float>(keys * dv);
    q = arena.take<P>(E::BR * d);
    dout = arena.take<P>(E::BR * dv);
    q_t = arena.take<P>(E::BR * d);
    dout_t = arena.take<P>(E::BR * dv);
    scores = arena.take<float>(E::BR * E::BC);
    dp = arena.take<float>(E::BR * E::BC);
    dq = arena.take<float>(E::BR * d);
    p_strips = arena.take<P>(E::BR * E::BC);
    ds_strips = arena.take<P>(E::BR * E::BC);
    ds_rows = arena.take<P>(E::BR * E::BC);
    staged = arena.take<P>(E::NR * std::max(d, dv));
  }
};

template <class E>
int64_t bytes_of_key(int64_t d, int64_t dv) {
  const int64_t wide = round_up(d, E::NR), value = round_up(dv, E::NR);
  return (2 * wide + value) * static_cast<int64_t>(sizeof(typename E::P)) + 4 * (wide + value);
}

// Keys of a part: of `parts` equal ones of `keys`, in whole blocks.
template <class E>
Range part_of(int64_t keys, int64_t part, int64_t parts) {
  const int64_t step = round_up((keys + parts - 1) / parts, E::BC);
  return {std::min(keys, part * step), std::min(keys, (part + 1) * step)};
}

template <class E>
void pack_keys(const BwdParams& p, int64_t b, int64_t group, Range keys, BwdBuffers<E>& w) {
  using T = typename E::T;
  const int64_t first = p.sequences[b].key + keys.begin;
  for (int64_t j = 0; j < w.keys; j += E::NR) {
    const int64_t rows =
        std::clamp<int64_t>(keys.end - keys.begin - j, 0, static_cast<int64_t>(E::NR));
    const int64_t at = rows == 0 ? first : first + j;
    stage<E>(row_of<T>(p.k, b, at, group), p.k.row, rows, p.d, E::NR, w.d, w.staged);
    pack_columns<E>(w.staged, w.d, w.k_columns + j * w.d);
    pack_rows<E>(w.staged, w.d, E::NR, j, w.keys * E::NR, w.k_rows);
    stage<E>(row_of<T>(p.v, b, at, group), p.v.row, rows, p.dv, E::NR, w.dv, w.staged);
    pack_columns<E>(w.staged, w.dv, w.v_columns + j * w.dv);
  }
  std::memset(w.dk, 0, sizeof(float) * w.keys * w.d);
  std::memset(w.dv_sum, 0, sizeof(float) * w.keys * w.dv);
}

// One row of a block: its visible columns, and what its weights and gradients are less of.
struct RowState {
  int64_t i;
  Range seen;
  float lse, delta;
  const float *scores, *dp;
  float* dmask;
};

// Weights (dropout in) and gradients of the scores of one row in the strip from column c on.
template <class E, bool kPlain>
inline void gradients(const BwdParams& p, const Head& head, const RowState& row, int64_t j0,
                      int64_t c, const Kept<E::BC>& kept, Vec weight[2], Vec ds[2]) {
  if (c + E::NR <= row.seen.begin || c >= row.seen.end) {
    weight[0] = weight[1] = ds[0] = ds[1] = Vec{};
    return;
  }
  const bool edge = c < row.seen.begin || c + E::NR > row.seen.end;
  for (int v = 0; v < 2; ++v) {
    const int64_t column = c + v * LK_LANES;
    Vec slope;
    const Vec z = biased<kPlain>(head, row.i, j0 + column, load(row.scores + column), &slope);
    Vec prob = weights_of<E>(z, row.lse);
    IVec there;
    if (edge) {
      there = lanes_between(row.seen.begin - column, row.seen.end - column);
      prob = select(there, prob);
    }
    Vec dp = load(row.dp + column);
    weight[v] = prob;
    if (!kPlain && head.dropout.threshold != 0) {
      const IVec keep = kept.lanes(column);
      weight[v] = select(keep, prob * head.keep_scale);
      dp = select(keep, dp * head.keep_scale);
    }
    ds[v] = prob * (dp - row.delta);
    if (edge) ds[v] = select(there, ds[v]);
    if constexpr (!kPlain) {
      if (row.dmask != nullptr) {
        for (int64_t l = 0; l < LK_LANES && column + l < row.seen.end; ++l) {
          row.dmask[(j0 + column + l) * p.dmask_key] += ds[v][l];
        }
      }
      ds[v] *= slope;
    }
  }
}

template <class E>
struct BwdBlock {  // rows [i0, i0 + rows) of a head against the keys of a pass
  Head head;
  int64_t group, i0, rows;
  Range keys;
  bool direct;  // dq is stored, not added to a slot
  float* slots;
};

template <class E, bool kPlain>
void score_gradients(const BwdParams& p, const BwdBlock<E>& k, int64_t j0, int64_t r0, int64_t r1,
                     int64_t first, int64_t last, BwdBuffers<E>& w) {
  const Head& head = k.head;
  const Sequence& span = head.span;
  const bool drops = !kPlain && head.dropout.threshold != 0;
  Kept<E::BC> kept[2];
  for (int64_t r = r0; r < round_up(r1, E::KR); r += 2) {
    RowState row[2];
    for (int n = 0; n < 2; ++n) {
      RowState& x = row[n];
      x = {k.i0 + r + n, {0, 0}, kInfinity, 0.0f, nullptr, nullptr, nullptr};
      if (r + n >= r1) continue;  // zero rows up to the step of k
      const Range seen = head.seen(x.i);
      x.seen = {std::max<int64_t>(0, seen.begin - j0),
                std::min({static_cast<int64_t>(E::BC), seen.end - j0, k.keys.end - j0})};
      const int64_t at = span.row + x.i;
      const float lse = p.lse.data[head.b * p.lse.batch + head.h * p.lse.head + at];
      x.lse = lse == -kInfinity ? kInfinity : lse;
      x.delta = p.delta.data[head.b * p.delta.batch + head.h * p.delta.head + at];
      x.scores = w.scores + (r + n) * E::BC;
      x.dp = w.dp + (r + n) * E::BC;
      if (p.dmask != nullptr) {
        x.dmask = p.dmask + head.b * p.dmask_batch + head.h * p.dmask_head + x.i * p.dmask_row;
      }
      if (drops) kept[n].draw(head, x.i, j0);
    }
    for (int64_t c = first; c < last; c += E::NR) {
      Vec weight[2][2], ds[2][2];
      gradients<E, kPlain>(p, head, row[0], j0, c, kept[0], weight[0], ds[0]);
      gradients<E, kPlain>(p, head, row[1], j0, c, kept[1], weight[1], ds[1]);
      E::store_b(w.p_strips + c * E::BR, r, weight[0], weight[1]);
      E::store_b(w.ds_strips + c * E::BR, r, ds[0], ds[1]);
      E::store_a(w.ds_rows + r * E::BC + c, ds[0]);
      E::store_a(w.ds_rows + (r + 1) * E::BC + c, ds[1]);
    }
  }
}

template <class E, bool kPlain>
void bwd_rows(const BwdParams& p, const BwdBlock<E>& k, BwdBuffers<E>& w) {
  using T = typename E::T;
  constexpr int64_t kGroups = E::BR / kBwdGroup;
  const Head& head = k.head;
  const int64_t row = head.span.row + k.i0, full = round_up(k.rows, LK_LANES);
  const int64_t steps = round_up(k.rows, E::KR);
  bool touched[kGroups] = {};
  const Range all = head.seen(k.i0, k.i0 + k.rows);
  const int64_t begin = std::max(all.begin, k.keys.begin), end = std::min(all.end, k.keys.end);
  if (begin < end) {
    const int64_t staged = std::max(full, steps);
    stage<E>(row_of<T>(p.q, head.b, row, head.h), p.q.row, k.rows, p.d, staged, w.d, w.q);
    stage<E>(row_of<T>(p.dout, head.b, row, head.h), p.dout.row, k.rows, p.dv, staged, w.dv,
             w.dout);
    transpose_block<E>(w.q, w.d, full, E::BR, w.q_t);
    transpose_block<E>(w.dout, w.dv, full, E::BR, w.dout_t);
    if (full < steps) {  // the step of k is two vectors
      transpose_block<E>(w.q + full * w.d, w.d, LK_LANES, E::BR, w.q_t + full);
      transpose_block<E>(w.dout + full * w.dv, w.dv, LK_LANES, E::BR, w.dout_t + full);
    }
  }
  for (int64_t j0 = begin / E::BC * E::BC; j0 < end; j0 += E::BC) {
    const int64_t at = j0 - k.keys.begin;  // of the packed keys
    int64_t first[kGroups] = {}, last[kGroups] = {};
    int64_t lowest = E::BC, highest = 0;
    for (int64_t g = 0; g * kBwdGroup < k.rows; ++g) {
      const int64_t r0 = g * kBwdGroup, r1 = std::min(k.rows, r0 + kBwdGroup);
      const Range seen = head.seen(k.i0 + r0, k.i0 + r1);
      first[g] = std::max<int64_t>(0, seen.begin - j0) / E::NR * E::NR;
      last[g] = round_up(
          std::min({static_cast<int64_t>(E::BC), seen.end - j0, k.keys.end - j0}), E::NR);
      if (last[g] <= first[g]) {
        first[g] = last[g] = 0;
        continue;
      }
      lowest = std::min(lowest, first[g]);
      highest = std::max(highest, last[g]);
      for (int64_t c = first[g]; c < last[g]; c += E::NR) {
        E::product(w.q + r0 * w.d, w.d, w.k_columns + (at + c) * w.d, r1 - r0,
                   w.depth, w.scores + r0 * E::BC + c, E::BC, false);
        E::product(w.dout + r0 * w.dv, w.dv, w.v_columns + (at + c) * w.dv, r1 - r0,
                   w.depth_v, w.dp + r0 * E::BC + c, E::BC, false);
      }
      score_gradients<E, kPlain>(p, k, j0, r0, r1, first[g], last[g], w);
      if (p.dq.data != nullptr) {
        for (int64_t c = 0; c < w.d; c += E::NR) {
          E::product(w.ds_rows + r0 * E::BC + first[g], E::BC,
                     w.k_rows + c * w.keys + (at + first[g]) * E::NR, r1 - r0,
                     last[g] - first[g], w.dq + r0 * w.d + c, w.d, touched[g]);
        }
      }
      touched[g] = true;
    }
    for (int64_t c = lowest; c < highest; c += E::NR) {
      int64_t g0 = 0, g1 = kGroups;
      while (g0 < kGroups && !(first[g0] <= c && c < last[g0])) ++g0;
      while (g1 > g0 && !(first[g1 - 1] <= c && c < last[g1 - 1])) --g1;
      const int64_t r0 = g0 * kBwdGroup, count = std::min(g1 * kBwdGroup, steps) - r0;
      if (count <= 0) continue;
      if (p.dv_out.data != nullptr) {
        E::product(w.dout_t + r0, E::BR, w.p_strips + c * E::BR + r0 * E::NR, p.dv, count,
                   w.dv_sum + (at + c) * w.dv, E::NR, true);
      }
      if (p.dk.data != nullptr) {
        E::product(w.q_t + r0, E::BR, w.ds_strips + c * E::BR + r0 * E::NR, p.d, count,
                   w.dk + (at + c) * w.d, E::NR, true);
      }
    }
  }
  if (p.dq.data == nullptr) return;
  for (int64_t r = 0; r < k.rows; ++r) {
    const float* sum = w.dq + r * w.d;
    const bool there = touched[r / kBwdGroup];
    if (k.direct) {
      T* out = row_to<T>(p.dq, head.b, row + r, head.h);
      if (there) {
        store_row(sum, p.d, p.scale, out);
      } else {
        for (int64_t c = 0; c < p.d; ++c) from_float(0.0f, out[c]);
      }
    } else if (there) {
      float* slot = k.slots + (head.h * p.all_rows + head.span.slot + k.i0 + r) * w.d;
      for (int64_t c = 0; c < w.d; c += LK_LANES) store_vec(slot + c, load(slot + c) + load(sum + c));
    }
  }
}

// Rows of the tensors from [strips][padded][NR] sums.
template <class E>
void store_keys(const Rows& out, int64_t b, int64_t first, int64_t keys, int64_t head,
                int64_t columns, int64_t padded, float factor, const float* sums) {
  using T = typename E::T;
  if (out.data == nullptr) return;
  for (int64_t j = 0; j < keys; j += LK_LANES) {
    const float* strip = sums + j / E::NR * padded * E::NR + j % E::NR;
    for (int64_t c = 0; c < columns; c += LK_LANES) {
      Vec v[LK_LANES];
      for (int l = 0; l < LK_LANES; ++l) v[l] = load(strip + (c + l) * E::NR);
      transpose_lanes(v);
      alignas(64) float row[LK_LANES];
      for (int64_t l = 0; l < std::min<int64_t>(LK_LANES, keys - j); ++l) {
        store_vec(row, v[l]);
        store_row(row, std::min<int64_t>(LK_LANES, columns - c), factor,
                  row_to<T>(out, b, first + j + l, head) + c);
      }
    }
  }
}

template <class E>
int64_t keys_of_pass(const BwdParams& p) {
  int64_t keys = 0;
  for (int64_t b = 0; b < p.batch; ++b) keys = std::max(keys, p.sequences[b].keys);
  keys = part_of<E>(keys, 0, p.chunks).end;
  return round_up(part_of<E>(keys, 0, p.passes).end, E::NR);
}

template <class E>
int64_t bwd_workspace(const BwdParams& p) {
  Arena arena(nullptr);
  BwdBuffers<E>(p, keys_of_pass<E>(p), arena);
  return arena.used();
}

template <class E>
void bwd_head(const BwdParams& p, int64_t b, int64_t group, int64_t chunk, BwdBuffers<E>& w) {
  const Sequence& span = p.sequences[b];
  const Range own = part_of<E>(span.keys, chunk, p.chunks);
  const bool plain = is_plain(p) && p.dmask == nullptr;
  const int64_t heads = p.heads / p.groups;
  const bool direct = p.dq_slots == nullptr;
  float* slots = direct ? nullptr : p.dq_slots + chunk * p.slot_stride;
  for (int64_t pass = 0; pass < p.passes; ++pass) {
    const Range part = part_of<E>(own.end - own.begin, pass, p.passes);
    const Range keys{own.begin + part.begin, own.begin + part.end};
    if (keys.empty() && !direct) continue;
    pack_keys<E>(p, b, group, keys, w);
    for (int64_t h = group * heads; h < (group + 1) * heads; ++h) {
      for (int64_t i = 0; i < span.rows; i += E::BR) {
        const BwdBlock<E> k{Head(p, b, h), group, i, std::min<int64_t>(E::BR, span.rows - i),
                            keys, direct, slots};
        plain ? bwd_rows<E, true>(p, k, w) : bwd_rows<E, false>(p, k, w);
      }
    }
    const int64_t first = span.key + keys.begin, count = keys.end - keys.begin;
    store_keys<E>(p.dk, b, first, count, group, p.d, w.d, p.scale, w.dk);
    store_keys<E>(p.dv_out, b, first, count, group, p.dv, w.dv, 1.0f, w.dv_sum);
  }
}

template <class E>
void bwd(const BwdParams& p, int64_t task, void* workspace) {
  Arena arena(workspace);
  BwdBuffers<E> w(p, keys_of_pass<E>(p), arena);
  const int64_t chunk = task % p.chunks, rest = task / p.chunks;
  const int64_t groups = p.join_heads ? 1 : p.groups;
  const Range group = p.join_heads ? Range{0, p.groups} : Range{rest % groups, rest % groups + 1};
  const Range batch =
      p.join_batch ? Range{0, p.batch} : Range{rest / groups, rest / groups + 1};
  E::enter();
  for (int64_t b = batch.begin; b < batch.end; ++b) {
    for (int64_t g = group.begin; g < group.end; ++g) bwd_head<E>(p, b, g, chunk, w);
  }
  E::leave();
}

// delta = sum_d dO O - dlse of one row of a head.
template <class E>
void row_delta(const BwdParams& p, int64_t b, int64_t row, int64_t h) {
  using T = typename E::T;
  const T* dout = row_of<T>(p.dout, b, row, h);
  const T* out = row_of<T>(p.out, b, row, h);
  Vec sum{};
  int64_t c = 0;
  for (; c + LK_LANES <= p.dv; c += LK_LANES) sum += load(dout + c) * load(out + c);
  float delta = sum_lanes(sum);
  for (; c < p.dv; ++c) delta += to_float(dout[c]) * to_float(out[c]);
  if (p.dlse.data != nullptr) {
    delta -= p.dlse.data[b * p.dlse.batch + h * p.dlse.head + row];
  }
  p.delta.data[b * p.delta.batch + h * p.delta.head + row] = delta;
}

// dq of one row of a head, rows counted in its sequence, from its slots.
template <class E>
void sum_slots(const BwdParams& p, int64_t b, int64_t i, int64_t h) {
  using T = typename E::T;
  const int64_t d = round_up(p.d, E::NR);
  const float* slot = p.dq_slots + (h * p.all_rows + p.sequences[b].slot + i) * d;
  T* out = row_to<T>(p.dq, b, p.sequences[b].row + i, h);
  for (int64_t c = 0; c < p.d; ++c) {
    float sum = 0.0f;
    for (int64_t n = 0; n < p.chunks; ++n) sum += slot[n * p.slot_stride + c];
    from_float(sum * p.scale, out[c]);
  }
}

}  // namespace
}  // namespace lora_kernels::attention
