// Forward on AMX-BF16, transposed: Y^T = W X^T, so that rows of W are left operands, which need no
// interleaving, and decoded weights go straight into tiles.
//
//   Y^T = [W | B] [X | s S]^T + bias,   S^T = A drop(X)^T
//
// Phases: (0) X, A, B into tiles; (1) S per strip of rows; (2) Y, split over rows of W, which is
// decoded beside the products: for up to 32 rows of X one group at a time, else in panels
// (tile_panels.h).
// Numerics: W, X, S and B in bf16 (int8: the codes, exactly; the scale of a row multiplies the sum),
// fp32 accumulation over all columns in the order of the steps whatever the number of rows, one
// rounding at the store. The tile unit flushes denormals to zero.
#pragma once

#include "tile_panels.h"
#include "tile_widths.h"

namespace lora_kernels::quant_linear {
namespace {

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
      for (int64_t half = 0; half < columns; half += 16) {
        store_transposed(own.tile, half, rows, columns, nullptr,
                         static_cast<bf16*>(p.s) + row * p.lds + r * kStrip, p.lds, false);
      }
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
                              Span strips) {
  WeightRows rows(*p.weight);
  PendingTile pending(p, rows.unscaled(), false);
  for (int64_t i = strips.begin; i < strips.end; ++i) {
    const int64_t n0 = i * kStrip;
    rows.begin(n0, 0, shared.groups, own.scales);
    with_shape(p.weight->n - n0, p.m, [&](auto two_rows, auto two_columns) {
      constexpr bool R = decltype(two_rows)::value, C = decltype(two_columns)::value;
      zero_tiles<R, C>();
      stream_strip<R, C>(shared, rows, own.w);
      finish_tile<R, C>(p, shared, rows.unscaled(), i, 0, own.tile, own.update);
    });
    pending.set(own.tile, p.rank > 0 ? own.update : nullptr, n0, 0);
    pending.flush();
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
    const Span strips = share(shared.w_strips, thread, threads);
    own.streamed ? multiply_streamed(p, shared, own, strips)
                 : multiply_panels(p, shared, own, strips);
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
