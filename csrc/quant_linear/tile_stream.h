// The forward of up to 32 rows of X on AMX-BF16: W is read once, strip by strip, and decoded into
// two half strips of one group that never leave L1.
#pragma once

#include "fp8_table.h"
#include "tile_operands.h"

namespace lora_kernels::quant_linear {
namespace {

// What the strip after this one reads, asked for in the order of memory while this one is decoded:
// its statistics, and its codes where the decoder does not ask for them itself. Rows of a strip are
// too far apart for the hardware to do it.
class Ahead {
 public:
  Ahead(const Weight& w, bool codes, int64_t steps) : w_(w), codes_(codes), steps_(steps) {}

  // While the strip of row n0 is decoded.
  void begin(int64_t n0) {
    const int64_t first = std::min(w_.n, n0 + kStrip), last = std::min(w_.n, n0 + 2 * kStrip);
    const bool flat = w_.layout == Layout::kFlat, int4 = w_.layout == Layout::kInt4;
    const int64_t half = flat ? w_.k : (int4 ? 2 * w_.row_bytes : 2 * w_.k);  // bytes of two rows
    if (codes_) set(0, w_.codes + first * half / 2, (last - first) * half / 2);
    if (flat) {
      const int64_t block = first * w_.k / w_.block, blocks = last * w_.k / w_.block - block;
      w_.scale != nullptr ? set(1, w_.scale + block, blocks * 4)
                          : set(1, w_.scale_codes + block, blocks);
    } else if (int4) {
      const int64_t bytes = (last - first) * w_.scale_columns * 4;
      set(1, w_.scale + first * w_.scale_columns, bytes);
      set(2, w_.zero + first * w_.scale_columns, bytes);
    }
  }
  void step() {
    for (Lines& lines : lines_) {
      lines.due += lines.bytes;
      for (; lines.asked < lines.due; lines.asked += 64 * steps_) {
        _mm_prefetch(lines.from, _MM_HINT_T1);
        lines.from += 64;
      }
    }
  }

 private:
  // After i of `steps` steps i / steps of the bytes are asked for: both sides times `steps`.
  struct Lines {
    const char* from = nullptr;
    int64_t bytes = 0, due = 0, asked = 0;
  };
  void set(int i, const void* from, int64_t bytes) {
    lines_[i] = {static_cast<const char*>(from), bytes, 0, 0};
  }
  const Weight& w_;
  const bool codes_;
  const int64_t steps_;
  Lines lines_[3];
};

// One strip of X: half strips of W are decoded one ahead of the products, so that the tile unit
// waits for no store. The two buffers of 2 KB never share the low twelve bits of an address: a load
// that does with an earlier store would wait for it.
template <bool kTwoRows, bool kTwoColumns, class Rows>
inline void stream_strip(const TileShared& shared, Rows& rows, const uint8_t* next,
                         int64_t group_bytes, Ahead& ahead, bf16* buffer) {
  constexpr int64_t kHalves = kTwoRows ? 2 : 1;
  const int64_t stride = shared.width * 4, count = kHalves * shared.groups;
  const auto decode_half = [&](int64_t i) {
    rows.tiles(i % kHalves, i / kHalves, buffer + i % 2 * 2 * kTile, kTile, next);
    next += 16 * group_bytes;
    ahead.step();
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
  const bool asks = tables || p.weight->layout == Layout::kInt8 ||
                    (rows.nibbles() && p.weight->block != 32);
  PendingTile pending(p, rows.unscaled(), false);
  for (int64_t i = strips.begin; i < strips.end; ++i) {
    const int64_t n0 = i * kStrip;
    rows.begin(n0, 0, shared.groups, own.scales);
    Ahead ahead(*p.weight, !asks, (p.weight->n - n0 > 16 ? 2 : 1) * shared.groups);
    ahead.begin(n0);
    with_shape(p.weight->n - n0, p.m, [&](auto two_rows, auto two_columns) {
      constexpr bool R = decltype(two_rows)::value, C = decltype(two_columns)::value;
      zero_tiles<R, C>();
      if (tables) {
        fp8.begin(n0);
        stream_strip<R, C>(shared, fp8, rows.next_strip(), rows.group_bytes(), ahead, own.w);
      } else {
        stream_strip<R, C>(shared, rows, rows.next_strip(), rows.group_bytes(), ahead, own.w);
      }
      finish_tile<R, C>(p, shared, rows.unscaled(), i, 0, own.tile, own.update);
    });
    pending.set(own.tile, p.rank > 0 ? own.update : nullptr, n0, 0);
    pending.flush();
  }
}

}  // namespace
}  // namespace lora_kernels::quant_linear
