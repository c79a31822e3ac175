// The forward of up to 32 rows of X on AMX-BF16: W is read once, strip by strip, and decoded into
// two half strips of one group that never leave L1.
#pragma once

#include "fp8_table.h"
#include "tile_operands.h"

namespace lora_kernels::quant_linear {
namespace {

// One strip of X: half strips of W are decoded one ahead of the products, so that the tile unit
// waits for no store. The two buffers of 2 KB never share the low twelve bits of an address: a load
// that does with an earlier store would wait for it.
template <bool kTwoRows, bool kTwoColumns, class Rows>
inline void stream_strip(const TileShared& shared, Rows& rows, const uint8_t* next,
                         int64_t group_bytes, bf16* buffer) {
  constexpr int64_t kHalves = kTwoRows ? 2 : 1;
  const int64_t stride = shared.width * 4, count = kHalves * shared.groups;
  const auto decode_half = [&](int64_t i) {
    rows.tiles(i % kHalves, i / kHalves, buffer + i % 2 * 2 * kTile, kTile, next);
    next += 16 * group_bytes;
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
  const bool tables = Fp8Rows::serves(*p.weight);
  Fp8Rows fp8(*p.weight);
  PendingTile pending(p, rows.unscaled(), false);
  for (int64_t i = strips.begin; i < strips.end; ++i) {
    const int64_t n0 = i * kStrip;
    rows.begin(n0, 0, shared.groups, own.scales);
    with_shape(p.weight->n - n0, p.m, [&](auto two_rows, auto two_columns) {
      constexpr bool R = decltype(two_rows)::value, C = decltype(two_columns)::value;
      zero_tiles<R, C>();
      if (tables) {
        fp8.begin(n0);
        stream_strip<R, C>(shared, fp8, rows.next_strip(), rows.group_bytes(), own.w);
      } else {
        stream_strip<R, C>(shared, rows, rows.next_strip(), rows.group_bytes(), own.w);
      }
      finish_tile<R, C>(p, shared, rows.unscaled(), i, 0, own.tile, own.update);
    });
    pending.set(own.tile, p.rank > 0 ? own.update : nullptr, n0, 0);
    pending.flush();
  }
}

}  // namespace
}  // namespace lora_kernels::quant_linear
