// Y^T for many rows of X: panels of W by chunks of X, in blocks of columns.
//
// For each panel of 256 rows of W, each chunk of 512 rows of X, each block of 512 columns: the tiles
// of panel x chunk, a strip of X in L1, the block of the panel in L2 (256 KB), fp32 sums in L2
// (512 KB) until the last block. While one block is multiplied, the tile unit being busy and the
// vector units not, the next block of W is decoded, the next strip of X fetched and the last tile
// converted and stored. Where X has more rows than a chunk the decoded panel is kept for the others.
// Bytes: codes of W once; X once per panel.
#pragma once

#include "code_lines.h"
#include "fp8_table.h"
#include "tile_beside.h"
#include "tile_operands.h"

namespace lora_kernels::quant_linear {
namespace {

// Decodes strips [begin, end) of W panel by panel, block by block, in units of 4 rows x 64 columns.
// What of a strip is in a block is decoded together; the codes of the one after it are asked for.
class BlockDecoder {
 public:
  BlockDecoder(const Weight& w, float* scales, Span strips, int64_t panel)
      : rows_(w), fp8_(w), lines_(w), by_bytes_(Fp8Rows::serves(w)), scales_(scales), strips_(strips), panel_(panel),
        groups_(round_up(w.k, kGroup) / kGroup), ahead_strip_(strips.begin),
        ahead_panel_(strips.begin) {
    fetch_strip();
  }

  // Strips [i0, i1) of W, groups [g0, g1), as left strips at dst.
  void begin(int64_t i0, int64_t i1, int64_t g0, int64_t g1, bf16* dst) {
    strip_ = i0;
    strips_end_ = i1;
    g0_ = g_ = g0;
    g1_ = g1;
    unit_ = 0;
    dst_ = dst;
  }
  int64_t units() const {
    const int64_t strips = strips_end_ - strip_;
    return strips <= 0 ? 0 : (strips * (g1_ - g0_) - (g_ - g0_)) * kUnits - unit_;
  }
  void step() {
    if (g_ == g0_ && unit_ == 0) {
      ++begun_;
      while (behind()) fetch();
      rows_.begin(strip_ * kStrip, g0_, g1_, scales_);
      fp8_.begin(strip_ * kStrip);
    }
    const int64_t row = unit_ * kRows;
    bf16* to = dst_ + row / 16 * kTile + row % 16 * kStep;
    if (by_bytes_) {
      fp8_.rows(row, kRows, g_, to, kStepTiles, nullptr);
    } else {
      rows_.rows(row, kRows, g_, to, kStepTiles, nullptr);
    }
    if (++unit_ < kUnits) return;
    unit_ = 0;
    dst_ += kGroupSteps * kStepTiles;
    if (++g_ < g1_) return;
    g_ = g0_;
    ++strip_;
  }
  void finish() {
    while (units() > 0) {
      for (int64_t i = lines_of_unit(); i > 0; --i) fetch();
      step();
    }
  }

  int64_t lines_of_unit() const { return lines_.count(kRows, kGroup); }
  // Asks for one more line, but not of a strip after the next.
  void fetch() {
    if (fetched_ > begun_ || ahead_strip_ >= strips_.end) return;
    if (!lines_.done()) lines_.next();
    if (!lines_.done()) return;
    ++fetched_;
    if (++ahead_strip_ == std::min(ahead_panel_ + panel_, strips_.end)) {
      ahead_group_ += kBlockGroups;
      if (ahead_group_ < groups_) {
        ahead_strip_ = ahead_panel_;
      } else {
        ahead_group_ = 0;
        ahead_panel_ = ahead_strip_;
      }
    }
    fetch_strip();
  }

 private:
  bool behind() const { return fetched_ < begun_ && ahead_strip_ < strips_.end; }
  void fetch_strip() {
    if (ahead_strip_ >= strips_.end) return;
    lines_.begin(ahead_strip_ * kStrip, (ahead_strip_ + 1) * kStrip, ahead_group_ * kGroup,
                 (ahead_group_ + kBlockGroups) * kGroup);
  }

  static constexpr int64_t kRows = 4, kUnits = kStrip / kRows;
  WeightRows rows_;
  Fp8Rows fp8_;
  CodeLines lines_;
  const bool by_bytes_;
  float* scales_;
  const Span strips_;
  const int64_t panel_, groups_;
  int64_t strip_ = 0, strips_end_ = 0, g0_ = 0, g1_ = 0, g_ = 0, unit_ = 0;
  bf16* dst_ = nullptr;
  int64_t begun_ = 0, fetched_ = 0;  // strips of blocks, in the order of decoding
  int64_t ahead_strip_, ahead_panel_, ahead_group_ = 0;
};

inline void multiply_panels(const FwdParams& p, const TileShared& shared, const TileOwn& own,
                            Span strips) {
  const bool stream = p.m * p.ldy * 2 >= (int64_t{1} << 20) && p.ldy % 32 == 0 &&
                      reinterpret_cast<uintptr_t>(p.y) % 64 == 0;
  const bool unscaled = WeightRows(*p.weight).unscaled();
  PendingTile pending(p, unscaled, stream);
  BlockDecoder decoder(*p.weight, own.scales, strips, own.panel);
  const auto slot = [&](int64_t block) { return own.w + block % own.slots * own.block_elements(); };
  const auto begin_decoding = [&](int64_t i0, int64_t b, int64_t block) {
    decoder.begin(i0, std::min(i0 + own.panel, strips.end), b * kBlockGroups,
                  std::min((b + 1) * kBlockGroups, shared.groups), slot(block));
  };
  if (strips.begin < strips.end) {
    begin_decoding(strips.begin, 0, 0);
    decoder.finish();
  }
  int64_t panel_block = 0;  // blocks of all panels before
  for (int64_t i0 = strips.begin; i0 < strips.end; i0 += own.panel, panel_block += own.blocks) {
    const int64_t i1 = std::min(i0 + own.panel, strips.end);
    for (int64_t j0 = 0; j0 < shared.x_strips; j0 += kChunkStrips) {
      const int64_t j1 = std::min(j0 + kChunkStrips, shared.x_strips);
      for (int64_t b = 0; b < own.blocks; ++b) {
        const int64_t g0 = b * kBlockGroups, g1 = std::min(g0 + kBlockGroups, shared.groups);
        const int64_t steps = (g1 - g0) * kGroupSteps, elements = steps * kStepTiles;
        const bf16* w = slot(panel_block + b);
        const bool last = b + 1 == own.blocks;
        if (!last && j0 == 0) begin_decoding(i0, b + 1, panel_block + b + 1);
        if (last && j1 == shared.x_strips && i1 < strips.end) {
          begin_decoding(i1, 0, panel_block + own.blocks);
        }
        int64_t tiles = (j1 - j0) * (i1 - i0);
        for (int64_t j = j0; j < j1; ++j) {
          const bf16* x = shared.x + j * shared.x_stride() + g0 * kGroupSteps * kStepTiles;
          // The strip of X after this one, or the first of the block after this one.
          const bf16* next = j + 1 < j1 ? x + shared.x_stride()
                                        : (last ? shared.x + j0 * shared.x_stride()
                                                : shared.x + j0 * shared.x_stride() +
                                                      g1 * kGroupSteps * kStepTiles);
          const int64_t slice = round_up(elements / (i1 - i0), 32);
          for (int64_t i = i0; i < i1; ++i, --tiles) {
            float* sum = own.sums + ((j - j0) * own.panel + (i - i0)) * kStrip * kStrip;
            const int64_t decode = (decoder.units() + tiles - 1) / tiles;
            Beside beside(pending, decoder, decode, steps, next + (i - i0) * slice, slice);
            with_shape(p.weight->n - i * kStrip, p.m - j * kStrip,
                       [&](auto two_rows, auto two_columns) {
                         constexpr bool R = decltype(two_rows)::value;
                         constexpr bool C = decltype(two_columns)::value;
                         b == 0 ? zero_tiles<R, C>() : load_tiles<R, C>(sum);
                         add_products<R, C>(w + (i - i0) * elements, x, steps, shared.width, beside);
                         if (last) {
                           finish_tile<R, C>(p, shared, unscaled, i, j, sum, own.update);
                         } else {
                           store_tiles<R, C>(sum);
                         }
                       });
            if (last) {
              pending.set(sum, p.rank > 0 ? own.update : nullptr, i * kStrip, j * kStrip);
            }
          }
        }
        decoder.finish();
      }
    }
  }
  pending.flush();
}

}  // namespace
}  // namespace lora_kernels::quant_linear
