// Operands and workspace of the forward on tiles.
#pragma once

#include "../lora_linear/masks.h"
#include "tile_products.h"

namespace lora_kernels::quant_linear {
namespace {

constexpr int64_t kChunkStrips = 16;  // 512 rows of X
constexpr int64_t kPanelStrips = 8;   // 256 rows of W
constexpr int64_t kSmallPanel = 4;    // the same where X has up to 128 rows
constexpr int64_t kBlockGroups = 8;   // 512 columns

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
  int64_t panel;   // strips of W
  int64_t blocks;  // of kBlockGroups
  int64_t slots;   // blocks of a panel that are kept; one may be decoded over
  bool streamed;   // W by groups, no panel
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
    blocks = round_up(groups, kBlockGroups) / kBlockGroups;
    slots = x_strips > kChunkStrips ? std::max<int64_t>(blocks, 2) : 2;
    panel = streamed ? 1 : (x_strips <= 4 ? kSmallPanel : kPanelStrips);
    panel = std::min(panel, round_up(p.weight->n, kStrip) / kStrip);
    int64_t used = 0;
    const auto take = [&](auto*& piece, int64_t count) {
      piece = reinterpret_cast<std::remove_reference_t<decltype(piece)>>(static_cast<char*>(base) +
                                                                         used);
      used += round_up(count * static_cast<int64_t>(sizeof(*piece)), 64);
    };
    take(scales, rows.scratch_floats());
    take(tile, kStrip * kStrip);
    take(update, kStrip * kStrip);
    take(w, streamed ? 4 * kTile : slots * block_elements());
    take(sums, streamed ? 0 : panel * std::min(x_strips, kChunkStrips) * kStrip * kStrip);
    const bool drops = p.rank > 0 && p.dropout.threshold != 0;
    take(dropped, drops ? groups * kGroupSteps * kStepTiles : 0);
    take(masks, drops ? kStrip * lora_linear::mask_words(p.weight->k) : 0);
    bytes = used;
  }
  int64_t block_elements() const { return panel * kBlockGroups * kGroupSteps * kStepTiles; }
};

// The low-rank term of strip i of W and strip j of X into the accumulators that hold the base
// product, then the tile to c; where the result is scaled later, the term goes to `update` instead.
template <bool kTwoRows, bool kTwoColumns>
inline void finish_tile(const FwdParams& p, const TileShared& shared, bool unscaled, int64_t i,
                        int64_t j, float* c, float* update) {
  const auto add_update = [&] {
    add_products<kTwoRows, kTwoColumns>(shared.b + i * shared.rank_steps * kStepTiles,
                                        shared.s + j * shared.rank_steps * kStepTiles,
                                        shared.rank_steps, shared.width);
  };
  if (!unscaled) {
    add_update();
    store_tiles<kTwoRows, kTwoColumns>(c);
    return;
  }
  store_tiles<kTwoRows, kTwoColumns>(c);
  if (p.rank == 0) return;
  zero_tiles<kTwoRows, kTwoColumns>();
  add_update();
  store_tiles<kTwoRows, kTwoColumns>(update);
}

}  // namespace
}  // namespace lora_kernels::quant_linear
