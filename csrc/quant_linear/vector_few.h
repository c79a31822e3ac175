// The forward of a few rows of X on vectors: codes become sums in registers, rows of W side by side
// share the loads of X. A decoded weight is never stored.
#pragma once

#include "vector_operands.h"

namespace lora_kernels::quant_linear {
namespace {

constexpr int64_t kFewInputs = kInputBlock;

// The sums of add_dots, in its order.
template <Codes kCodes, Spread kSpread, int kRows, int kInputs>
void add_few(const VectorRows& weight, const CodeRow* rows, const float* x, int64_t ldx,
             int64_t groups, float* sums) {
  using Values = GroupValues<kCodes>;
  const typename Values::Table table(weight.weight());
  Vec total[kRows][kInputs] = {};
  uint8_t tails[kRows][kColumns];
  for (int64_t g = 0; g < groups; ++g) {
    const float* in = x + g * kColumns;
    Vec part[kRows][kInputs] = {};
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      Vec zeros{};
      if constexpr (Values::kHasZeros) zeros = weight.lanes<kSpread>(rows[i].zero, rows[i], g);
      Values values(weight.group_codes<kCodes>(rows[i], g, tails[i]), zeros);
#pragma GCC unroll 8
      for (int s = 0; s < kVectors; ++s) {
        const Vec w = values.next(s, table);
#pragma GCC unroll 4
        for (int j = 0; j < kInputs; ++j) part[i][j] += w * load(in + j * ldx + s * kLanes);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const Vec factor = weight.factors<kCodes, kSpread>(rows[i], g);
#pragma GCC unroll 4
      for (int j = 0; j < kInputs; ++j) total[i][j] += part[i][j] * factor;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kInputs; ++j) store_vec(sums + (i * kInputs + j) * kLanes, total[i][j]);
  }
}

template <Codes kCodes, Spread kSpread>
void multiply_few_as(const FwdParams& p, const VectorShared& shared, const VectorOwn& own,
                     const VectorRows& weight, Span rows) {
  constexpr int kFewRows = LK_LANES == 16 ? 4 : 2;
  const int64_t width = shared.rank_vectors * kLanes, ldx = shared.groups * kColumns;
  const int64_t scales = VectorRows::scratch_floats(*p.weight);
  const int m = static_cast<int>(p.m);
  for (int64_t n0 = rows.begin; n0 < rows.end; n0 += kFewRows) {
    const int64_t n = std::min<int64_t>(kFewRows, rows.end - n0);
    CodeRow code_rows[kFewRows];
    for (int64_t i = 0; i < n; ++i) code_rows[i] = weight.row(n0 + i, own.scales + i * scales);
    read_b(p, n0, n, width, own.b);
    const auto add = [&](auto inputs) {
      constexpr int kInputs = decltype(inputs)::value;
      constexpr int kRows = kInputs == 1 ? kFewRows : kFewRows / 2;
      int64_t i = 0;
      for (; i + kRows <= n; i += kRows) {
        add_few<kCodes, kSpread, kRows, kInputs>(weight, code_rows + i, shared.x, ldx,
                                                 shared.groups, own.sums + i * kInputs * kLanes);
      }
      for (; i < n; ++i) {
        add_few<kCodes, kSpread, 1, kInputs>(weight, code_rows + i, shared.x, ldx, shared.groups,
                                             own.sums + i * kInputs * kLanes);
      }
    };
    if (m == 1) {
      add(std::integral_constant<int, 1>{});
    } else if (m == 2) {
      add(std::integral_constant<int, 2>{});
    } else if constexpr (kInputBlock > 2) {
      m == 3 ? add(std::integral_constant<int, 3>{}) : add(std::integral_constant<int, 4>{});
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < m; ++j) {
        finish(p, shared, weight.factor(), own.b + i * width, own.sums + (i * m + j) * kLanes, j,
               n0 + i);
      }
    }
  }
}

inline void multiply_few(const FwdParams& p, const VectorShared& shared, const VectorOwn& own,
                         const VectorRows& weight, Span rows) {
  const auto spread = [&](auto codes) {
    constexpr Codes kCodes = decltype(codes)::value;
    if (weight.spread() == Spread::kOne) {
      return multiply_few_as<kCodes, Spread::kOne>(p, shared, own, weight, rows);
    }
    if constexpr (kCodes == Codes::kTable || kCodes == Codes::kZeros) {
      if (weight.spread() == Spread::kTwo) {
        return multiply_few_as<kCodes, Spread::kTwo>(p, shared, own, weight, rows);
      }
      multiply_few_as<kCodes, Spread::kAny>(p, shared, own, weight, rows);
    }
  };
  switch (weight.codes()) {
    case Codes::kTable:
      return spread(std::integral_constant<Codes, Codes::kTable>{});
    case Codes::kZeros:
      return spread(std::integral_constant<Codes, Codes::kZeros>{});
    case Codes::kInt8:
      return spread(std::integral_constant<Codes, Codes::kInt8>{});
    case Codes::kFp8:
      return spread(std::integral_constant<Codes, Codes::kFp8>{});
    case Codes::kDecoded:
      break;
  }
}

}  // namespace
}  // namespace lora_kernels::quant_linear
