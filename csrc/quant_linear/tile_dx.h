// dX = dY W + (dS A) * D on AMX tiles: panels of columns of W by chunks of dY, in blocks of rows of W.
//
// For each panel of 256 columns, each chunk of 512 rows of dY, each block of 512 rows of W: the tiles
// of chunk x panel, a strip of dY in L1, the block of the panel in L2 (256 KB), fp32 sums in L2
// (512 KB) until the last block. Beside the products the next block is decoded, the next strip of dY
// fetched and the last tile stored. Where dY has more rows than a chunk the decoded panel is kept.
// Bytes: codes of W once; dY once per panel.
#pragma once

#include "../lora_linear/engine_amx.h"
#include "dx_panels.h"
#include "tile_beside.h"
#include "tile_columns.h"

namespace lora_kernels::quant_linear {
namespace {

// A finished tile of dX, stored some rows at a time.
class PendingRows {
 public:
  void set(float* c, const Output<lora_linear::AmxEngine>& output) {
    tail_.tiles[0] = c;
    tail_.row = 0;
    tail_.output = output;
  }
  int64_t steps() const { return (tail_.output.rows - tail_.row + kRows - 1) / kRows; }
  void step() {
    const int64_t end = std::min(tail_.row + kRows, tail_.output.rows);
    while (tail_.row < end) lora_linear::AmxEngine::step(tail_);
  }
  void flush() {
    while (steps() > 0) step();
  }

 private:
  static constexpr int64_t kRows = 2;
  lora_linear::AmxEngine::Tail tail_{};
};

template <>
class DxPass<lora_linear::AmxEngine> {
  using E = lora_linear::AmxEngine;
  static constexpr int64_t kPanelStrips = 8, kChunkStrips = 16, kBlockSteps = 16;

 public:
  DxPass() = default;
  DxPass(const BwdParams& p, lora_linear::Arena& arena) {
    if (p.dx == nullptr) return;
    const int64_t strips = round_up(p.m, kStrip) / kStrip;
    groups_ = round_up(p.weight->k, kGroup) / kGroup;
    steps_ = round_up(p.weight->n, kStep) / kStep;
    blocks_ = round_up(steps_, kBlockSteps) / kBlockSteps;
    slots_ = strips > kChunkStrips ? std::max<int64_t>(blocks_, 2) : 2;
    panel_ = arena.take<bf16>(slots_ * kPanelStrips * kBlockSteps * kStepTiles);
    sums_ = arena.take<float>(kPanelStrips * std::min(strips, kChunkStrips) * kStrip * kStrip);
    const bool drops = p.rank > 0 && p.dropout.threshold != 0;
    update_ = arena.take<float>(drops ? kStrip * kStrip : 0);
    for (float*& tile : masked_) tile = arena.take<float>(drops ? kStrip * kStrip : 0);
  }

  void run(const BwdParams& p, const BwdShared<E>& shared, int thread, int threads) {
    const int64_t k = p.weight->k;
    const bool stream = lora_linear::streams<E>(p.dx, p.lddx, p.m, k);
    const Span own = share(groups_, thread, threads);
    PendingRows pending;
    ColumnDecoder decoder(*p.weight);
    const auto slot = [&](int64_t block) {
      return panel_ + block % slots_ * kPanelStrips * kBlockSteps * kStepTiles;
    };
    const auto begin_decoding = [&](int64_t g0, int64_t b, int64_t block) {
      const int64_t n0 = b * kBlockSteps * kStep;
      decoder.begin(n0, std::min(n0 + kBlockSteps * kStep, p.weight->n), g0,
                    std::min(g0 + kPanelStrips / 2, own.end), kBlockSteps * kStepTiles, slot(block));
    };
    if (own.begin < own.end) {
      begin_decoding(own.begin, 0, 0);
      decoder.finish();
    }
    int64_t panel_block = 0;  // blocks of all panels before
    for (int64_t g0 = own.begin; g0 < own.end; g0 += kPanelStrips / 2, panel_block += blocks_) {
      const int64_t g1 = std::min(g0 + kPanelStrips / 2, own.end);
      const int64_t j0 = 2 * g0, j1 = std::min(2 * g1, (k + kStrip - 1) / kStrip);
      for (int64_t i0 = 0; i0 < shared.strips; i0 += kChunkStrips) {
        const int64_t i1 = std::min(i0 + kChunkStrips, shared.strips);
        for (int64_t b = 0; b < blocks_; ++b) {
          const bool last = b + 1 == blocks_;
          if (!last && i0 == 0) begin_decoding(g0, b + 1, panel_block + b + 1);
          if (last && i1 == shared.strips && g1 < own.end) {
            begin_decoding(g1, 0, panel_block + blocks_);
          }
          multiply_block(p, shared, {i0, i1}, {j0, j1}, b, slot(panel_block + b), stream, pending,
                         decoder);
          decoder.finish();
        }
      }
    }
    pending.flush();
  }

 private:
  void multiply_block(const BwdParams& p, const BwdShared<E>& shared, Span rows, Span columns,
                      int64_t b, const bf16* w, bool stream, PendingRows& pending,
                      ColumnDecoder& decoder) {
    const bool first = b == 0, last = b + 1 == blocks_;
    const bool drops = p.rank > 0 && p.dropout.threshold != 0;
    const int64_t step0 = b * kBlockSteps, steps = std::min(kBlockSteps, steps_ - step0);
    const int64_t width = columns.end - columns.begin;
    const int64_t slice = round_up(steps * kStepTiles / width, 32);
    int64_t tiles = (rows.end - rows.begin) * width;
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const bf16* dy = shared.dy + (i * steps_ + step0) * kStepTiles;
      const bf16* next = i + 1 < rows.end ? dy + steps_ * kStepTiles
                                          : shared.dy + (rows.begin * steps_ +
                                                         (last ? 0 : step0 + steps)) * kStepTiles;
      for (int64_t j = columns.begin; j < columns.end; ++j, --tiles) {
        const int64_t at = j - columns.begin;
        float* sum = sums_ + ((i - rows.begin) * kPanelStrips + at) * kStrip * kStrip;
        Output<E> out{};
        if (last) out = output(p, shared, i, j, stream);
        const int64_t decode = (decoder.units() + tiles - 1) / tiles;
        Beside beside(pending, decoder, decode, steps, next + at * slice, slice);
        with_shape(p.m - i * kStrip, p.weight->k - j * kStrip, [&](auto two_rows, auto two_columns) {
          constexpr bool R = decltype(two_rows)::value, C = decltype(two_columns)::value;
          first ? zero_tiles<R, C>() : load_tiles<R, C>(sum);
          add_products<R, C, Passing::kRight>(dy, w + at * kBlockSteps * kStepTiles, steps, 16,
                                              beside);
          if (last && p.rank > 0 && !drops) {
            add_products<R, C>(shared.ds + i * kStrip * shared.rk,
                               shared.a + j * kStrip * shared.rk, shared.rk / kStep, 16, [] {},
                               C ? kStepTiles : kTile);
          }
          store_tiles<R, C>(sum);
        });
        if (last) pending.set(sum, out);
      }
    }
  }

  // Where tile (i, j) goes; with dropout its masked low-rank product is computed here.
  Output<E> output(const BwdParams& p, const BwdShared<E>& shared, int64_t i, int64_t j,
                   bool stream) {
    const int64_t row = i * kStrip, column = j * kStrip, words = mask_words(p.weight->k);
    Output<E> out{static_cast<bf16*>(p.dx) + row * p.lddx + column,
                  p.lddx,
                  std::min(kStrip, p.m - row),
                  std::min(kStrip, p.weight->k - column),
                  nullptr,
                  nullptr,
                  stream};
    if (p.rank == 0 || p.dropout.threshold == 0) return out;
    float* masked = masked_[parity_ ^= 1];
    const int64_t width = strip_width<E>(p.weight->k, column);
    std::fill(masked, masked + kStrip * kStrip, 0.0f);
    const Segment<E> term{shared.ds + row * shared.rk, shared.a + column * shared.rk, shared.rk};
    E::micro(&term, 1, out.rows, width, update_, E::NR, false);
    E::add_masked(update_, out.rows, width, shared.masks + row * words, words, column, masked);
    out.extra = masked;
    return out;
  }

  int64_t groups_ = 0, steps_ = 0, blocks_ = 0, slots_ = 0;
  bf16* panel_ = nullptr;
  float *sums_ = nullptr, *update_ = nullptr, *masked_[2] = {};
  int parity_ = 0;
};

}  // namespace
}  // namespace lora_kernels::quant_linear
