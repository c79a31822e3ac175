// Groups of codes of a weight as vectors of LK_LANES fp32 values, and the factors of their sums.
//
// A group is 8 vectors of columns. Codes of 4 bits are read as 32-bit words, one per lane, so vector
// s of a group holds nibble s of all words (column() says which columns these are); codes of a byte
// come in natural order. The values are those of the codes alone (int4: less the zero point; fp8:
// times 2^-8, so that fp16 holds them); a scale multiplies the sum of a group, lane by lane. Weights
// whose scales do not fit this come decoded, with factors of one.
#pragma once

#include "../common/vector.h"
#include "decode.h"

namespace lora_kernels::quant_linear {
namespace {

constexpr int64_t kLanes = LK_LANES, kVectors = 8, kColumns = kLanes * kVectors;  // of a group

inline Vec splat(float v) { return v - Vec{}; }

enum class Codes { kTable, kZeros, kInt8, kFp8, kDecoded };
// Scales of a group: one, two halves of the lanes, or any number.
enum class Spread { kOne, kTwo, kAny };

// The values of one group, vector by vector from s = 0.
template <Codes kCodes>
class GroupValues;

template <>
class GroupValues<Codes::kTable> {
 public:
  static constexpr bool kHasZeros = false;
#if LK_LANES == 16 && defined(__AVX512F__)
  struct Table {
    __m512 values;
    explicit Table(const Weight& w) : values(_mm512_loadu_ps(w.table)) {}
  };
  GroupValues(const uint8_t* codes, Vec) : index_(_mm512_loadu_si512(codes)) {}
  Vec next(int, const Table& table) {
    const __m512 v = _mm512_permutexvar_ps(index_, table.values);
    index_ = _mm512_srli_epi32(index_, 4);
    return (Vec)v;
  }

 private:
  __m512i index_;
#elif LK_LANES == 8 && defined(__AVX2__)
  struct Table {
    __m256 low, high;
    explicit Table(const Weight& w)
        : low(_mm256_loadu_ps(w.table)), high(_mm256_loadu_ps(w.table + 8)) {}
  };
  GroupValues(const uint8_t* codes, Vec)
      : index_(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes))) {}
  Vec next(int s, const Table& table) {
    const __m256i index = _mm256_srli_epi32(index_, 4 * s);
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index_, 28 - 4 * s));
    return (Vec)_mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, index),
                                 _mm256_permutevar8x32_ps(table.high, index), upper);
  }

 private:
  __m256i index_;
#else
  struct Table {
    const float* values;
    explicit Table(const Weight& w) : values(w.table) {}
  };
  GroupValues(const uint8_t* codes, Vec) : codes_(codes) {}
  Vec next(int s, const Table& table) {
    Vec v;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      v[lane] = table.values[(codes_[4 * lane + s / 2] >> (s % 2 * 4)) & 15];
    }
    return v;
  }

 private:
  const uint8_t* codes_;
#endif
};

template <>
class GroupValues<Codes::kZeros> {
 public:
  static constexpr bool kHasZeros = true;
  struct Table {
    explicit Table(const Weight&) {}
  };
#if LK_LANES == 16 && defined(__AVX512F__)
  GroupValues(const uint8_t* codes, Vec zeros)
      : index_(_mm512_loadu_si512(codes)), zeros_(zeros) {}
  Vec next(int s, const Table&) {
    const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (Vec)_mm512_permutexvar_ps(_mm512_srli_epi32(index_, 4 * s), values) - zeros_;
  }

 private:
  __m512i index_;
#elif LK_LANES == 8 && defined(__AVX2__)
  GroupValues(const uint8_t* codes, Vec zeros)
      : index_(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes))), zeros_(zeros) {}
  Vec next(int s, const Table&) {
    const __m256i nibble =
        _mm256_and_si256(_mm256_srli_epi32(index_, 4 * s), _mm256_set1_epi32(15));
    return (Vec)_mm256_cvtepi32_ps(nibble) - zeros_;
  }

 private:
  __m256i index_;
#else
  GroupValues(const uint8_t* codes, Vec zeros) : codes_(codes), zeros_(zeros) {}
  Vec next(int s, const Table&) {
    Vec v;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      v[lane] = static_cast<float>((codes_[4 * lane + s / 2] >> (s % 2 * 4)) & 15);
    }
    return v - zeros_;
  }

 private:
  const uint8_t* codes_;
#endif
  Vec zeros_;
};

template <>
class GroupValues<Codes::kInt8> {
 public:
  static constexpr bool kHasZeros = false;
  struct Table {
    explicit Table(const Weight&) {}
  };
  GroupValues(const uint8_t* codes, Vec) : codes_(codes) {}
  Vec next(int s, const Table&) {
    const uint8_t* from = codes_ + s * kLanes;
#if LK_LANES == 16 && defined(__AVX512F__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#elif LK_LANES == 8 && defined(__AVX2__)
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#else
    Vec v;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      v[lane] = static_cast<float>(static_cast<int8_t>(from[lane]));
    }
    return v;
#endif
  }

 private:
  const uint8_t* codes_;
};

template <>
class GroupValues<Codes::kFp8> {
 public:
  static constexpr bool kHasZeros = false;
  struct Table {
    explicit Table(const Weight&) {}
  };
  GroupValues(const uint8_t* codes, Vec) : codes_(codes) {}

  // A code shifted by 7 is its value times 2^-8 in fp16, whose subnormals convert at full speed.
  // The carry of NaN, 0x7f, plus 1 is the top bit of the exponent, which makes it NaN there, too.
#if LK_LANES == 16 && defined(__AVX512BW__)
  Vec next(int s, const Table&) {
    if (s % 2 == 1) return (Vec)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(pair_, 1));
    const __m256i bytes =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes_ + s * kLanes));
    const __m512i shifted = _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(bytes), 7),
                                             _mm512_set1_epi16(static_cast<short>(0xbf80)));
    constexpr int kOrAnd = 0xf8;  // a | (b & c)
    pair_ = _mm512_ternarylogic_epi32(shifted, _mm512_add_epi16(shifted, _mm512_set1_epi16(0x80)),
                                      _mm512_set1_epi16(0x4000), kOrAnd);
    return (Vec)_mm512_cvtph_ps(_mm512_castsi512_si256(pair_));
  }

 private:
  __m512i pair_;
#elif LK_LANES == 8 && defined(__AVX2__) && defined(__F16C__)
  Vec next(int s, const Table&) {
    if (s % 2 == 1) return (Vec)_mm256_cvtph_ps(_mm256_extracti128_si256(pair_, 1));
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes_ + s * kLanes));
    const __m256i shifted = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7),
                                             _mm256_set1_epi16(static_cast<short>(0xbf80)));
    const __m256i carry = _mm256_and_si256(_mm256_add_epi16(shifted, _mm256_set1_epi16(0x80)),
                                           _mm256_set1_epi16(0x4000));
    pair_ = _mm256_or_si256(shifted, carry);
    return (Vec)_mm256_cvtph_ps(_mm256_castsi256_si128(pair_));
  }

 private:
  __m256i pair_;
#else
  Vec next(int s, const Table&) {
    Vec v;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      v[lane] = fp8_to_float(codes_[s * kLanes + lane]) * 0x1p-8f;
    }
    return v;
  }

 private:
#endif
  const uint8_t* codes_;
};

// One row of W.
struct CodeRow {
  const uint8_t* codes;
  const float *scale, *zero;  // of the first block that the row has a part of
  int64_t offset;             // of the row's first element in that block
};

// Rows of W as groups.
class VectorRows {
 public:
  explicit VectorRows(const Weight& w) : w_(w) {
    const bool power = (w.block & (w.block - 1)) == 0;
    one_ = w.scale_columns == 1;
    while (power && (int64_t{1} << shift_) < w.block) ++shift_;
    if (w.layout == Layout::kFlat) {
      one_ = false;
      if (w.k % 8 == 0 && power && w.block >= 8) codes_ = Codes::kTable;
    } else if (w.layout == Layout::kInt4) {
      if (w.group_of == nullptr && (one_ || (power && w.block >= 8))) codes_ = Codes::kZeros;
    } else if (w.layout == Layout::kInt8) {
      one_ = true;
      codes_ = Codes::kInt8;
    } else if (one_ || (power && w.block >= kColumns)) {
      codes_ = Codes::kFp8;
    }
    const bool aligned = w.layout != Layout::kFlat || w.k % w.block == 0;
    if (one_ || (aligned && w.block >= kColumns)) {
      spread_ = Spread::kOne;
    } else if (aligned && 2 * w.block == kColumns) {
      spread_ = Spread::kTwo;
    }
  }
  Codes codes() const { return codes_; }
  Spread spread() const { return spread_; }
  bool nibbles() const { return codes_ == Codes::kTable || codes_ == Codes::kZeros; }
  const Weight& weight() const { return w_; }

  // What the sum of a row is multiplied by at last.
  float factor() const { return codes_ == Codes::kInt8 ? w_.factor : 1.0f; }

  // Column of lane `lane` of vector s.
  static int64_t column(bool nibbles, int64_t s, int64_t lane) {
    return nibbles ? 8 * lane + (s ^ 1) : s * kLanes + lane;
  }

  // Floats that row() wants for nested scales.
  static int64_t scratch_floats(const Weight& w) {
    return w.layout == Layout::kFlat && w.scale == nullptr ? w.k / w.block + 2 : 0;
  }
  CodeRow row(int64_t n, float* scratch) const {
    if (w_.layout == Layout::kFlat) {
      const int64_t first = n * w_.k / w_.block, last = ((n + 1) * w_.k - 1) / w_.block;
      const float* scale = scratch;
      if (w_.scale != nullptr) {
        scale = w_.scale + first;
      } else {
        flat_scales(w_, first, last - first + 1, scratch);
      }
      return {w_.codes + n * w_.k / 2, scale, nullptr, n * w_.k % w_.block};
    }
    if (w_.layout == Layout::kInt4) {
      const int64_t at = n * w_.scale_columns;
      return {w_.codes + n * w_.row_bytes, w_.scale + at, w_.zero + at, 0};
    }
    const int64_t at = w_.layout == Layout::kInt8 ? n : n / w_.block_rows * w_.scale_columns;
    return {w_.codes + n * w_.k, w_.scale + at, nullptr, 0};
  }

  // Statistics of group g in the lanes; no block after the row's last is read.
  template <Spread kSpread>
  Vec lanes(const float* statistics, const CodeRow& row, int64_t g) const {
    const int64_t element = row.offset + g * kColumns;
    const int64_t block = one_ ? 0 : element >> shift_;
    if constexpr (kSpread == Spread::kOne) return splat(statistics[block]);
    if constexpr (kSpread == Spread::kTwo) {
      const float low = statistics[block];
      const float high = w_.k - g * kColumns > kColumns / 2 ? statistics[block + 1] : low;
#if LK_LANES == 16 && defined(__AVX512F__)
      return (Vec)_mm512_mask_mov_ps(_mm512_set1_ps(low), 0xff00, _mm512_set1_ps(high));
#else
      Vec v;
      for (int64_t lane = 0; lane < kLanes; ++lane) v[lane] = lane < kLanes / 2 ? low : high;
      return v;
#endif
    }
    const int64_t first = element - (block << shift_);
    const int64_t last = first + std::min(kColumns, w_.k - g * kColumns) - 1;
#if LK_LANES == 16 && defined(__AVX512F__)
    const auto valid = static_cast<__mmask16>((2u << (last >> shift_)) - 1u);
    const __m512i lane =
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i index =
        _mm512_srl_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(first / 8))),
                         _mm_cvtsi32_si128(static_cast<int>(shift_ - 3)));
    return (Vec)_mm512_permutexvar_ps(index, _mm512_maskz_loadu_ps(valid, statistics + block));
#else
    Vec v;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      v[lane] = statistics[block + (std::min(first + 8 * lane, last) >> shift_)];
    }
    return v;
#endif
  }
  template <Codes kCodes, Spread kSpread>
  Vec factors(const CodeRow& row, int64_t g) const {
    const Vec scale = lanes<kSpread>(row.scale, row, g);
    return kCodes == Codes::kFp8 ? scale * 256.0f : scale;
  }
  // Codes of group g, whole: through `tail` where the row ends in it.
  template <Codes kCodes>
  const uint8_t* group_codes(const CodeRow& row, int64_t g, uint8_t* tail) const {
    constexpr int64_t kBytes = kCodes == Codes::kTable || kCodes == Codes::kZeros
                                   ? kColumns / 2 : kColumns;
    const uint8_t* from = row.codes + g * kBytes;
    const int64_t count = w_.k - g * kColumns;
    if (count >= kColumns) return from;
    const int64_t bytes = kBytes == kColumns ? count : (count + 1) / 2;
    std::memcpy(tail, from, static_cast<size_t>(bytes));
    std::memset(tail + bytes, 0, static_cast<size_t>(kBytes - bytes));
    return tail;
  }

  // Values [8][kLanes] of group g of row n, and the factors [kLanes] of their sum.
  void group(int64_t n, const CodeRow& from, int64_t g, float* values, float* factors) const {
    switch (codes_) {
      case Codes::kTable:
        return spread_group<Codes::kTable>(from, g, values, factors);
      case Codes::kZeros:
        return spread_group<Codes::kZeros>(from, g, values, factors);
      case Codes::kInt8:
        return write_group<Codes::kInt8, Spread::kOne>(from, g, values, factors);
      case Codes::kFp8:
        return write_group<Codes::kFp8, Spread::kOne>(from, g, values, factors);
      case Codes::kDecoded:
        break;
    }
    const int64_t k0 = g * kColumns, count = std::min(kColumns, w_.k - k0);
    decode(w_, n, k0, count, values);
    std::fill(values + count, values + kColumns, 0.0f);
    store_vec(factors, splat(1.0f));
  }

 private:
  template <Codes kCodes>
  void spread_group(const CodeRow& row, int64_t g, float* values, float* factors) const {
    if (spread_ == Spread::kOne) return write_group<kCodes, Spread::kOne>(row, g, values, factors);
    if (spread_ == Spread::kTwo) return write_group<kCodes, Spread::kTwo>(row, g, values, factors);
    write_group<kCodes, Spread::kAny>(row, g, values, factors);
  }
  template <Codes kCodes, Spread kSpread>
  void write_group(const CodeRow& row, int64_t g, float* values, float* out) const {
    using Values = GroupValues<kCodes>;
    const typename Values::Table table(w_);
    uint8_t tail[kColumns];
    Vec zeros{};
    if constexpr (Values::kHasZeros) zeros = lanes<kSpread>(row.zero, row, g);
    Values from(group_codes<kCodes>(row, g, tail), zeros);
#pragma GCC unroll 8
    for (int s = 0; s < kVectors; ++s) store_vec(values + s * kLanes, from.next(s, table));
    store_vec(out, factors<kCodes, kSpread>(row, g));
  }

  const Weight& w_;
  Codes codes_ = Codes::kDecoded;
  Spread spread_ = Spread::kAny;
  bool one_ = false;
  int shift_ = 0;
};

}  // namespace
}  // namespace lora_kernels::quant_linear
