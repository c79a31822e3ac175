// The one tile configuration of the AMX kernels: eight tiles of 16 rows x 64 bytes.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace lora_kernels::cpu {

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// In static storage on purpose: GCC's _tile_loadconfig claims to read 8 of the 64 bytes, so the
// stores that fill a local would be dropped.
alignas(64) inline constexpr TileConfig kTileConfig;

}  // namespace lora_kernels::cpu
