// The kernels of decode.h at LK_LANES lanes, for one element type each.
#pragma once

#include "decode.h"
#include "scores.h"

namespace lora_kernels::attention {
namespace {

constexpr int64_t kBlock = 64;  // keys whose scores are made before their values are read
constexpr int kRows = 4;        // rows that share a load of a key or a value
constexpr int kKeys = 4;        // keys that share a load of a row
constexpr int kStrip = 4;       // vectors of a row's sums that stay in registers

struct DecodeWeights {
  static constexpr int kExpDegree = 6;
};

// The first n < LANES elements; nothing past them is read.
template <class T>
inline Vec load_first(const T* p, int64_t n) {
  T whole[LK_LANES] = {};
  std::memcpy(whole, p, n * sizeof(T));
  return load(whole);
}

// Lane l: the sum of the lanes of v[l]. Each round joins v[i] and v[i + n]; with the index of a
// vector's origin entering at the lowest bit of the lane, the last round leaves them in order.
inline Vec sums_of(Vec v[LK_LANES]) {
  IVec low, high;
  for (int l = 0; l < LK_LANES; ++l) {
    low[l] = l / 2 + (l % 2) * LK_LANES;
    high[l] = low[l] + LK_LANES / 2;
  }
#pragma GCC unroll 4
  for (int n = LK_LANES / 2; n > 0; n /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      v[i] = __builtin_shuffle(v[i], v[i + n], low) + __builtin_shuffle(v[i], v[i + n], high);
    }
  }
  return v[0];
}

struct DecodeBuffers {
  int64_t d, rows;  // d: padded to whole vectors; rows: that share a key head
  float* q;         // [groups of a task][rows][d]
  float* scores;    // [kRows][kBlock]
  float* lanes;     // [kRows][kBlock][LANES]: a key's sums before the lanes are joined

  DecodeBuffers(const DecodeParams& p, int64_t groups, Arena& arena)
      : d(round_up(p.d, LK_LANES)), rows(p.sequences[0].rows * (p.heads / p.groups)) {
    q = arena.take<float>(groups * rows * d);
    scores = arena.take<float>(kRows * kBlock);
    lanes = arena.take<float>(kRows * kBlock * LK_LANES);
  }
};

// Where keys j0.. of a sequence lie, from head `group` on; places past the last key, `end` - 1,
// repeat it.
template <class T>
struct KeyRows {
  const T* k[kBlock];
  const T* v[kBlock];

  void find(const DecodeParams& p, int64_t b, int64_t group, int64_t j0, int64_t end) {
    for (int64_t i = 0; i < kBlock; ++i) {
      int64_t j = std::min(j0 + i, end - 1), owner = b;
      if (p.table != nullptr) {
        owner = p.table[b * p.table_row + j / p.page];
        j %= p.page;
      }
      k[i] = row_of<T>(p.k, owner, j, group);
      v[i] = row_of<T>(p.v, owner, j, group);
    }
  }
  void next_head(const DecodeParams& p) {
    for (int64_t i = 0; i < kBlock; ++i) {
      k[i] += p.k.head;
      v[i] += p.v.head;
    }
  }
};

// Rows of the next block on their way to the cache, some lines at each step: where rows do not follow
// one another, the machine does not foresee the next one.
template <class T>
struct Fetch {
  const T* const* rows = nullptr;
  int64_t count = 0, bytes = 0, lines = 0;  // lines: of a step
  int64_t row = 0, at = 0;

  // All `columns` of kBlock rows within `steps` steps.
  void start(const T* const* from, int64_t columns, int64_t steps) {
    rows = from;
    count = kBlock;
    row = at = 0;
    bytes = columns * static_cast<int64_t>(sizeof(T));
    lines = (kBlock * ((bytes + 63) / 64) + steps - 1) / steps;
  }
  void step() {
    for (int64_t n = 0; n < lines && row < count; ++n) {
      __builtin_prefetch(reinterpret_cast<const char*>(rows[row]) + at, 0, 3);
      at += 64;
      if (at >= bytes) at = 0, ++row;
    }
  }
};

template <class T>
struct NextBlock {
  Fetch<T> keys, values;
};

// lanes [R][keys of the block][LANES] of R rows of q against keys [first, last).
template <class T, int R>
void dot_rows(const KeyRows<T>& at, int64_t first, int64_t last, const float* q, int64_t padded,
              int64_t d, Fetch<T>& fetch, float* lanes) {
  for (int64_t j = first; j < last; j += kKeys) {
    fetch.step();
    Vec sum[R][kKeys] = {};
    int64_t c = 0;
    for (; c + LK_LANES <= d; c += LK_LANES) {
#pragma GCC unroll 4
      for (int n = 0; n < kKeys; ++n) {
        const Vec k = load(at.k[j + n] + c);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[r][n] += load(q + r * padded + c) * k;
      }
    }
    if (c < d) {
      for (int n = 0; n < kKeys; ++n) {
        const Vec k = load_first(at.k[j + n] + c, d - c);
        for (int r = 0; r < R; ++r) sum[r][n] += load(q + r * padded + c) * k;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < kKeys; ++n) {
        store_vec(lanes + (r * kBlock + j + n) * LK_LANES, sum[r][n]);
      }
    }
  }
}

// Scores of a row in columns [0, kBlock) become weights, zero where it does not see the key.
// Returns what earlier sums fade by.
template <class E, bool kPlain>
float decode_softmax(const Head& head, int64_t i, int64_t j0, Range seen, float* scores, float& top,
                     float& total) {
  Vec highest = broadcast(-kInfinity);
  for (int64_t c = 0; c < kBlock; c += LK_LANES) {
    const IVec there = lanes_between(seen.begin - c, seen.end - c);
    const Vec z = choose(there, biased<kPlain>(head, i, j0 + c, load(scores + c)),
                         broadcast(-kInfinity));
    store_vec(scores + c, z);
    highest = maximum(z, highest);
  }
  const float before = top, now = std::max(before, max_lanes(highest));
  const float base = now == -kInfinity ? 0.0f : now;
  Vec sum{};
  for (int64_t c = 0; c < kBlock; c += LK_LANES) {
    const IVec there = lanes_between(seen.begin - c, seen.end - c);
    const Vec e = select(there, weights_of<E>(load(scores + c), base));
    store_vec(scores + c, e);
    sum += e;
  }
  const float fade = before == now ? 1.0f : std::exp(before - base);
  top = now;
  total = total * fade + sum_lanes(sum);
  return fade;
}

// scores [kBlock] of one row of q against keys [first, last), multiples of LANES: with one row the
// sums of LANES keys fit the registers.
template <class T>
void dot_row(const KeyRows<T>& at, int64_t first, int64_t last, const float* q, int64_t d,
             Fetch<T>& fetch, float* scores) {
  for (int64_t j = first; j < last; j += LK_LANES) {
    for (int n = 0; n < LK_LANES / kKeys; ++n) fetch.step();
    Vec sum[LK_LANES];
    const T* const* rows = at.k + j;
#pragma GCC unroll 16
    for (int n = 0; n < LK_LANES; ++n) sum[n] = Vec{};
    int64_t c = 0;
    for (; c + LK_LANES <= d; c += LK_LANES) {
      const Vec x = load(q + c);
#pragma GCC unroll 16
      for (int n = 0; n < LK_LANES; ++n) sum[n] += x * load(rows[n] + c);
    }
    if (c < d) {
      const Vec x = load(q + c);
      for (int n = 0; n < LK_LANES; ++n) sum[n] += x * load_first(rows[n] + c, d - c);
    }
    store_vec(scores + j, sums_of(sum));
  }
}

// out [R][stride] = fade out + weights [R][kBlock] values, columns [c, c + V vectors).
template <class T, int R, int V>
void weigh_values(const KeyRows<T>& at, int64_t first, int64_t last, const float* weights,
                  const float* fade, int64_t c, int64_t dv, Fetch<T>& fetch, float* out,
                  int64_t stride) {
  Vec sum[R][V] = {};
  const int64_t rest = dv - c - (V - 1) * LK_LANES;  // of the last vector
  for (int64_t j = first; j < last; ++j) {
    if (j % kKeys == 0) fetch.step();
    const T* row = at.v[j] + c;
    Vec value[V];
#pragma GCC unroll 4
    for (int v = 0; v + 1 < V; ++v) value[v] = load(row + v * LK_LANES);
    const T* end = row + (V - 1) * LK_LANES;
    value[V - 1] = rest >= LK_LANES ? load(end) : load_first(end, rest);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const float w = weights[r * kBlock + j];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] += w * value[v];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    float* o = out + r * stride + c;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      store_vec(o + v * LK_LANES, load(o + v * LK_LANES) * fade[r] + sum[r][v]);
    }
  }
}

template <class T, int R>
void weigh_strips(const KeyRows<T>& at, int64_t first, int64_t last, const float* weights,
                  const float* fade, int64_t dv, Fetch<T>& fetch, float* out, int64_t stride) {
  for (int64_t c = 0; c < dv; c += kStrip * LK_LANES) {
    const auto go = [&](auto vectors) {
      weigh_values<T, R, decltype(vectors)::value>(at, first, last, weights, fade, c, dv, fetch,
                                                   out, stride);
    };
    switch (std::min<int64_t>(kStrip, (dv - c + LK_LANES - 1) / LK_LANES)) {
      case 1: go(std::integral_constant<int, 1>{}); break;
      case 2: go(std::integral_constant<int, 2>{}); break;
      case 3: go(std::integral_constant<int, 3>{}); break;
      default: go(std::integral_constant<int, 4>{}); break;
    }
  }
}

// Rows [r0, r0 + R) of a head over the keys [first, last) of a block, relative to j0.
template <class T, int R, bool kPlain>
void decode_rows(const DecodeParams& p, const DecodeTask& t, int64_t group, const KeyRows<T>& at,
                 NextBlock<T>& next, int64_t r0, int64_t j0, int64_t first, int64_t last,
                 const float* q, DecodeBuffers& w, float* sums) {
  const int64_t heads = p.heads / p.groups, whole = first / LK_LANES * LK_LANES;
  float* scores = w.scores;
  const int64_t past = round_up(last, LK_LANES);
  if constexpr (R == 1) {
    dot_row(at, whole, past, q, p.d, next.keys, scores);
  } else {
    dot_rows<T, R>(at, whole, past, q, w.d, p.d, next.keys, w.lanes);
  }
  float fade[R];
  for (int r = 0; r < R; ++r) {
    for (int64_t c = 0; c < kBlock; c += LK_LANES) {
      if (c < whole || c >= last) {
        store_vec(scores + r * kBlock + c, Vec{});
      } else if constexpr (R != 1) {
        Vec v[LK_LANES];
        for (int l = 0; l < LK_LANES; ++l) {
          v[l] = load(w.lanes + (r * kBlock + c + l) * LK_LANES);
        }
        store_vec(scores + r * kBlock + c, sums_of(v));
      }
    }
    const Head head(p, t.b, group * heads + (r0 + r) % heads);
    const int64_t i = (r0 + r) / heads;
    const Range row = head.seen(i);
    const Range seen{std::max(first, row.begin - j0), std::min(last, row.end - j0)};
    float* state = sums + r * p.partial_stride + p.partial_stride - LK_LANES;
    fade[r] = 1.0f;
    if (seen.empty()) {
      for (int64_t c = 0; c < kBlock; c += LK_LANES) store_vec(scores + r * kBlock + c, Vec{});
    } else {
      fade[r] = decode_softmax<DecodeWeights, kPlain>(head, i, j0, seen, scores + r * kBlock,
                                                      state[0], state[1]);
    }
  }
  weigh_strips<T, R>(at, first, last, scores, fade, p.dv, next.values, sums, p.partial_stride);
}

template <class T, bool kPlain>
void decode_block(const DecodeParams& p, const DecodeTask& t, int64_t group, const KeyRows<T>& at,
                  NextBlock<T>& next, int64_t j0, int64_t first, int64_t last, DecodeBuffers& w) {
  const int64_t n = group - t.group;
  const float* q = w.q + n * w.rows * w.d;
  float* sums = p.partial + (t.slot + n * t.slot_step) * w.rows * p.partial_stride;
  for (int64_t r = 0; r < w.rows; r += kRows, q += kRows * w.d, sums += kRows * p.partial_stride) {
    const auto go = [&](auto rows) {
      decode_rows<T, decltype(rows)::value, kPlain>(p, t, group, at, next, r, j0, first, last, q, w,
                                                    sums);
    };
    switch (std::min<int64_t>(kRows, w.rows - r)) {
      case 1: go(std::integral_constant<int, 1>{}); break;
      case 2: go(std::integral_constant<int, 2>{}); break;
      case 3: go(std::integral_constant<int, 3>{}); break;
      default: go(std::integral_constant<int, 4>{}); break;
    }
  }
}

// q in fp32, and empty sums.
template <class T>
void begin_group(const DecodeParams& p, const DecodeTask& t, int64_t n, DecodeBuffers& w) {
  const int64_t heads = p.heads / p.groups;
  float* sums = p.partial + (t.slot + n * t.slot_step) * w.rows * p.partial_stride;
  for (int64_t r = 0; r < w.rows; ++r, sums += p.partial_stride) {
    const T* q = row_of<T>(p.q, t.b, r / heads, (t.group + n) * heads + r % heads);
    float* to = w.q + (n * w.rows + r) * w.d;
    for (int64_t c = 0; c < w.d; ++c) to[c] = c < p.d ? to_float(q[c]) : 0.0f;
    std::memset(sums, 0, p.partial_stride * sizeof(float));
    sums[p.partial_stride - LK_LANES] = -kInfinity;
  }
}

template <class T>
void decode_chunk(const DecodeParams& p, int64_t task, void* workspace) {
  const DecodeTask& t = p.tasks[task];
  Arena arena(workspace);
  DecodeBuffers w(p, t.groups, arena);
  for (int64_t n = 0; n < t.groups; ++n) begin_group<T>(p, t, n, w);
  const Head any(p, t.b, t.group * (p.heads / p.groups));
  const Range seen = any.seen(0, any.span.rows);
  const int64_t begin = std::max(seen.begin, t.chunk * p.chunk_keys);
  const int64_t end = std::min(seen.end, (t.chunk + 1) * p.chunk_keys);
  const bool plain = is_plain(p);
  KeyRows<T> places[2];  // of this block and of the next
  int64_t j0 = begin / kBlock * kBlock;
  if (j0 < end) places[0].find(p, t.b, t.group, j0, end);
  for (int64_t block = 0; j0 < end; ++block, j0 += kBlock) {
    KeyRows<T>& at = places[block % 2];
    NextBlock<T> next;
    if (j0 + kBlock < end) {
      KeyRows<T>& after = places[(block + 1) % 2];
      after.find(p, t.b, t.group, j0 + kBlock, end);
      const int64_t steps = t.groups * (kBlock / kKeys);
      const int64_t k_width = (t.groups - 1) * p.k.head + p.d;
      const int64_t v_width = (t.groups - 1) * p.v.head + p.dv;
      if (p.table != nullptr || k_width != p.k.row) next.keys.start(after.k, k_width, steps);
      if (p.table != nullptr || v_width != p.v.row) next.values.start(after.v, v_width, steps);
    }
    const int64_t first = std::max<int64_t>(0, begin - j0), last = std::min(kBlock, end - j0);
    for (int64_t g = t.group; g < t.group + t.groups; ++g) {
      plain ? decode_block<T, true>(p, t, g, at, next, j0, first, last, w)
            : decode_block<T, false>(p, t, g, at, next, j0, first, last, w);
      if (g + 1 < t.group + t.groups) at.next_head(p);
    }
  }
}

template <class T>
void decode_finish(const DecodeParams& p, int64_t b, int64_t group, int64_t slot, int64_t count) {
  const int64_t heads = p.heads / p.groups, rows = p.sequences[b].rows * heads;
  const int64_t state = p.partial_stride - LK_LANES;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t h = group * heads + r % heads, i = r / heads;
    float* sums = p.partial + (slot * rows + r) * p.partial_stride;
    float top = p.sinks != nullptr ? p.sinks[h] : -kInfinity;
    for (int64_t n = 0; n < count; ++n) {
      top = std::max(top, sums[n * rows * p.partial_stride + state]);
    }
    const float base = top == -kInfinity ? 0.0f : top;
    float total = p.sinks != nullptr ? std::exp(p.sinks[h] - base) : 0.0f;
    for (int64_t n = 0; n < count; ++n) {
      float* part = sums + n * rows * p.partial_stride;
      const float share = std::exp(part[state] - base);
      total += share * part[state + 1];
      for (int64_t c = 0; c < state; c += LK_LANES) {
        store_vec(sums + c, n == 0 ? load(part + c) * share : load(sums + c) + load(part + c) * share);
      }
    }
    T* out = row_to<T>(p.out, b, i, h);
    if (count == 0 || total == 0.0f) {
      for (int64_t c = 0; c < p.dv; ++c) from_float(0.0f, out[c]);
    } else {
      store_row(sums, p.dv, 1.0f / total, out);
    }
    p.lse.data[b * p.lse.batch + h * p.lse.head + i] =
        total == 0.0f ? -kInfinity : base + std::log(total);
  }
}

inline int64_t decode_workspace(const DecodeParams& p) {
  Arena arena(nullptr);
  DecodeBuffers(p, p.groups, arena);
  return arena.used();
}

inline int64_t decode_padded(int64_t columns) { return round_up(columns, LK_LANES) + LK_LANES; }

template <class T>
constexpr DecodeEngine decode_engine() {
  return {decode_padded, decode_workspace, decode_chunk<T>, decode_finish<T>};
}

const DecodeEngine* decode_engine(Dtype dtype) {
  static const DecodeEngine engines[] = {decode_engine<float>(), decode_engine<bf16>(),
                                         decode_engine<fp16>()};
  return &engines[static_cast<int>(dtype)];
}

}  // namespace
}  // namespace lora_kernels::attention
