// Tiles of 64 rows n and 256 columns k of a packed weight as A operands of W^T, for sums over n.
//
// The operand's 16 rows are columns of W, and their order is free, as that of n is. So lane (g, t)
// of a warp (g = lane / 4, t = lane % 4), which owns 64 columns from 64 warp on, takes eight
// consecutive codes, k = 64 warp + 8 g .. + 7, of eight consecutive rows, n = 32 q + 8 t .. + 7:
// 32 bytes of 4-bit codes per half tile q. Fragment (h, j), h 0..1, j 0..3, of half tile q is made
// of rows n' = 32 q + 8 t + 4 h .. + 3 and codes 2 j, 2 j + 1:
//     a0 = code 2 j of rows n', n' + 1         a1 = code 2 j + 1 of them
//     a2, a3 = the same of rows n' + 2, n' + 3
// so that accumulator j holds columns k = 64 warp + 8 g + 2 j (and + 1, in its second half).
//
// Columns of layouts, as readers of packed_tile.cuh: copy() brings the codes of a tile into a stage
// of shared memory, all threads of the block together; take() brings those of four rows into
// registers, values() makes codes 4 jj .. 4 jj + 3 of row i of them. Statistics are one value per
// row and run of 32 columns: raw() loads, scale() makes it from what raw() gave.
// What lies outside of W is zero codes with the statistics of the last row and run.
#pragma once

#include "packed_tile.cuh"

namespace lora_kernels::quant_linear::cuda {

constexpr int kColumnsN = 64, kColumnsK = 256, kColumnsThreads = 128;

LK_DEVICE uint32_t shared_word(const unsigned char* p) {
  return *reinterpret_cast<const uint32_t*>(p);
}

// Rows of the flattened weight in 16-byte chunks, kChunk columns each. Chunk c of row n lies where
// the four rows that a quarter of a warp reads are in other banks.
template <int kChunk>
struct RowChunks {
  static constexpr int kPerRow = kColumnsK / kChunk;
  static constexpr size_t kStage = static_cast<size_t>(kColumnsN) * kPerRow * 16;

  LK_DEVICE static int place(int n, int chunk) {
    return 16 * (n * kPerRow + (chunk ^ (2 * (n / 8 % 4))));
  }

  LK_DEVICE static void copy(const QuantWeight& w, int64_t n0, int64_t k0, unsigned char* stage,
                             int thread) {
#pragma unroll
    for (int i = 0; i < kColumnsN * kPerRow / kColumnsThreads; ++i) {
      const int c = thread + i * kColumnsThreads, n = c / kPerRow, chunk = c % kPerRow;
      const int64_t k = k0 + chunk * kChunk;
      const auto* from = static_cast<const uint8_t*>(w.packed) + ((n0 + n) * w.k + k) * 16 / kChunk;
      cp_async16_if(stage + place(n, chunk), from, n0 + n < w.n && k < w.k);
    }
  }
};

struct FlatColumns : RowChunks<32> {
  static constexpr size_t kTables = FlatReader::kTables;
  static constexpr bool kZeros = false;
  struct Codes {
    uint32_t w[4];
  };

  template <int kThreads>
  LK_DEVICE static void fill_tables(const QuantWeight& w, unsigned char* shared, int thread) {
    FlatReader::fill_tables<kThreads>(w, shared, thread);
  }

  LK_DEVICE static RawScale raw(const QuantWeight& w, int64_t n, int64_t run) {
    const uint32_t runs = static_cast<uint32_t>(n * (w.k / kRunK) + run);
    return flat_scale(w, runs >> (w.block_shift - 5));
  }
  LK_DEVICE static float scale(const QuantWeight& w, const RawScale& raw,
                               const unsigned char* shared) {
    return FlatReader::scale(w, raw, shared);
  }

  LK_DEVICE static Codes take(const unsigned char* stage, int n, int warp, int lane) {
    const int g = lane / 4;
    Codes codes;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      codes.w[i] = shared_word(stage + place(n + i, 2 * warp + g / 4) + 4 * (g % 4));
    }
    return codes;
  }

  LK_DEVICE static void values(const QuantWeight&, const Codes& codes, int i, int, int jj,
                               float scale, uint32_t, const unsigned char* shared, int lane,
                               float (&v)[4]) {
    const CodeTable code(shared, lane);
    const int bit = 16 * jj;
    v[0] = product(code.at(codes.w[i], bit + 4), scale);
    v[1] = product(code.at(codes.w[i], bit), scale);
    v[2] = product(code.at(codes.w[i], bit + 12), scale);
    v[3] = product(code.at(codes.w[i], bit + 8), scale);
  }
};

// What the layouts without tables have in common.
struct PlainColumns {
  static constexpr size_t kTables = 0;
  template <int kThreads>
  LK_DEVICE static void fill_tables(const QuantWeight&, unsigned char*, int) {}
  LK_DEVICE static float scale(const QuantWeight&, const RawScale& raw, const unsigned char*) {
    return raw.value;
  }
};

template <Layout kLayout>
struct ByteColumns : PlainColumns, RowChunks<16> {
  static constexpr bool kZeros = false;
  struct Codes {
    uint32_t w[4][2];
  };

  LK_DEVICE static RawScale raw(const QuantWeight& w, int64_t n, int64_t run) {
    const uint32_t row = static_cast<uint32_t>(n) / static_cast<uint32_t>(w.scale_rows);
    const uint32_t column =
        static_cast<uint32_t>(run * kRunK) / static_cast<uint32_t>(w.scale_columns);
    return {w.scale[row * w.scale_ld + column], 0u};
  }

  LK_DEVICE static Codes take(const unsigned char* stage, int n, int warp, int lane) {
    const int g = lane / 4;
    Codes codes;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned char* from = stage + place(n + i, 4 * warp + g / 2) + 8 * (g % 2);
      codes.w[i][0] = shared_word(from);
      codes.w[i][1] = shared_word(from + 4);
    }
    return codes;
  }

  LK_DEVICE static void values(const QuantWeight& w, const Codes& codes, int i, int, int jj,
                               float scale, uint32_t, const unsigned char*, int, float (&v)[4]) {
    scaled_bytes<kLayout>(codes.w[i][jj], scale, w.factor, v);
  }
};

struct Int4Columns : PlainColumns {
  static constexpr bool kZeros = true;
  LK_DEVICE static RawScale raw(const QuantWeight& w, int64_t n, int64_t run) {
    return int4_scale(w, static_cast<uint32_t>(run * kRunK) / static_cast<uint32_t>(w.group), n);
  }
};

// gptq: 32 rows of words of eight k's, 64 n's wide; chunks of four n's, every other row exchanged.
struct GptqColumns : Int4Columns {
  static constexpr size_t kStage = static_cast<size_t>(kColumnsN) * kColumnsK / 2;
  struct Codes {
    uint32_t w[4];
  };

  LK_DEVICE static int place(int word, int n) {
    return 4 * (word * kColumnsN + (n ^ (4 * (word & 1))));
  }

  LK_DEVICE static void copy(const QuantWeight& w, int64_t n0, int64_t k0, unsigned char* stage,
                             int thread) {
#pragma unroll 4
    for (int i = 0; i < kColumnsK / 8 * kColumnsN / kColumnsThreads; ++i) {
      const int c = thread + i * kColumnsThreads, word = c / kColumnsN, n = c % kColumnsN;
      const int64_t row = k0 / 8 + word;
      cp_async4_if(stage + place(word, n),
                   static_cast<const uint32_t*>(w.packed) + row * w.n + n0 + n,
                   n0 + n < w.n && 8 * row < w.k);
    }
  }

  LK_DEVICE static Codes take(const unsigned char* stage, int n, int warp, int lane) {
    const uint4 v = *reinterpret_cast<const uint4*>(stage + place(8 * warp + lane / 4, n));
    return {{v.x, v.y, v.z, v.w}};
  }

  LK_DEVICE static void values(const QuantWeight&, const Codes& codes, int i, int, int jj,
                               float scale, uint32_t zero, const unsigned char*, int,
                               float (&v)[4]) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      v[c] = int4_value(codes.w[i] >> (16 * jj + 4 * c) & 15u, zero, scale);
    }
  }
};

// awq: for each k eight words of eight n's.
struct AwqColumns : Int4Columns {
  static constexpr size_t kStage = static_cast<size_t>(kColumnsN) * kColumnsK / 2;
  struct Codes {
    uint32_t w[8];
  };

  // Lanes read k's that differ by eight, and four neighbouring words.
  LK_DEVICE static int place(int k, int word) {
    return 4 * ((k % 8 * 32 + k / 8) * 8 + (word ^ (4 * (k / 32 % 2))));
  }

  LK_DEVICE static void copy(const QuantWeight& w, int64_t n0, int64_t k0, unsigned char* stage,
                             int thread) {
#pragma unroll 4
    for (int i = 0; i < kColumnsK * kColumnsN / 8 / kColumnsThreads; ++i) {
      const int c = thread + i * kColumnsThreads, k = c / 8, word = c % 8;
      const int64_t column = n0 / 8 + word;
      cp_async4_if(stage + place(k, word),
                   static_cast<const uint32_t*>(w.packed) + (k0 + k) * w.packed_n + column,
                   k0 + k < w.k && column < w.packed_n);
    }
  }

  LK_DEVICE static Codes take(const unsigned char* stage, int n, int warp, int lane) {
    Codes codes;
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      codes.w[c] = shared_word(stage + place(64 * warp + 8 * (lane / 4) + c, n / 8));
    }
    return codes;
  }

  LK_DEVICE static void values(const QuantWeight&, const Codes& codes, int i, int h, int jj,
                               float scale, uint32_t zero, const unsigned char*, int,
                               float (&v)[4]) {
    const int shift = column_shift(Layout::kAwq, 4 * h + i);
#pragma unroll
    for (int c = 0; c < 4; ++c) v[c] = int4_value(codes.w[4 * jj + c] >> shift & 15u, zero, scale);
  }
};

}  // namespace lora_kernels::quant_linear::cuda
