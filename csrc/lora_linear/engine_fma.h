// Engine for multiply-add units of any vector width, in the compiler's portable vectors.
//
// The including file sets LK_LANES (fp32 lanes), LK_MR (rows of a strip),
// LK_ROWS and LK_K_BLOCK (blocks in L2, see driver.h). The
// micro kernel keeps MR x 3 accumulators, 3 vectors of B and 1 broadcast of A in registers.
// Packed A strip: fp32 [k][MR]. Packed B strip (width 3, 2 or 1 vectors): element type [k][width].
// Numerics: fp32 products and accumulation over the whole k (x and LoRA term in one accumulator),
// operands of lower precision widened exactly, one rounding at the store. S is rounded as it is
// saved, and scaled in fp32.
#pragma once

#include <type_traits>

#include "../common/vector.h"
#include "lora_linear.h"

namespace lora_kernels::lora_linear {
namespace {

// MR consecutive fp32 values, and the transpose of MR of them by rounds of perfect shuffles.
typedef float Row __attribute__((vector_size(LK_MR * 4)));
typedef float RowU __attribute__((vector_size(LK_MR * 4), aligned(4), may_alias));
typedef int32_t RowIndex __attribute__((vector_size(LK_MR * 4)));

inline Row load_row(const float* p) { return *reinterpret_cast<const RowU*>(p); }
template <class Element>
inline Row load_row(const Element* p) {
  Row v;
  for (int l = 0; l < LK_MR; ++l) v[l] = to_float(p[l]);
  return v;
}

inline void transpose(Row v[LK_MR]) {
  RowIndex low, high;
  for (int l = 0; l < LK_MR; ++l) {
    low[l] = l / 2 + (l % 2) * LK_MR;
    high[l] = low[l] + LK_MR / 2;
  }
  for (int round = 1; round < LK_MR; round *= 2) {
    Row t[LK_MR];
    for (int i = 0; i < LK_MR / 2; ++i) {
      t[2 * i] = __builtin_shuffle(v[i], v[i + LK_MR / 2], low);
      t[2 * i + 1] = __builtin_shuffle(v[i], v[i + LK_MR / 2], high);
    }
    for (int i = 0; i < LK_MR; ++i) v[i] = t[i];
  }
}

template <class Element>
struct FmaEngine {
  using T = Element;
  using TA = float;
  using TB = Element;
  static constexpr int VL = LK_LANES;
  static constexpr int MR = LK_MR, NR = 3 * VL, NV = VL, KR = 1;
  static constexpr int ROWS = LK_ROWS, COLUMNS = 16 * NR, K_BLOCK = LK_K_BLOCK;

  static void enter() {}
  static void leave() {
#if defined(__AVX__)
    _mm_sfence();  // orders the streamed results before whatever the caller does next
#endif
  }

  static void pack_a(const T* src, int64_t ld, int64_t rows, int64_t k, float* dst) {
    int64_t kk = 0;
    if (rows == MR) {
      for (; kk + MR <= k; kk += MR) {
        Row v[MR];
        for (int i = 0; i < MR; ++i) v[i] = load_row(src + i * ld + kk);
        transpose(v);
        for (int i = 0; i < MR; ++i) *reinterpret_cast<RowU*>(dst + (kk + i) * MR) = v[i];
      }
    }
    for (; kk < k; ++kk) {
      for (int64_t i = 0; i < MR; ++i) {
        dst[kk * MR + i] = i < rows ? to_float(src[i * ld + kk]) : 0.0f;
      }
    }
  }
  static void pack_a_f32(const float* src, int64_t ld, int64_t rows, int64_t k, float factor,
                         float* dst) {
    for (int64_t kk = 0; kk < k; ++kk) {
      for (int64_t i = 0; i < MR; ++i) {
        dst[kk * MR + i] = i < rows ? src[i * ld + kk] * factor : 0.0f;
      }
    }
  }
  static void pack_a_scaled(const T* src, int64_t ld, int64_t rows, int64_t k, float factor,
                            float* dst) {
    pack_a(src, ld, rows, k, dst);
    for (int64_t e = 0; e < k * MR; ++e) dst[e] *= factor;
  }
  static void pack_a_t(const T* src, int64_t ld, int64_t rows, int64_t k, float* dst) {
    for (int64_t kk = 0; kk < k; ++kk) {
      for (int64_t i = 0; i < MR; ++i) {
        dst[kk * MR + i] = i < rows ? to_float(src[kk * ld + i]) : 0.0f;
      }
    }
  }
  static void mask_a(const float* strip, int64_t rows, int64_t k, const uint32_t* masks,
                     int64_t ldmask, float* dst) {
    for (int64_t kk = 0; kk < k; ++kk) {
      for (int64_t i = 0; i < MR; ++i) {
        const uint32_t keep = i < rows ? (masks[i * ldmask + kk / 32] >> (kk % 32)) & 1u : 0u;
        dst[kk * MR + i] = bits_to_float(float_to_bits(strip[kk * MR + i]) & (0u - keep));
      }
    }
  }

  template <class Src>
  static void pack_b_rows(const Src* src, int64_t ld, int64_t k, int64_t n, int64_t width,
                          const uint32_t* masks, int64_t n0, int64_t ldmask, TB* dst) {
    for (int64_t kk = 0; kk < k; ++kk, dst += width) {
      const Src* s = src + kk * ld;
      int64_t j = 0;
      if constexpr (std::is_same_v<TB, float>) {
        for (; j + VL <= n; j += VL) {
          Vec v = load(s + j);
          if (masks != nullptr) {
            const int64_t column = n0 + j;
            const uint32_t word = masks[kk * ldmask + column / 32];
            v = select(lanes_of(word, static_cast<int>(column % 32)), v);
          }
          store_vec(dst + j, v);
        }
      }
      for (; j < width; ++j) {
        const int64_t column = n0 + j;
        const bool keep = j < n && (masks == nullptr ||
                                    ((masks[kk * ldmask + column / 32] >> (column % 32)) & 1u));
        from_float(keep ? to_float(s[j]) : 0.0f, dst[j]);
      }
    }
  }
  template <class Src>
  static void pack_b_cols(const Src* src, int64_t ld, int64_t k, int64_t n, int64_t width,
                          TB* dst) {
    constexpr int64_t kBlock = 64;
    for (int64_t k0 = 0; k0 < k; k0 += kBlock) {
      const int64_t k1 = std::min(k, k0 + kBlock);
      for (int64_t j = 0; j < width; ++j) {
        for (int64_t kk = k0; kk < k1; ++kk) {
          from_float(j < n ? to_float(src[j * ld + kk]) : 0.0f, dst[kk * width + j]);
        }
      }
    }
  }

  template <int NVEC>
  static void micro_vectors(const Segment<FmaEngine>* segments, int count, float* c, int64_t ldc,
                            bool accumulate) {
    Vec acc[MR][NVEC];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < NVEC; ++v) acc[i][v] = Vec{};
    }
    for (int s = 0; s < count; ++s) {
      const float* __restrict__ a = segments[s].a;
      const TB* __restrict__ b = segments[s].b;
      for (int64_t k = segments[s].k; k > 0; --k, a += MR, b += NVEC * VL) {
        Vec bv[NVEC];
#pragma GCC unroll 4
        for (int v = 0; v < NVEC; ++v) {
          bv[v] = load(b + v * VL);
          __builtin_prefetch(b + (8 * NVEC + v) * VL);
        }
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) {
          const float ai = a[i];
#pragma GCC unroll 4
          for (int v = 0; v < NVEC; ++v) acc[i][v] += ai * bv[v];
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < NVEC; ++v) {
        // Added last, so that the rounding of a long sum grows with its blocks, not its terms.
        if (accumulate) acc[i][v] += load(c + i * ldc + v * VL);
        store_vec(c + i * ldc + v * VL, acc[i][v]);
      }
    }
  }
  static void micro(const Segment<FmaEngine>* segments, int count, int64_t, int64_t width, float* c,
                    int64_t ldc, bool accumulate, Ahead ahead = {}) {
    for (int64_t i = 0; i < ahead.bytes; i += 64) __builtin_prefetch(ahead.data + i, 0, 2);
    if (width == 3 * VL) {
      micro_vectors<3>(segments, count, c, ldc, accumulate);
    } else if (width == 2 * VL) {
      micro_vectors<2>(segments, count, c, ldc, accumulate);
    } else {
      micro_vectors<1>(segments, count, c, ldc, accumulate);
    }
  }

  // The tile is stored at once: the registers have nothing else to hide it under.
  struct Tail {
    float* tiles[1];
  };
  static void flush(Tail&) {}
  static void micro_then(const Segment<FmaEngine>* segments, int count, int64_t width, float* sum,
                         Tail& tail, const Output<FmaEngine>& o, Ahead ahead) {
    float* c = sum == nullptr ? tail.tiles[0] : sum;
    micro(segments, count, o.rows, width, c, NR, sum != nullptr, ahead);
    if (o.extra != nullptr) {
      for (int64_t i = 0; i < o.rows * NR; ++i) c[i] += o.extra[i];
    }
    if constexpr (std::is_same_v<T, float>) {
      if (o.stream && o.n == NR) {
        for (int64_t i = 0; i < o.rows; ++i) {
          for (int64_t j = 0; j < NR; j += VL) {
            const Vec v = load(c + i * NR + j);
            stream_vec(o.dst + i * o.ld + j, o.bias == nullptr ? v : v + load(o.bias + j));
          }
        }
        return;
      }
    }
    store(c, NR, o.rows, o.n, o.bias, o.dst, o.ld);
  }

  static void add_masked(const float* lora, int64_t rows, int64_t width, const uint32_t* masks,
                         int64_t ldmask, int64_t k0, float* c) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < width; j += VL) {
        const int64_t column = k0 + j;
        const IVec keep = lanes_of(masks[i * ldmask + column / 32], static_cast<int>(column % 32));
        float* sum = c + i * NR + j;
        store_vec(sum, load(sum) + select(keep, load(lora + i * NR + j)));
      }
    }
  }
  static void store(const float* c, int64_t ldc, int64_t rows, int64_t n, const float* bias, T* dst,
                    int64_t ld) {
    for (int64_t i = 0; i < rows; ++i) {
      const float* row = c + i * ldc;
      T* out = dst + i * ld;
      if (bias == nullptr) {
        for (int64_t j = 0; j < n; ++j) from_float(row[j], out[j]);
      } else {
        for (int64_t j = 0; j < n; ++j) from_float(row[j] + bias[j], out[j]);
      }
    }
  }
};

}  // namespace
}  // namespace lora_kernels::lora_linear
