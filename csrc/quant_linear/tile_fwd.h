// Forward on AMX-BF16, transposed: Y^T = W X^T, so that rows of W are left operands, which need no
// interleaving, and decoded weights go straight into tiles.
//
//   Y^T = [W | B] [X | s S]^T + bias,   S^T = A drop(X)^T
//
// Phases: (0) X, A, B into tiles; (1) S per strip of rows; (2) Y, split over rows of W, which is
// decoded beside the products: for up to 32 rows of X one group at a time (tile_stream.h), else in
// panels (tile_panels.h).
// Numerics: W, X, S and B in bf16 (int8, and fp8 of one scale a row: the codes, exactly; the scale
// multiplies the sum), fp32 accumulation over all columns in the order of the steps whatever the
// number of rows, one rounding at the store. The tile unit flushes denormals to zero.
#pragma once

#include "tile_panels.h"
#include "tile_stream.h"
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
        store_transposed(own.tile, half, rows, columns,
                         static_cast<bf16*>(p.s) + row * p.lds + r * kStrip, p.lds);
      }
      for (int64_t e = 0; e < kStrip * kStrip; ++e) own.tile[e] *= p.scaling;
      const auto lanes = static_cast<__mmask16>((1u << shared.width) - 1u);
      bf16* to = shared.s + (j * shared.rank_steps + r) * kStepTiles;
      for (int64_t t = 0; 16 * t < columns; ++t) {
        for (int64_t q = 0; q < 16; ++q) {
          const float* even = own.tile + 2 * q * kStrip + 16 * t;
          _mm512_mask_storeu_epi32(to + t * kTile + q * 2 * shared.width, lanes,
                                   pairs(_mm512_load_ps(even), _mm512_load_ps(even + kStrip)));
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
