// Forward on AMX-BF16, transposed: Y^T = W X^T, so that rows of W are left operands, which need no
// interleaving, and decoded weights go straight into tiles.
//
//   Y^T = [W | B] [X | s S]^T + bias,   S^T = A drop(X)^T
//
// Phases: (0) X, A, B into tiles; (1) S per strip of rows; (2) Y, split over rows of W. In (2) W
// is decoded where it is used: for up to 32 rows of X one group at a time beside the products, else
// blocks of 512 x 512 in L2; where X has more rows than a chunk, a panel of 512 rows of W at a time.
// Numerics: W, X, S and B in bf16 (int8: the codes, exactly; the scale of a row multiplies the sum),
// fp32 accumulation over all columns in the order of the steps
// whatever the number of rows, one rounding at the store. The tile unit flushes denormals to zero.
#pragma once

#include "../lora_linear/masks.h"
#include "tile_rows.h"
#include "tile_widths.h"

namespace lora_kernels::quant_linear {
namespace {

constexpr int64_t kChunkStrips = 16;   // of X, and of W in a panel: 512 rows
constexpr int64_t kBlockGroups = 8;    // 512 columns
constexpr int64_t kSmallPanel = 4;     // strips of W where X has up to 128 rows

struct TileShared {
  int64_t groups, x_strips, w_strips, rank_strips, rank_steps, width;
  bool nibbles;
  bf16 *x, *a, *b, *s;
  int64_t bytes;

  TileShared(const FwdParams& p, void* base) {
    const WeightRows rows(*p.weight);
    nibbles = rows.nibbles();
    groups = round_up(p.weight->k, kGroup) / kGroup;
    x_strips = round_up(p.m, kStrip) / kStrip;
    w_strips = round_up(p.weight->n, kStrip) / kStrip;
    rank_strips = rank_steps = round_up(p.rank, kStrip) / kStrip;
    width = std::min<int64_t>(p.m, 16);
    auto* at = static_cast<bf16*>(base);
    const auto take = [&](int64_t steps) {
      bf16* piece = at;
      at += steps * kStepTiles;
      return piece;
    };
    x = take(x_strips * groups * kGroupSteps);
    a = take(rank_strips * groups * kGroupSteps);
    b = take(w_strips * rank_steps);
    s = take(x_strips * rank_steps);
    bytes = (at - static_cast<bf16*>(base)) * static_cast<int64_t>(sizeof(bf16));
  }
  int64_t x_stride() const { return groups * kGroupSteps * kStepTiles; }
};

struct TileOwn {
  int64_t panel;  // strips of W
  bool streamed, whole;  // W by groups; a panel of W with all its columns
  float *scales, *sums, *tile, *update;
  bf16* w;
  bf16* dropped;
  uint32_t* masks;
  int64_t bytes;

  TileOwn(const FwdParams& p, void* base) {
    const WeightRows rows(*p.weight);
    const int64_t groups = round_up(p.weight->k, kGroup) / kGroup;
    const int64_t x_strips = round_up(p.m, kStrip) / kStrip;
    streamed = x_strips == 1;
    whole = x_strips > kChunkStrips;
    panel = streamed ? 1 : (x_strips <= 4 ? kSmallPanel : kChunkStrips);
    panel = std::min(panel, round_up(p.weight->n, kStrip) / kStrip);
    int64_t used = 0;
    const auto take = [&](auto*& piece, int64_t count) {
      piece = reinterpret_cast<std::remove_reference_t<decltype(piece)>>(static_cast<char*>(base) +
                                                                         used);
      used += round_up(count * static_cast<int64_t>(sizeof(*piece)), 64);
    };
    const int64_t block = whole ? groups : std::min(groups, kBlockGroups);
    take(scales, rows.scratch_floats());
    take(tile, kStrip * kStrip);
    take(update, kStrip * kStrip);
    take(w, streamed ? 4 * kTile : panel * block * kGroupSteps * kStepTiles);
    take(sums, streamed ? 0 : panel * std::min(x_strips, kChunkStrips) * kStrip * kStrip);
    const bool drops = p.rank > 0 && p.dropout.threshold != 0;
    take(dropped, drops ? groups * kGroupSteps * kStepTiles : 0);
    take(masks, drops ? kStrip * lora_linear::mask_words(p.weight->k) : 0);
    bytes = used;
  }
};

// The four accumulators: rows 0-15 and 16-31 of the left strip by the two tiles of the right one.
template <bool kTwoRows, bool kTwoColumns>
inline void zero_tiles() {
  _tile_zero(0);
  if constexpr (kTwoColumns) _tile_zero(1);
  if constexpr (kTwoRows) _tile_zero(2);
  if constexpr (kTwoRows && kTwoColumns) _tile_zero(3);
}
template <bool kTwoRows, bool kTwoColumns>
inline void load_tiles(const float* c) {
  _tile_loadd(0, c, kStrip * 4);
  if constexpr (kTwoColumns) _tile_loadd(1, c + 16, kStrip * 4);
  if constexpr (kTwoRows) _tile_loadd(2, c + 16 * kStrip, kStrip * 4);
  if constexpr (kTwoRows && kTwoColumns) _tile_loadd(3, c + 16 * kStrip + 16, kStrip * 4);
}
template <bool kTwoRows, bool kTwoColumns>
inline void store_tiles(float* c) {
  _tile_stored(0, c, kStrip * 4);
  if constexpr (kTwoColumns) _tile_stored(1, c + 16, kStrip * 4);
  if constexpr (kTwoRows) _tile_stored(2, c + 16 * kStrip, kStrip * 4);
  if constexpr (kTwoRows && kTwoColumns) _tile_stored(3, c + 16 * kStrip + 16, kStrip * 4);
}
template <bool kTwoRows, bool kTwoColumns>
inline void add_products(const bf16* left, const bf16* right, int64_t steps, int64_t width) {
  const int64_t stride = width * 4;
  for (; steps > 0; --steps, left += kStepTiles, right += kStepTiles) {
    _tile_stream_loadd(4, left, 64);
    _tile_loadd(6, right, stride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTwoColumns) {
      _tile_loadd(7, right + kTile, stride);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kTwoRows) {
      _tile_stream_loadd(5, left + kTile, 64);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kTwoColumns) _tile_dpbf16ps(3, 5, 7);
    }
  }
}

template <class Body>
inline void with_shape(int64_t rows, int64_t columns, const Body& body) {
  using True = std::true_type;
  using False = std::false_type;
  if (rows > 16) {
    columns > 16 ? body(True{}, True{}) : body(True{}, False{});
  } else {
    columns > 16 ? body(False{}, True{}) : body(False{}, False{});
  }
}

// Two rows of fp32 as 16 pairs of bf16.
inline __m512i pairs(const float* even, const float* odd, __m512 add_even, __m512 add_odd) {
  alignas(64) static constexpr uint16_t kInterleave[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512 e = _mm512_add_ps(_mm512_load_ps(even), add_even);
  const __m512 o = _mm512_add_ps(_mm512_load_ps(odd), add_odd);
  return _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave),
                                  as_int(_mm512_cvtne2ps_pbh(o, e)));
}

// dst[column, row] = c[row, column] + bias[row] for the first rows x columns of a 32 x 32 tile.
inline void store_transposed(const float* c, int64_t rows, int64_t columns, const float* bias,
                             bf16* dst, int64_t ld, bool stream) {
  const uint32_t keep = rows >= 32 ? ~0u : (1u << rows) - 1u;
  const auto add = [&](int64_t row) {
    return bias == nullptr || row >= rows ? _mm512_setzero_ps() : _mm512_set1_ps(bias[row]);
  };
  const int64_t valid = rows > 16 ? 32 : 16;
  for (int64_t j = 0; j < columns; j += 16) {
    __m512i v[16];
    for (int64_t p = 0; p < 16; ++p) {
      const float* even = c + 2 * p * kStrip + j;
      v[p] = 2 * p < valid ? pairs(even, even + kStrip, add(2 * p), add(2 * p + 1))
                           : _mm512_setzero_si512();
    }
    transpose_dwords(v);
    const int64_t count = std::min<int64_t>(16, columns - j);
    for (int64_t i = 0; i < count; ++i) {
      bf16* to = dst + (j + i) * ld;
      if (stream && rows >= 32) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to), v[i]);
      } else {
        _mm512_mask_storeu_epi16(to, keep, v[i]);
      }
    }
  }
}

inline void pack_adapter(const Adapter& a, int64_t row, int64_t rows, int64_t columns, bool groups,
                         bool nibbles, bf16* dst) {
  if (a.dtype == Dtype::kFloat32) {
    pack_left(static_cast<const float*>(a.data) + row * a.ld, a.ld, rows, columns, groups, nibbles,
              dst);
  } else {
    pack_left(static_cast<const bf16*>(a.data) + row * a.ld, a.ld, rows, columns, groups, nibbles,
              dst);
  }
}

inline void pack_operands(const FwdParams& p, const TileShared& shared, int thread, int threads) {
  const int64_t k = p.weight->k, n = p.weight->n;
  Span own = share(shared.x_strips, thread, threads);
  for (int64_t j = own.begin; j < own.end; ++j) {
    pack_right(static_cast<const bf16*>(p.x) + j * kStrip * p.ldx, p.ldx,
               std::min(kStrip, p.m - j * kStrip), k, shared.nibbles, shared.width, nullptr, 0,
               shared.x + j * shared.x_stride());
  }
  if (p.rank == 0) return;
  if (thread == threads - 1) {
    for (int64_t r = 0; r < shared.rank_strips; ++r) {
      pack_adapter(p.a, r * kStrip, std::min(kStrip, p.rank - r * kStrip), k, true,
                   shared.nibbles, shared.a + r * shared.x_stride());
    }
  }
  own = share(shared.w_strips, thread, threads);
  for (int64_t i = own.begin; i < own.end; ++i) {
    pack_adapter(p.b, i * kStrip, std::min(kStrip, n - i * kStrip), p.rank, false, false,
                 shared.b + i * shared.rank_steps * kStepTiles);
  }
}

inline void shrink(const FwdParams& p, const TileShared& shared, const TileOwn& own, int thread,
                   int threads) {
  const int64_t k = p.weight->k, words = lora_linear::mask_words(k);
  const Span strips = share(shared.x_strips, thread, threads);
  for (int64_t j = strips.begin; j < strips.end; ++j) {
    const int64_t row = j * kStrip, columns = std::min(kStrip, p.m - row);
    const bf16* x = shared.x + j * shared.x_stride();
    if (p.dropout.threshold != 0) {
      lora_linear::make_masks(p.dropout, p.row0 + row, columns, k, 0, own.masks);
      pack_right(static_cast<const bf16*>(p.x) + row * p.ldx, p.ldx, columns, k, shared.nibbles,
                 shared.width, own.masks, words, own.dropped);
      x = own.dropped;
    }
    for (int64_t r = 0; r < shared.rank_strips; ++r) {
      const int64_t rows = std::min(kStrip, p.rank - r * kStrip);
      with_shape(rows, columns, [&](auto two_rows, auto two_columns) {
        constexpr bool R = decltype(two_rows)::value, C = decltype(two_columns)::value;
        zero_tiles<R, C>();
        add_products<R, C>(shared.a + r * shared.x_stride(), x, shared.groups * kGroupSteps,
                           shared.width);
        store_tiles<R, C>(own.tile);
      });
      if (rows <= 16) std::fill(own.tile + 16 * kStrip, own.tile + kStrip * kStrip, 0.0f);
      if (p.keep_scale != 1.0f) {
        for (int64_t e = 0; e < kStrip * kStrip; ++e) own.tile[e] *= p.keep_scale;
      }
      store_transposed(own.tile, rows, columns, nullptr,
                       static_cast<bf16*>(p.s) + row * p.lds + r * kStrip, p.lds, false);
      for (int64_t e = 0; e < kStrip * kStrip; ++e) own.tile[e] *= p.scaling;
      const auto lanes = static_cast<__mmask16>((1u << shared.width) - 1u);
      bf16* to = shared.s + (j * shared.rank_steps + r) * kStepTiles;
      for (int64_t t = 0; 16 * t < columns; ++t) {
        for (int64_t q = 0; q < 16; ++q) {
          const float* even = own.tile + 2 * q * kStrip + 16 * t;
          _mm512_mask_storeu_epi32(
              to + t * kTile + q * 2 * shared.width, lanes,
              pairs(even, even + kStrip, _mm512_setzero_ps(), _mm512_setzero_ps()));
        }
      }
    }
  }
}

// c = (c * scale) * factor + update of each row; update null: none.
inline void scale_rows(const Weight& w, int64_t n0, int64_t rows, const float* update, float* c) {
  const __m512 factor = _mm512_set1_ps(w.factor);
  for (int64_t i = 0; i < std::min(kStrip, rows); ++i) {
    const __m512 scale = _mm512_set1_ps(w.scale[n0 + i]);
    for (int64_t e = i * kStrip; e < (i + 1) * kStrip; e += 16) {
      const __m512 v = _mm512_mul_ps(_mm512_mul_ps(_mm512_load_ps(c + e), scale), factor);
      _mm512_store_ps(c + e, update == nullptr ? v : _mm512_add_ps(v, _mm512_load_ps(update + e)));
    }
  }
}

// The low-rank term of strip i of W and strip j of X into the accumulators that hold the base
// product, then the tile to c.
template <bool kTwoRows, bool kTwoColumns>
inline void finish_tile(const FwdParams& p, const TileShared& shared, const TileOwn& own,
                        const WeightRows& rows, int64_t i, int64_t j, float* c) {
  const auto add_update = [&] {
    add_products<kTwoRows, kTwoColumns>(shared.b + i * shared.rank_steps * kStepTiles,
                                        shared.s + j * shared.rank_steps * kStepTiles,
                                        shared.rank_steps, shared.width);
  };
  if (!rows.unscaled()) {
    add_update();
    store_tiles<kTwoRows, kTwoColumns>(c);
    return;
  }
  store_tiles<kTwoRows, kTwoColumns>(c);
  if (p.rank > 0) {
    zero_tiles<kTwoRows, kTwoColumns>();
    add_update();
    store_tiles<kTwoRows, kTwoColumns>(own.update);
  }
  scale_rows(*p.weight, i * kStrip, p.weight->n - i * kStrip, p.rank > 0 ? own.update : nullptr, c);
}

inline void store_result(const FwdParams& p, const float* c, int64_t n0, int64_t row, bool stream) {
  store_transposed(c, std::min(kStrip, p.weight->n - n0), std::min(kStrip, p.m - row),
                   p.bias == nullptr ? nullptr : p.bias + n0,
                   static_cast<bf16*>(p.y) + row * p.ldy + n0, p.ldy, stream);
}

// One strip of X: half strips of W are decoded one ahead of the products, so that the tile unit
// waits for no store. The two buffers of 2 KB never share the low twelve bits of an address: a load
// that does with an earlier store would wait for it.
template <bool kTwoRows, bool kTwoColumns>
inline void stream_strip(const TileShared& shared, const WeightRows& rows, bf16* buffer) {
  constexpr int64_t kHalves = kTwoRows ? 2 : 1;
  const int64_t stride = shared.width * 4, count = kHalves * shared.groups;
  const uint8_t* next = rows.next_strip();
  const auto decode_half = [&](int64_t i) {
    rows.tiles(i % kHalves, i / kHalves, buffer + i % 2 * 2 * kTile, kTile, next);
    next += 16 * rows.group_bytes();
  };
  decode_half(0);
  for (int64_t i = 0; i < count; ++i) {
    if (i + 1 < count) decode_half(i + 1);
    const bf16* left = buffer + i % 2 * 2 * kTile;
    const bf16* right = shared.x + i / kHalves * kGroupSteps * kStepTiles;
    const bool upper = kTwoRows && i % 2 == 1;
    _tile_loadd(4, left, 64);
    if constexpr (kTwoColumns) {
      for (int64_t s = 0; s < kGroupSteps; ++s, right += kStepTiles) {
        if (s > 0) _tile_loadd(4, left + s * kTile, 64);
        _tile_loadd(6, right, stride);
        _tile_loadd(7, right + kTile, stride);
        if (upper) {
          _tile_dpbf16ps(2, 4, 6);
          _tile_dpbf16ps(3, 4, 7);
        } else {
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
        }
      }
    } else {
      _tile_loadd(5, left + kTile, 64);
      if (upper) {
        _tile_dpbf16ps(2, 4, 6);
        _tile_dpbf16ps(2, 5, 7);
      } else {
        _tile_loadd(6, right, stride);  // both steps of X serve both halves of the strip
        _tile_loadd(7, right + kStepTiles, stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(0, 5, 7);
      }
    }
  }
}

inline void multiply_streamed(const FwdParams& p, const TileShared& shared, const TileOwn& own,
                              WeightRows& rows, Span strips) {
  for (int64_t i = strips.begin; i < strips.end; ++i) {
    const int64_t n0 = i * kStrip;
    rows.begin(n0, 0, shared.groups, own.scales);
    with_shape(p.weight->n - n0, p.m, [&](auto two_rows, auto two_columns) {
      constexpr bool R = decltype(two_rows)::value, C = decltype(two_columns)::value;
      zero_tiles<R, C>();
      stream_strip<R, C>(shared, rows, own.w);
      finish_tile<R, C>(p, shared, own, rows, i, 0, own.tile);
    });
    store_result(p, own.tile, n0, 0, false);
  }
}

// Chunks of X by panels of W, in blocks of columns.
inline void multiply_blocked(const FwdParams& p, const TileShared& shared, const TileOwn& own,
                             WeightRows& rows, Span strips) {
  const int64_t block_stride = own.panel * kBlockGroups * kGroupSteps * kStepTiles;
  const int64_t blocks = round_up(shared.groups, kBlockGroups) / kBlockGroups;
  const bool stream = p.m * p.ldy * 2 >= (int64_t{1} << 20) && p.ldy % 32 == 0 &&
                      reinterpret_cast<uintptr_t>(p.y) % 64 == 0;
  for (int64_t i0 = strips.begin; i0 < strips.end; i0 += own.panel) {
    const int64_t i1 = std::min(i0 + own.panel, strips.end);
    for (int64_t j0 = 0; j0 < shared.x_strips; j0 += kChunkStrips) {
      const int64_t j1 = std::min(j0 + kChunkStrips, shared.x_strips);
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t g0 = b * kBlockGroups, g1 = std::min(g0 + kBlockGroups, shared.groups);
        const int64_t steps = (g1 - g0) * kGroupSteps;
        bf16* w = own.w + (own.whole ? b * block_stride : 0);
        if (j0 == 0) {
          for (int64_t i = i0; i < i1; ++i) {
            rows.begin(i * kStrip, g0, g1, own.scales);
            for (int64_t g = g0; g < g1; ++g) {
              bf16* to = w + ((i - i0) * steps + (g - g0) * kGroupSteps) * kStepTiles;
              rows.tiles(0, g, to, kStepTiles, rows.next_strip());
              rows.tiles(1, g, to + kTile, kStepTiles, rows.next_strip());
            }
          }
        }
        const bool last = b + 1 == blocks;
        for (int64_t j = j0; j < j1; ++j) {
          const int64_t row = j * kStrip;
          const bf16* x = shared.x + j * shared.x_stride() + g0 * kGroupSteps * kStepTiles;
          for (int64_t i = i0; i < i1; ++i) {
            float* sum = own.sums + ((j - j0) * own.panel + (i - i0)) * kStrip * kStrip;
            const bf16* left = w + (i - i0) * steps * kStepTiles;
            with_shape(p.weight->n - i * kStrip, p.m - row, [&](auto two_rows, auto two_columns) {
              constexpr bool R = decltype(two_rows)::value, C = decltype(two_columns)::value;
              b == 0 ? zero_tiles<R, C>() : load_tiles<R, C>(sum);
              add_products<R, C>(left, x, steps, shared.width);
              if (last) {
                finish_tile<R, C>(p, shared, own, rows, i, j, sum);
              } else {
                store_tiles<R, C>(sum);
              }
            });
            if (last) store_result(p, sum, i * kStrip, row, stream);
          }
        }
      }
    }
  }
}

void tile_fwd(const FwdParams& p, int phase, int thread, int threads, void* shared_memory,
              void* own_memory) {
  const TileShared shared(p, shared_memory);
  const TileOwn own(p, own_memory);
  if (phase == 0) return pack_operands(p, shared, thread, threads);
  _tile_loadconfig(&kTileWidths.of[shared.width]);
  if (phase == 1) {
    if (p.rank > 0) shrink(p, shared, own, thread, threads);
  } else {
    WeightRows rows(*p.weight);
    const Span strips = share(shared.w_strips, thread, threads);
    own.streamed ? multiply_streamed(p, shared, own, rows, strips)
                 : multiply_blocked(p, shared, own, rows, strips);
  }
  _mm_sfence();  // orders the streamed results before whatever the caller does next
  _tile_release();
}

Job<FwdParams> tile_fwd_job() {
  return {3, [](const FwdParams& p) { return TileShared(p, nullptr).bytes; },
          [](const FwdParams& p) { return TileOwn(p, nullptr).bytes; }, tile_fwd};
}

}  // namespace
}  // namespace lora_kernels::quant_linear
