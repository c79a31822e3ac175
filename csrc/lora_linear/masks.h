// Dropout keep bits of a chunk of rows.
#pragma once

#include "lora_linear.h"

namespace lora_kernels::lora_linear {
namespace {

// Keep bits of `rows` rows: bit k % 32 of word k / 32. Words per row: mask_words(k).
inline int64_t mask_words(int64_t k) { return round_up(k, 128) / 32; }

inline void make_masks(const DropoutParams& d, int64_t row, int64_t rows, int64_t k,
                       uint32_t stream, uint32_t* masks) {
  const int64_t words = mask_words(k);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t block = 0; block < words / 4; ++block) {
      philox_keep_block(d, static_cast<uint32_t>(row + i), static_cast<uint32_t>(block), stream,
                        masks + i * words + 4 * block);
    }
  }
}

}  // namespace
}  // namespace lora_kernels::lora_linear
