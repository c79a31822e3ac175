// 16 x 128 tiles of a packed weight as A operands of mma_16816, decoded in registers.
//
// A product does not care in which order k runs as long as both operands agree. So lane (g, t) of a
// warp (g = lane / 4, t = lane % 4) takes 32 consecutive codes, k = 32 t .. 32 t + 31, of each of
// its rows g and g + 8: 16 bytes of 4-bit codes, 32 of 8-bit ones. Fragment j (0..7) of the tile is
// made of codes 4 j .. 4 j + 3 of every lane:
//     a0, a1 = codes 4 j, 4 j + 1 of rows g, g + 8      a2, a3 = codes 4 j + 2, 4 j + 3
// and the other operand is read at the same k (SkinnyBlock). No layout of its own is needed.
//
// A reader is what a lane knows of one tile of rows. Step s is k = 128 s ..; `exists` says whether
// the lane's codes of that step lie in the matrix. copy() brings the codes of a step into a stage
// of shared memory, take() into registers, fragment() decodes; statistics() is called a step ahead.
// K is a multiple of 32 and so is what shares a scale along k: a lane's 32 codes of a row have one.
// Rows behind the last one repeat it.
#pragma once

#include "../../common/cp_async.cuh"
#include "decode.cuh"

namespace lora_kernels::quant_linear::cuda {

constexpr int kTileN = 16, kTileK = 128, kRunK = 32;

LK_DEVICE int64_t tile_row(const QuantWeight& w, int64_t n0, int lane, int half) {
  const int64_t n = n0 + lane / 4 + 8 * half;
  return n < w.n ? n : w.n - 1;
}

// Of the lane's codes of step s: their number in runs of 32 along k; that of the last run where
// there are none.
LK_DEVICE uint32_t run_of(const QuantWeight& w, int s, int lane) {
  const uint32_t run = 4u * static_cast<uint32_t>(s) + lane % 4;
  const uint32_t runs = static_cast<uint32_t>(w.k / kRunK);
  return run < runs ? run : runs - 1;
}

template <class T>
LK_DEVICE void set_half(uint32_t (&a)[4], int half, const float (&v)[4]) {
  const bool swapped = LK_FAULT(kFragmentOrder);
  a[half] = swapped ? pack2<T>(v[2], v[3]) : pack2<T>(v[0], v[1]);
  a[2 + half] = swapped ? pack2<T>(v[0], v[1]) : pack2<T>(v[2], v[3]);
}

// 16 bytes of the lane's place `index` in a stage; a warp's are contiguous.
LK_DEVICE unsigned char* lane_chunk(unsigned char* stage, int index, int lane) {
  return stage + (32 * index + lane) * 16;
}

template <int kWords>
struct LaneCodes {
  uint32_t w[2][kWords];  // of both rows

  LK_DEVICE static LaneCodes take(const unsigned char* stage, int lane) {
    LaneCodes codes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kWords / 4; ++i) {
        const uint4 v = reinterpret_cast<const uint4*>(stage)[32 * (half * kWords / 4 + i) + lane];
        uint32_t* to = codes.w[half] + 4 * i;
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
      }
    }
    return codes;
  }
};

// nf4, fp4: two codes of a row in a byte, the even one in the high nibble.
struct FlatReader {
  static constexpr size_t kStage = 2 * 32 * 16;  // bytes of a tile and step
  static constexpr size_t kTables = (CodeTable::kFloats + 256) * sizeof(float);
  using Codes = LaneCodes<4>;
  const uint8_t* from[2];
  uint32_t first_run[2];  // of the row, in the flattened weight

  LK_DEVICE void start(const QuantWeight& w, int64_t n0, int lane) {
    for (int half = 0; half < 2; ++half) {
      const int64_t e = tile_row(w, n0, lane, half) * w.k;
      from[half] = static_cast<const uint8_t*>(w.packed) + e / 2 + 16 * (lane % 4);
      first_run[half] = static_cast<uint32_t>(e / kRunK);
    }
  }

  // The table of codes, then nested_code.
  template <int kThreads>
  LK_DEVICE static void fill_tables(const QuantWeight& w, unsigned char* shared, int thread) {
    float* table = reinterpret_cast<float*>(shared);
    CodeTable::fill<kThreads>(table, w.code, thread);
    if (w.nested_shift == 0) return;
    for (int i = thread; i < 256; i += kThreads) table[CodeTable::kFloats + i] = w.nested_code[i];
  }

  LK_DEVICE void copy(const QuantWeight&, int s, bool exists, unsigned char* stage,
                      int lane) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      cp_async16_if(lane_chunk(stage, half, lane), from[half] + static_cast<int64_t>(s) * 64,
                    exists);
    }
  }

  LK_DEVICE RawScale statistics(const QuantWeight& w, int s, int half, int lane) const {
    return flat_scale(w, (first_run[half] + run_of(w, s, lane)) >> (w.block_shift - 5));
  }

  LK_DEVICE static float scale(const QuantWeight& w, const RawScale& raw,
                               const unsigned char* shared) {
    if (w.nested_shift == 0) return raw.value;
    return flat_absmax(w, raw, reinterpret_cast<const float*>(shared) + CodeTable::kFloats,
                       *w.offset);
  }

  template <class T>
  LK_DEVICE static void fragment(const QuantWeight&, const Codes& codes, const unsigned char*,
                                 int j, const float (&scale)[2], const RawScale (&)[2],
                                 const unsigned char* shared, int lane, uint32_t (&a)[4]) {
    const CodeTable code(shared, lane);
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

// What the readers without tables have in common.
struct PlainReader {
  static constexpr size_t kTables = 0;
  template <int kThreads>
  LK_DEVICE static void fill_tables(const QuantWeight&, unsigned char*, int) {}
  LK_DEVICE static float scale(const QuantWeight&, const RawScale& raw, const unsigned char*) {
    return raw.value;
  }
};

// int8 and fp8: 32 bytes of a row in two chunks.
template <Layout kLayout>
struct ByteReader : PlainReader {
  static constexpr size_t kStage = 4 * 32 * 16;
  using Codes = LaneCodes<8>;
  const uint8_t* from[2];
  const float* scales[2];

  LK_DEVICE void start(const QuantWeight& w, int64_t n0, int lane) {
    for (int half = 0; half < 2; ++half) {
      const int64_t n = tile_row(w, n0, lane, half);
      from[half] = static_cast<const uint8_t*>(w.packed) + n * w.k + kRunK * (lane % 4);
      scales[half] = w.scale + n / w.scale_rows * w.scale_ld;
    }
  }

  LK_DEVICE void copy(const QuantWeight&, int s, bool exists, unsigned char* stage,
                      int lane) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        cp_async16_if(lane_chunk(stage, 2 * half + i, lane),
                      from[half] + static_cast<int64_t>(s) * kTileK + 16 * i, exists);
      }
    }
  }

  LK_DEVICE RawScale statistics(const QuantWeight& w, int s, int half, int lane) const {
    if (w.scale_ld == 1) return {*scales[half], 0u};
    const uint32_t k = run_of(w, s, lane) * kRunK;
    return {scales[half][k / static_cast<uint32_t>(w.scale_columns)], 0u};
  }

  template <class T>
  LK_DEVICE static void fragment(const QuantWeight& w, const Codes& codes, const unsigned char*,
                                 int j, const float (&scale)[2], const RawScale (&)[2],
                                 const unsigned char*, int, uint32_t (&a)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float v[4];
      scaled_bytes<kLayout>(codes.w[half][j], scale[half], w.factor, v);
      set_half<T>(a, half, v);
    }
  }
};

// Scales and zeros of gptq and awq.
struct Int4Reader : PlainReader {
  int64_t row[2];

  LK_DEVICE RawScale statistics(const QuantWeight& w, int s, int half, int lane) const {
    const uint32_t k = run_of(w, s, lane) * kRunK;
    return int4_scale(w, k / static_cast<uint32_t>(w.group), row[half]);
  }
};

// gptq: four words of eight k's of one row.
struct GptqReader : Int4Reader {
  static constexpr size_t kStage = 2 * 32 * 16;
  using Codes = LaneCodes<4>;

  LK_DEVICE void start(const QuantWeight& w, int64_t n0, int lane) {
    for (int half = 0; half < 2; ++half) row[half] = tile_row(w, n0, lane, half);
  }

  LK_DEVICE void copy(const QuantWeight& w, int s, bool exists, unsigned char* stage,
                      int lane) const {
    const uint32_t* word = static_cast<const uint32_t*>(w.packed) +
                           (static_cast<int64_t>(s) * 16 + 4 * (lane % 4)) * w.n;
#pragma unroll
    for (int i = 0; i < 4; ++i, word += w.n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        cp_async4_if(lane_chunk(stage, half, lane) + 4 * i, word + row[half], exists);
      }
    }
  }

  template <class T>
  LK_DEVICE static void fragment(const QuantWeight&, const Codes& codes, const unsigned char*,
                                 int j, const float (&scale)[2], const RawScale (&raw)[2],
                                 const unsigned char*, int, uint32_t (&a)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t code = codes.w[half][j / 2] >> (16 * (j % 2) + 4 * i) & 15u;
        v[i] = int4_value(code, raw[half].code, scale[half]);
      }
      set_half<T>(a, half, v);
    }
  }
};

// awq: for each k the two words of the tile's 16 rows. Lanes with the same k read one word.
struct AwqReader : Int4Reader {
  static constexpr size_t kStage = 2 * kTileK * 4;
  struct Codes {
    LK_DEVICE static Codes take(const unsigned char*, int) { return {}; }
  };
  int64_t column;

  LK_DEVICE void start(const QuantWeight& w, int64_t n0, int lane) {
    for (int half = 0; half < 2; ++half) row[half] = tile_row(w, n0, lane, half);
    column = n0 / 8;
  }

  // Place of word (k, column) of a tile; lanes whose k differ by 32 use other banks.
  LK_DEVICE static int place_of(int k, int column) {
    return kTileK * column + (k & ~31) + ((k + (k >> 5) * 8) & 31);
  }

  LK_DEVICE void copy(const QuantWeight& w, int s, bool, unsigned char* stage, int lane) const {
    const int64_t k0 = static_cast<int64_t>(s) * kTileK + lane;
    const uint32_t* word = static_cast<const uint32_t*>(w.packed) + k0 * w.packed_n + column;
#pragma unroll
    for (int q = 0; q < 4; ++q, word += 32 * w.packed_n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        cp_async4_if(stage + 4 * place_of(32 * q + lane, h), word + h,
                     k0 + 32 * q < w.k && column + h < w.packed_n);
      }
    }
  }

  template <class T>
  LK_DEVICE static void fragment(const QuantWeight&, const Codes&, const unsigned char* stage,
                                 int j, const float (&scale)[2], const RawScale (&raw)[2],
                                 const unsigned char*, int lane, uint32_t (&a)[4]) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(stage);
    const int shift = column_shift(Layout::kAwq, lane / 4);
    const int run = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t word = words[kTileK * half + 32 * run + ((4 * j + i + 8 * run) & 31)];
        v[i] = int4_value(word >> shift & 15u, raw[half].code, scale[half]);
      }
      set_half<T>(a, half, v);
    }
  }
};

}  // namespace lora_kernels::quant_linear::cuda
