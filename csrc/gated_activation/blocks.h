// Activation and products with adapters, kBlockRows rows at a time.
//
// The row loops of rows.h write a strip of kStrip columns, long enough for the prefetcher and small
// enough for L2; then the engine takes kPanel columns of it after the other into its operand layout
// (zeros beyond the edges), and both products run from L1.
// Engines: product_amx.h (tiles, bf16) and product_fma.h (vectors, any dtype).
#pragma once

#include <algorithm>
#include <cstring>

#include "rows.h"

namespace lora_kernels::gated_activation {
namespace {

template <class Engine, class T, Kind kKind, bool kGated>
void run_blocks(const BlocksParams& p, int64_t begin, int64_t end, float* workspace) {
  using E = typename Engine::Element;
  alignas(64) E taken[kBlockRows * kPanel];
  alignas(64) typename Engine::Turned turned;
  const int64_t columns = p.rows.columns;
  float* sums[kMaxMembers] = {};
  for (int64_t m = 0; m < p.members; ++m) {
    sums[m] = workspace;
    workspace += sums_size(p, m);
    std::memset(sums[m], 0, sums_size(p, m) * sizeof(float));
  }
  float *partial[kMaxMembers], *products[kMaxMembers];
  E* s[kMaxMembers];
  for (int64_t m = 0; m < p.members; ++m) {
    const int64_t size = kBlockRows * padded_rank(p.member[m].rank);
    products[m] = workspace;
    s[m] = reinterpret_cast<E*>(workspace + size);
    partial[m] = workspace + 2 * size;
    workspace += 2 * size + sums_size(p, m);
    std::memset(partial[m], 0, sums_size(p, m) * sizeof(float));
  }
  Engine::enter();
  int64_t summed = 0;
  for (int64_t r0 = begin; r0 < end; r0 += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, end - r0);
    for (int64_t m = 0; m < p.members; ++m) {
      const Member& of = p.member[m];
      const int64_t rank = padded_rank(of.rank);
      std::memset(products[m], 0, kBlockRows * rank * sizeof(float));
      if (of.s != nullptr) {
        Engine::pack_s(static_cast<const T*>(of.s) + r0 * of.lds, of.lds, rows, of.rank, s[m]);
      }
    }
    for (int64_t c1 = 0; c1 < columns; c1 += kStrip) {
      const int64_t strip = std::min(kStrip, columns - c1);
      for (int64_t i = 0; i < rows; ++i) part_of_row<T, kKind, kGated>(p.rows, r0 + i, c1, strip);
      for (int64_t m = 0; m < p.members; ++m) {
        const Member& of = p.member[m];
        const void* made = p.rows.dh == nullptr ? p.rows.h : m == 0 ? p.rows.dgate : p.rows.dup;
        const int64_t rank = padded_rank(of.rank);
        for (int64_t c0 = c1; c0 < c1 + strip; c0 += kPanel) {
          const int64_t n = std::min(kPanel, columns - c0);
          const T* block = static_cast<const T*>(made) + r0 * columns + c0;
          for (int64_t i = 0; i < rows; ++i) {
            Engine::take(block + i * columns, n, taken + i * kPanel);
          }
          std::memset(taken + rows * kPanel, 0, (kBlockRows - rows) * kPanel * sizeof(E));
          Engine::shrink(taken, static_cast<const E*>(of.packed) + c0 * rank, rank, products[m]);
          if (of.s != nullptr) {
            Engine::outer(taken, turned, s[m], rank, rows, c0, padded_columns(columns), partial[m]);
          }
        }
      }
    }
    for (int64_t m = 0; m < p.members; ++m) {
      const Member& of = p.member[m];
      const int64_t rank = padded_rank(of.rank);
      for (int64_t i = 0; i < rows; ++i) {
        T* out = static_cast<T*>(of.out) + (r0 + i) * of.ldout;
        for (int64_t j = 0; j < of.rank; ++j) from_float(of.scaling * products[m][i * rank + j], out[j]);
      }
    }
    summed += rows;
    if (summed < Engine::kSummedRows && r0 + rows < end) continue;
    summed = 0;
    for (int64_t m = 0; m < p.members; ++m) {
      for (int64_t i = 0; i < sums_size(p, m); i += LK_LANES) {
        store_vec(sums[m] + i, load(sums[m] + i) + load(partial[m] + i));
        store_vec(partial[m] + i, Vec{});
      }
    }
  }
  Engine::leave();
}

template <class Engine, class T, Kind kKind>
void run_of_kind(const BlocksParams& p, int64_t begin, int64_t end, float* workspace) {
  if (p.rows.up == nullptr) {
    run_blocks<Engine, T, kKind, false>(p, begin, end, workspace);
  } else {
    run_blocks<Engine, T, kKind, true>(p, begin, end, workspace);
  }
}

template <class Engine, class T, Kind kKind>
const Blocks* blocks_of_kind() {
  static const Blocks blocks{&Engine::pack, &run_of_kind<Engine, T, kKind>, &Engine::finish};
  return &blocks;
}

template <class Engine, class T>
const Blocks* blocks_of(Kind kind) {
  switch (kind) {
    case Kind::kSilu:
      return blocks_of_kind<Engine, T, Kind::kSilu>();
    case Kind::kGelu:
      return blocks_of_kind<Engine, T, Kind::kGelu>();
    case Kind::kGeluTanh:
      return blocks_of_kind<Engine, T, Kind::kGeluTanh>();
    case Kind::kRelu:
      return blocks_of_kind<Engine, T, Kind::kRelu>();
    case Kind::kReluSquared:
      return blocks_of_kind<Engine, T, Kind::kReluSquared>();
  }
  return nullptr;
}

}  // namespace
}  // namespace lora_kernels::gated_activation
