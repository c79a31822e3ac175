// Columns of a quantized weight as right operands of the tile unit, for dX = dY W.
//
// A block is up to 512 rows by some groups of 64 columns. A group is two strips of 32 columns; a strip
// is, per step of 32 rows, two tiles of [16 row pairs][16 columns][row of the pair]. Two rows of a
// group go from codes to tiles in registers, in about 50 instructions: as many as fit beside one
// product. What has no such way is decoded into 16 x 64 elements first.
#pragma once

#include "fp8_table.h"
#include "tile_rows.h"

namespace lora_kernels::quant_linear {
namespace {

// Decodes a block in units of two rows of a group; 16 rows of a group are done before the next group.
class ColumnDecoder {
 public:
  explicit ColumnDecoder(const Weight& w) : w_(w) {
    stride_ = w.k;
    if (w.layout == Layout::kFlat) {
      kind_ = w.k % kGroup == 0 && w.block % kGroup == 0 ? Kind::kTable : Kind::kAny;
      codebook_ = _mm512_loadu_ps(w.table);
      stride_ = w.k / 2;
      row_blocks_ = w.k % w.block == 0 ? w.k / w.block : 0;
    } else if (w.layout == Layout::kInt4) {
      const bool whole = w.group_of == nullptr && (w.block % kGroup == 0 || w.scale_columns == 1);
      kind_ = whole ? Kind::kZeros : Kind::kAny;
      codebook_ = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      stride_ = w.row_bytes;
    } else if (w.layout == Layout::kInt8) {
      kind_ = Kind::kInt8;
    } else if (has_byte_tables() && (w.block % kGroup == 0 || w.scale_columns == 1)) {
      kind_ = Kind::kFp8;
      table_.fill(1.0f);
    }
    nibbles_ = w.layout == Layout::kFlat || w.layout == Layout::kInt4;
  }

  // Rows [n0, n1), groups [g0, g1), strips `strip` elements apart at dst. Rows up to the next step
  // are zero.
  void begin(int64_t n0, int64_t n1, int64_t g0, int64_t g1, int64_t strip, bf16* dst) {
    n_ = n0_ = n0;
    n1_ = n1;
    g_ = g0_ = g0;
    g1_ = g1;
    pair_ = 0;
    strip_ = strip;
    dst_ = dst;
  }
  int64_t units() const {
    const int64_t halves = (round_up(n1_ - n0_, kStep) - (n_ - n0_)) / kRows;
    return halves <= 0 ? 0 : (halves * (g1_ - g0_) - (g_ - g0_)) * kPairs - pair_;
  }
  void step() {
    if (pair_ == 0) begin_rows();
    bf16* to = to_ + pair_ * 2 * kTileColumns;
    const uint8_t* codes = codes_ + 2 * pair_ * stride_;
    if (!whole_) {
      if (pair_ == 0) any_pairs(to);
    } else {
      fetch(codes);
      const float* scale = scale_ + 2 * pair_;
      if (kind_ == Kind::kTable) {
        table_pair(codes, _mm512_mul_ps(codebook_, _mm512_set1_ps(scale[0])),
                   _mm512_mul_ps(codebook_, _mm512_set1_ps(scale[1])), to);
      } else if (kind_ == Kind::kZeros) {
        const float* zero = zero_ + 2 * pair_;
        const auto values = [&](int i) {
          return _mm512_mul_ps(_mm512_sub_ps(codebook_, _mm512_set1_ps(zero[i])),
                               _mm512_set1_ps(scale[i]));
        };
        table_pair(codes, values(0), values(1), to);
      } else if (kind_ == Kind::kInt8) {
        int8_pair(codes, scale, to);
      } else {
        fp8_pair(codes, scale, to);
      }
    }
    if (++pair_ < kPairs) return;
    pair_ = 0;
    if (++g_ < g1_) return;
    g_ = g0_;
    n_ += kRows;
  }
  void finish() {
    while (units() > 0) step();
  }
  // Each unit asks for the rows after it itself.
  static constexpr int64_t lines_of_unit() { return 0; }
  void fetch() {}

 private:
  enum class Kind { kTable, kZeros, kInt8, kFp8, kAny };
  static constexpr int64_t kRows = 16, kPairs = kRows / 2, kTileColumns = 16;
  static constexpr int64_t kRowsAhead = 16;  // rows are pages apart: no hardware prefetcher follows

  // 16 rows of a group: where they are and go, and their scales.
  void begin_rows() {
    const int64_t row = n_ - n0_, k0 = g_ * kGroup;
    to_ = dst_ + row / kStep * kStepTiles + row % kStep * kTileColumns + (g_ - g0_) * 2 * strip_;
    codes_ = w_.codes + n_ * stride_ + (nibbles_ ? k0 / 2 : k0);
    whole_ = kind_ != Kind::kAny && n1_ - n_ >= kRows && w_.k - k0 >= kGroup;
    // Half a line of nibbles is asked for with the other half.
    fetches_ = !nibbles_ || g_ == g0_ || g_ % 2 == 0;
    if (!whole_) return;
    if (kind_ == Kind::kTable) {
      const int64_t first = (n_ * w_.k + k0) / w_.block;
      for (int64_t i = 0; i < kRows; ++i) {
        const int64_t block =
            row_blocks_ > 0 ? first + i * row_blocks_ : ((n_ + i) * w_.k + k0) / w_.block;
        scale_[i] = flat_scale(w_, block);
      }
    } else if (kind_ == Kind::kZeros) {
      const int64_t at = n_ * w_.scale_columns + (w_.scale_columns == 1 ? 0 : k0 / w_.block);
      for (int64_t i = 0; i < kRows; ++i) {
        scale_[i] = w_.scale[at + i * w_.scale_columns];
        zero_[i] = w_.zero[at + i * w_.scale_columns];
      }
    } else if (kind_ == Kind::kInt8) {
      for (int64_t i = 0; i < kRows; ++i) scale_[i] = w_.scale[n_ + i];
    } else {
      const int64_t column = w_.scale_columns == 1 ? 0 : k0 / w_.block;
      for (int64_t i = 0; i < kRows; ++i) {
        scale_[i] = w_.scale[(n_ + i) / w_.block_rows * w_.scale_columns + column];
      }
    }
  }

  void fetch(const uint8_t* codes) const {
    if (!fetches_) return;
    _mm_prefetch(reinterpret_cast<const char*>(codes + kRowsAhead * stride_), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(codes + (kRowsAhead + 1) * stride_), _MM_HINT_T0);
  }

  // Columns [16 i, 16 i + 16) of two rows.
  void store(bf16* to, int64_t i, __m512i v) const {
    _mm512_store_si512(to + i / 2 * strip_ + i % 2 * kTile, v);
  }
  static __m512i interleaved(__m512 even, __m512 odd) {
    alignas(64) static constexpr uint16_t kIndex[32] = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(kIndex),
                                    as_int(_mm512_cvtne2ps_pbh(odd, even)));
  }

  // A word holds four columns of a row. Each is spread over four pairs and shifted to its nibble; bit
  // 4 of an index picks the table of its row.
  void table_pair(const uint8_t* codes, __m512 even_values, __m512 odd_values, bf16* to) const {
    alignas(64) static constexpr uint16_t kShifts[8] = {4, 4, 0, 0, 12, 12, 8, 8};
    const __m512i table = as_int(_mm512_cvtne2ps_pbh(odd_values, even_values));
    const __m512i shifts =
        _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kShifts)));
    const __m512i nibble = _mm512_set1_epi16(15), row = _mm512_set1_epi32(16 << 16);
    const __m512i first = _mm512_set_epi32(
        0x07060706, 0x07060706, 0x07060706, 0x07060706, 0x05040504, 0x05040504, 0x05040504,
        0x05040504, 0x03020302, 0x03020302, 0x03020302, 0x03020302, 0x01000100, 0x01000100,
        0x01000100, 0x01000100);
    const __m512i second = _mm512_add_epi8(first, _mm512_set1_epi8(8));
    constexpr __mmask64 kOdd = 0xccccccccccccccccu;
    for (int64_t half = 0; half < 2; ++half) {
      const auto load = [&](const uint8_t* from) {
        return _mm512_broadcast_i32x4(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16 * half)));
      };
      const __m512i even = load(codes), odd = load(codes + stride_);
      const auto values = [&](__m512i spread) {
        const __m512i words =
            _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(even, spread), kOdd, odd, spread);
        constexpr int kAndOr = 0xea;  // (a & b) | c
        const __m512i index =
            _mm512_ternarylogic_epi32(_mm512_srlv_epi16(words, shifts), nibble, row, kAndOr);
        return _mm512_permutexvar_epi16(index, table);
      };
      store(to, 2 * half, values(first));
      store(to, 2 * half + 1, values(second));
    }
  }

  void int8_pair(const uint8_t* codes, const float* scale, bf16* to) const {
    const __m512 factor = _mm512_set1_ps(w_.factor);
    const __m512 even = _mm512_set1_ps(scale[0]), odd = _mm512_set1_ps(scale[1]);
    for (int64_t i = 0; i < 4; ++i) {
      const auto values = [&](const uint8_t* from, __m512 s) {
        const __m128i q = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16 * i));
        const __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q));
        return _mm512_mul_ps(_mm512_mul_ps(code, s), factor);
      };
      store(to, i, interleaved(values(codes, even), values(codes + stride_, odd)));
    }
  }

  LK_VBMI void fp8_pair(const uint8_t* codes, const float* scale, bf16* to) const {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i e = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes));
    const __m512i o = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes + stride_));
    const __m512 even = _mm512_set1_ps(scale[0]), odd = _mm512_set1_ps(scale[1]);
    const auto scaled = [&](__m512i v) LK_VBMI {
      const __m512i upper = _mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
      return interleaved(_mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)), even),
                         _mm512_mul_ps(_mm512_castsi512_ps(upper), odd));
    };
    const __m512i pairs[2] = {_mm512_unpacklo_epi8(e, o), _mm512_unpackhi_epi8(e, o)};
    for (int64_t i = 0; i < 2; ++i) {
      __m512i low, high;
      table_.look_up(pairs[i], low, high);
      store(to, 2 * i, scaled(_mm512_unpacklo_epi8(low, high)));
      store(to, 2 * i + 1, scaled(_mm512_unpackhi_epi8(low, high)));
    }
  }

  void any_pairs(bf16* to) const {
    alignas(64) bf16 block[kRows][kGroup] = {};
    const int64_t k0 = g_ * kGroup, columns = std::min(kGroup, w_.k - k0);
    for (int64_t i = 0; i < std::min(kRows, n1_ - n_); ++i) {
      if (w_.layout == Layout::kFp8 && columns == kGroup &&
          fp8_group(w_, n_ + i, k0, block[i], kStep)) {
        continue;
      }
      decode(w_, n_ + i, k0, columns, block[i]);
    }
    alignas(64) static constexpr uint16_t kLow[32] = {
        0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t i = 0; i < kRows; i += 2, to += 2 * kTileColumns) {
      for (int64_t half = 0; half < 2; ++half) {
        const __m512i even = _mm512_load_si512(block[i] + 32 * half);
        const __m512i odd = _mm512_load_si512(block[i + 1] + 32 * half);
        store(to, 2 * half, _mm512_permutex2var_epi16(even, low, odd));
        store(to, 2 * half + 1, _mm512_permutex2var_epi16(even, high, odd));
      }
    }
  }

  const Weight& w_;
  Fp8Table table_;
  __m512 codebook_ = _mm512_setzero_ps();
  alignas(64) float scale_[kRows], zero_[kRows];
  Kind kind_ = Kind::kAny;
  bool nibbles_ = false, whole_ = false, fetches_ = false;
  int64_t stride_ = 0, row_blocks_ = 0;  // bytes of a row; blocks of a row, 0: not whole
  int64_t n_ = 0, n0_ = 0, n1_ = 0, g_ = 0, g0_ = 0, g1_ = 0, strip_ = 0, pair_ = 0;
  bf16 *dst_ = nullptr, *to_ = nullptr;
  const uint8_t* codes_ = nullptr;
};

}  // namespace
}  // namespace lora_kernels::quant_linear
