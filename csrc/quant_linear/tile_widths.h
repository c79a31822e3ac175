// Tile configurations for right operands and accumulators of fewer than 16 columns.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace lora_kernels::quant_linear {

struct TileWidths {
  struct Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t column_bytes[16] = {};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  Config of[17];

  // Tiles 0-3 accumulate, 4 and 5 are left operands, 6 and 7 right ones.
  constexpr TileWidths() {
    for (int width = 0; width <= 16; ++width) {
      for (int t = 0; t < 8; ++t) {
        of[width].column_bytes[t] = static_cast<uint16_t>(t == 4 || t == 5 ? 64 : 4 * width);
      }
    }
  }
};

// In static storage on purpose, see csrc/cpu/amx_config.h.
alignas(64) inline constexpr TileWidths kTileWidths;

}  // namespace lora_kernels::quant_linear
