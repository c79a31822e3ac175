// Scores of one row against a strip of keys: biases, masks, visible ranges.
#pragma once

#include "../common/vector_math.h"
#include "operands.h"

namespace lora_kernels::attention {
namespace {

// One query head of one sequence.
struct Head {
  int64_t b, h, stream;
  Sequence span;
  int64_t offset;  // a row's position among the keys
  int64_t left, right;
  float scale, cap_in, cap, slope;  // 0: no softcap, no slope
  Mask mask;
  DropoutParams dropout;
  float keep_scale;

  Head(const Problem& p, int64_t b, int64_t h)
      : b(b), h(h), stream(b * p.heads + h), span(p.sequences[b]), left(p.left), right(p.right),
        scale(p.scale), cap(p.softcap), mask(p.mask), dropout(p.dropout), keep_scale(p.keep_scale) {
    offset = span.keys - span.rows;
    cap_in = p.softcap != 0.0f ? p.scale / p.softcap : 0.0f;
    slope = p.slopes != nullptr ? p.slopes[b * p.slopes_batch + h] : 0.0f;
  }

  Range seen(int64_t i) const { return seen_keys(span, left, right, i); }
  Range seen(int64_t i0, int64_t i1) const { return {seen(i0).begin, seen(i1 - 1).end}; }
};

inline bool is_plain(const Problem& p) {
  return p.softcap == 0.0f && p.slopes == nullptr && p.mask.kind == MaskKind::kNone &&
         p.dropout.threshold == 0;
}

template <class T>
inline Vec mask_values(const Mask& m, int64_t at, int64_t count) {
  const T* p = static_cast<const T*>(m.data) + at;
  if (m.key == 1 && count >= LK_LANES) return load(p);
  Vec v{};
  for (int64_t l = 0; l < std::min<int64_t>(count, LK_LANES); ++l) v[l] = to_float(p[l * m.key]);
  return v;
}

// z with the mask of scores (i, j..j + LANES) of a head; nothing past `count` keys.
inline Vec masked(const Head& head, int64_t i, int64_t j, int64_t count, Vec z) {
  const Mask& m = head.mask;
  const int64_t at = head.b * m.batch + head.h * m.head + i * m.row + j * m.key;
  switch (m.kind) {
    case MaskKind::kBool: {
      const auto* p = static_cast<const uint8_t*>(m.data) + at;
      IVec hidden{};
      if (m.key == 1 && count >= LK_LANES) {
        typedef uint8_t Bytes __attribute__((vector_size(LK_LANES), aligned(1), may_alias));
        hidden = (IVec)(__builtin_convertvector(*reinterpret_cast<const Bytes*>(p), IVec) == 0);
      } else {
        for (int64_t l = 0; l < std::min<int64_t>(count, LK_LANES); ++l) {
          hidden[l] = p[l * m.key] == 0 ? -1 : 0;
        }
      }
      return choose(hidden, broadcast(-kInfinity), z);
    }
    case MaskKind::kFloat32:
      return z + mask_values<float>(m, at, count);
    case MaskKind::kBFloat16:
      return z + mask_values<bf16>(m, at, count);
    case MaskKind::kFloat16:
      return z + mask_values<fp16>(m, at, count);
    default:
      return z;
  }
}

// 2^((z - base) / ln 2). The difference is rounded before its factor: rounding the factor first
// would err by a share of z, which may be thousands.
template <class E>
inline Vec weights_of(Vec z, float base) {
  return exp2_vec<E::kExpDegree>((z - base) * kLog2E);
}

// Scores of row i and keys j.. from the product s; `slope` is 1 - tanh^2 below a softcap.
template <bool kPlain>
inline Vec biased(const Head& head, int64_t i, int64_t j, Vec s, Vec* slope = nullptr) {
  if constexpr (kPlain) return s * head.scale;
  Vec z;
  if (head.cap_in != 0.0f) {
    const Vec t = tanh_vec(s * head.cap_in);
    z = t * head.cap;
    if (slope != nullptr) *slope = 1.0f - t * t;
  } else {
    z = s * head.scale;
    if (slope != nullptr) *slope = broadcast(1.0f);
  }
  if (head.slope != 0.0f) {
    const Vec lane = __builtin_convertvector(lane_numbers(), Vec);
    z -= head.slope * absolute(static_cast<float>(i + head.offset - j) - lane);
  }
  return masked(head, i, j, head.span.keys - j, z);
}

// Keep bits of dropout for row i and the BC columns from j0 (a multiple of 128) on.
template <int kColumns>
struct Kept {
  uint32_t bits[kColumns / 32];
  void draw(const Head& head, int64_t i, int64_t j0) {
    for (int block = 0; block < kColumns / 128; ++block) {
      philox_keep_block(head.dropout, static_cast<uint32_t>(i),
                        static_cast<uint32_t>(j0 / 128 + block),
                        static_cast<uint32_t>(head.stream), bits + 4 * block);
    }
  }
  IVec lanes(int64_t column) const {
    return lanes_of(bits[column / 32], static_cast<int>(column % 32));
  }
};

}  // namespace
}  // namespace lora_kernels::attention
