// From q k to exponents: scale, softcap, ALiBi, window, dropout. Exponents are in units of log 2.
#pragma once

#include "../../common/exponential.cuh"
#include "../../common/philox.h"
#include "sequences.cuh"

namespace lora_kernels::attention::cuda {

constexpr float kInfinity = INFINITY;

// Is more to be done to a raw score than a multiplication by a positive factor? Such kernels are
// instantiations of their own (kModified).
inline bool modified(const AttentionParams& p) {
  return p.softcap != 0.0f || p.slopes != nullptr || p.drop_threshold != 0 || !(p.scale > 0.0f);
}

struct Span {
  int low, high;  // inclusive
};

// Keys that a query of a sequence sees, and queries that see a key.
struct Window {
  int left, right, offset, keys;

  LK_DEVICE Window(const AttentionParams& p, const Sequence& s)
      : left(p.left), right(p.right), offset(s.offset()), keys(s.keys) {
    if (LK_FAULT(kWindowEdge) && right >= 0) ++right;
  }

  LK_DEVICE Span keys_of(int row) const {
    const int position = row + offset;
    const int last = right < 0 ? keys - 1 : position + right;
    return {left < 0 ? 0 : position - left, last < keys - 1 ? last : keys - 1};
  }

  LK_DEVICE Span rows_of(int key) const {
    const int position = key - offset;
    return {right < 0 ? 0 : position - right, left < 0 ? INT32_MAX : position + left};
  }

  // Do all queries of [row, row + rows) see all keys of [key, key + count)?
  LK_DEVICE bool covers(int row, int rows, int key, int count) const {
    return keys_of(row).high >= key + count - 1 && keys_of(row + rows - 1).low <= key;
  }
};

// What turns a raw score into an exponent.
template <bool kModified>
struct Exponent {
  float factor;  // exponent = factor * value(score); 1 where kModified
  float scale = 1.0f, cap = 0.0f, cap_log2 = 0.0f, slope = 0.0f;

  LK_DEVICE Exponent(const AttentionParams& p, int b, int head) {
    factor = p.scale * kLog2E;
    if constexpr (kModified) {
      scale = factor;
      factor = 1.0f;
      cap = p.softcap;
      if (cap != 0.0f) {
        scale = p.capped_scale;
        cap_log2 = cap * kLog2E;
      }
      if (p.slopes != nullptr) {
        slope = p.slopes[static_cast<int64_t>(b) * p.slopes_batch + head] * kLog2E;
      }
    }
  }

  // `derivative`: of the softcap, d z / d (scale q k).
  LK_DEVICE float value(float score, int distance, float& derivative) const {
    derivative = 1.0f;
    if constexpr (!kModified) return score;
    float z = scale * score;
    if (cap != 0.0f) {
      const float t = tanh_of(z);
      derivative = 1.0f - t * t;
      z = cap_log2 * t;
    }
    if (slope != 0.0f) z -= slope * static_cast<float>(distance < 0 ? -distance : distance);
    return z;
  }
};

// Counter-based dropout of the weights (_philox.py): row = query, column = key, stream = b H + h.
// Where everything is dropped, keep_scale is 0, and what the draws say does not matter.
struct Keep {
  uint32_t bound = 0, key0 = 0, key1 = 0, stream = 0;  // bound: the threshold in the upper half

  LK_DEVICE Keep(const AttentionParams& p, int b, int head) {
    if (p.drop_threshold == 0) return;
    bound = p.drop_threshold << 16;
    const uint64_t seed = static_cast<uint64_t>(*p.seed);
    key0 = static_cast<uint32_t>(seed);
    key1 = static_cast<uint32_t>(seed >> 32);
    stream = static_cast<uint32_t>(b * p.heads + head);
  }

  // Words of the column pairs 128 block + 32 w + 2 pair of a row.
  LK_DEVICE void words(int row, int block, int pair, uint32_t (&w)[4]) const {
    if (LK_FAULT(kShiftedMask)) ++row;
    philox_words(key0, key1, static_cast<uint32_t>(16 * block + pair), static_cast<uint32_t>(row),
                 stream, w);
  }

  LK_DEVICE bool low(uint32_t word) const { return word << 16 >= bound; }
  LK_DEVICE bool high(uint32_t word) const { return word >= bound; }

  // Bit 4 c + 2 r + e: is register (j, e) of an accumulator kept, j = c + 4 r, for the kKeys keys
  // from `key` on (a multiple of kKeys)? e is the parity of the column, r of 32 columns.
  template <int kKeys>
  LK_DEVICE uint32_t bits(int row, int key, int quad) const {
    static_assert(kKeys == 32 || kKeys == 64);
    uint32_t kept = 0;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      uint32_t w[4];
      words(row, key / 128, 4 * c + quad, w);
      const bool second = key % 128 >= 64;
      uint32_t a = second ? w[2] : w[0], b = second ? w[3] : w[1];
      if (kKeys == 32 && key % 64 >= 32) a = b;
      kept |= (low(a) ? 1u : 0u) << 4 * c | (high(a) ? 2u : 0u) << 4 * c;
      if (kKeys == 64) kept |= (low(b) ? 4u : 0u) << 4 * c | (high(b) ? 8u : 0u) << 4 * c;
    }
    return kept;
  }

  LK_DEVICE static bool bit(uint32_t bits, int j, int e) {
    return bits >> (4 * (j % 4) + 2 * (j / 4) + e) & 1u;
  }
};

}  // namespace lora_kernels::attention::cuda
