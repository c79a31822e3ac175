// 16 x 128 tiles of a packed weight as A operands of mma_16816, decoded in registers.
//
// A product does not care in which order k runs as long as both operands agree. So lane (g, t) of a
// warp (g = lane / 4, t = lane % 4) takes 32 consecutive codes, k = 32 t .. 32 t + 31, of each of
// its rows g and g + 8: 16 bytes of 4-bit codes, 32 of 8-bit ones. Fragment j (0..7) of the tile is
// made of codes 4 j .. 4 j + 3 of every lane:
//     a0, a1 = codes 4 j, 4 j + 1 of rows g, g + 8      a2, a3 = codes 4 j + 2, 4 j + 3
// and the other operand is read at the same k (SkinnyBlock). No layout of its own is needed.
//
// A reader copies the codes of a tile into a stage of shared memory, takes them into registers, and
// gives fragments; the statistics of a tile are loaded one tile ahead (RawScale). K is a multiple
// of 32 and so is what shares a scale along k: a lane's 32 codes of a row have one.
#pragma once

#include "../../common/cp_async.cuh"
#include "decode.cuh"

namespace lora_kernels::quant_linear::cuda {

constexpr int kTileN = 16, kTileK = 128, kRunK = 32;

// Of a warp: which rows and codes a lane has.
struct TilePlace {
  const QuantWeight& w;
  int lane;
  int64_t n0;  // first row of the tile

  LK_DEVICE int64_t row(int half) const {  // rows behind the last one repeat it
    const int64_t n = n0 + lane / 4 + 8 * half;
    return n < w.n ? n : w.n - 1;
  }
  LK_DEVICE int64_t run(int64_t k0) const { return k0 + kRunK * (lane % 4); }
  // A run that lies in the matrix, for the statistics of runs behind its end.
  LK_DEVICE int64_t inside(int64_t k0) const {
    const int64_t k = run(k0);
    return k < w.k ? k : w.k - kRunK;
  }
};

template <class T>
LK_DEVICE void set_half(uint32_t (&a)[4], int half, const float (&v)[4]) {
  const bool swapped = LK_FAULT(kFragmentOrder);
  a[half] = swapped ? pack2<T>(v[2], v[3]) : pack2<T>(v[0], v[1]);
  a[2 + half] = swapped ? pack2<T>(v[0], v[1]) : pack2<T>(v[2], v[3]);
}

// nf4, fp4: two codes of a row in a byte, the even one in the high nibble.
struct FlatReader {
  static constexpr size_t kStage = 2 * 32 * 16;  // bytes of a tile
  static constexpr size_t kTables = (CodeTable::kFloats + 256) * sizeof(float);
  struct Codes {
    uint32_t w[2][4];
  };
  float* table;
  CodeTable code;
  float offset;

  LK_DEVICE FlatReader(const QuantWeight& w, unsigned char* shared, int lane)
      : table(reinterpret_cast<float*>(shared)),
        code(table, lane),
        offset(w.nested_block != 0 ? *w.offset : 0.0f) {}

  template <int kThreads>
  LK_DEVICE void fill_tables(const QuantWeight& w, int thread) const {
    CodeTable::fill<kThreads>(table, w.code, thread);
    if (w.nested_block == 0) return;
    for (int i = thread; i < 256; i += kThreads) table[CodeTable::kFloats + i] = w.nested_code[i];
  }

  LK_DEVICE static void copy(const TilePlace& at, int64_t k0, unsigned char* stage) {
    const int64_t k = at.run(k0);
    const uint8_t* packed = static_cast<const uint8_t*>(at.w.packed);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t byte = (at.row(half) * at.w.k + at.inside(k0)) / 2;
      cp_async16_if(stage + (32 * half + at.lane) * 16, packed + byte, k < at.w.k);
    }
  }

  LK_DEVICE static RawScale statistics(const TilePlace& at, int64_t k0, int half) {
    return flat_scale(at.w, at.row(half) * at.w.k + at.inside(k0));
  }

  LK_DEVICE float scale(const QuantWeight& w, const RawScale& raw) const {
    return flat_absmax(w, raw, table + CodeTable::kFloats, offset);
  }

  LK_DEVICE static Codes take(const unsigned char* stage, int lane) {
    Codes codes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 v = reinterpret_cast<const uint4*>(stage)[32 * half + lane];
      uint32_t* to = codes.w[half];
      to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    }
    return codes;
  }

  template <class T>
  LK_DEVICE void fragment(const TilePlace&, const Codes& codes, const unsigned char*, int j,
                          const float (&scale)[2], const RawScale (&)[2], uint32_t (&a)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t word = codes.w[half][j / 2];
      const int bit = 16 * (j % 2);
      const float v[4] = {product(code.at(word, bit + 4), scale[half]),
                          product(code.at(word, bit), scale[half]),
                          product(code.at(word, bit + 12), scale[half]),
                          product(code.at(word, bit + 8), scale[half])};
      set_half<T>(a, half, v);
    }
  }
};

// int8 and fp8: 32 bytes of a row in two chunks.
struct ByteReader {
  static constexpr size_t kStage = 4 * 32 * 16;
  static constexpr size_t kTables = 0;
  struct Codes {
    uint32_t w[2][8];
  };

  LK_DEVICE ByteReader(const QuantWeight&, unsigned char*, int) {}
  template <int kThreads>
  LK_DEVICE void fill_tables(const QuantWeight&, int) const {}

  LK_DEVICE static void copy(const TilePlace& at, int64_t k0, unsigned char* stage) {
    const int64_t k = at.run(k0);
    const uint8_t* packed = static_cast<const uint8_t*>(at.w.packed);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint8_t* from = packed + at.row(half) * at.w.k + at.inside(k0);
#pragma unroll
      for (int chunk = 0; chunk < 2; ++chunk) {
        cp_async16_if(stage + (32 * (2 * half + chunk) + at.lane) * 16, from + 16 * chunk,
                      k < at.w.k);
      }
    }
  }

  LK_DEVICE static RawScale statistics(const TilePlace& at, int64_t k0, int half) {
    return {row_scale(at.w, at.row(half), at.inside(k0)), 0u};
  }
  LK_DEVICE static float scale(const QuantWeight&, const RawScale& raw) { return raw.value; }

  LK_DEVICE static Codes take(const unsigned char* stage, int lane) {
    Codes codes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int chunk = 0; chunk < 2; ++chunk) {
        const uint4 v = reinterpret_cast<const uint4*>(stage)[32 * (2 * half + chunk) + lane];
        uint32_t* to = codes.w[half] + 4 * chunk;
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
      }
    }
    return codes;
  }

  template <class T>
  LK_DEVICE void fragment(const TilePlace& at, const Codes& codes, const unsigned char*, int j,
                          const float (&scale)[2], const RawScale (&)[2], uint32_t (&a)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t word = codes.w[half][j];
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = scaled_byte(word >> (8 * i) & 0xffu, at.w, scale[half]);
      set_half<T>(a, half, v);
    }
  }
};

// What the readers of gptq and awq share.
struct Int4Statistics {
  static constexpr size_t kTables = 0;
  template <int kThreads>
  LK_DEVICE void fill_tables(const QuantWeight&, int) const {}

  LK_DEVICE static RawScale statistics(const TilePlace& at, int64_t k0, int half) {
    return int4_scale(at.w, at.inside(k0) / at.w.group, at.row(half));
  }
  LK_DEVICE static float scale(const QuantWeight&, const RawScale& raw) { return raw.value; }
};

// gptq: four words of eight k's of one row.
struct GptqReader : Int4Statistics {
  static constexpr size_t kStage = 2 * 32 * 16;
  struct Codes {
    uint32_t w[2][4];
  };

  LK_DEVICE GptqReader(const QuantWeight&, unsigned char*, int) {}

  LK_DEVICE static void copy(const TilePlace& at, int64_t k0, unsigned char* stage) {
    const int64_t k = at.run(k0), word = at.inside(k0) / 8;
    const uint32_t* packed = static_cast<const uint32_t*>(at.w.packed);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        cp_async4_if(stage + (32 * half + at.lane) * 16 + 4 * i,
                     packed + (word + i) * at.w.n + at.row(half), k < at.w.k);
      }
    }
  }

  LK_DEVICE static Codes take(const unsigned char* stage, int lane) {
    Codes codes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 v = reinterpret_cast<const uint4*>(stage)[32 * half + lane];
      uint32_t* to = codes.w[half];
      to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    }
    return codes;
  }

  template <class T>
  LK_DEVICE void fragment(const TilePlace&, const Codes& codes, const unsigned char*, int j,
                          const float (&scale)[2], const RawScale (&raw)[2],
                          uint32_t (&a)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t word = codes.w[half][j / 2] >> (16 * (j % 2));
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v[i] = int4_value(word >> (4 * i) & 15u, raw[half].code, scale[half]);
      }
      set_half<T>(a, half, v);
    }
  }
};

// awq: for each k the two words of the tile's 16 rows. Lanes with the same k read one word.
struct AwqReader : Int4Statistics {
  static constexpr size_t kStage = 2 * kTileK * 4;
  struct Codes {};

  LK_DEVICE AwqReader(const QuantWeight&, unsigned char*, int) {}

  // Place of word (k, column) of a tile; lanes whose k differ by 32 use other banks.
  LK_DEVICE static int place_of(int k, int column) {
    return kTileK * column + (k & ~31) + ((k + (k >> 5) * 8) & 31);
  }

  LK_DEVICE static void copy(const TilePlace& at, int64_t k0, unsigned char* stage) {
    const QuantWeight& w = at.w;
    const uint32_t* packed = static_cast<const uint32_t*>(w.packed);
    const int64_t column = at.n0 / 8;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int64_t k = k0 + 32 * q + at.lane;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const bool exists = k < w.k && column + h < w.packed_n;
        cp_async4_if(stage + 4 * place_of(32 * q + at.lane, h),
                     exists ? packed + k * w.packed_n + column + h : packed, exists);
      }
    }
  }

  LK_DEVICE static Codes take(const unsigned char*, int) { return {}; }

  template <class T>
  LK_DEVICE void fragment(const TilePlace& at, const Codes&, const unsigned char* stage, int j,
                          const float (&scale)[2], const RawScale (&raw)[2],
                          uint32_t (&a)[4]) const {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(stage);
    const int shift = column_shift(Layout::kAwq, at.lane / 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t word = words[place_of(kRunK * (at.lane % 4) + 4 * j + i, half)];
        v[i] = int4_value(word >> shift & 15u, raw[half].code, scale[half]);
      }
      set_half<T>(a, half, v);
    }
  }
};

}  // namespace lora_kernels::quant_linear::cuda
