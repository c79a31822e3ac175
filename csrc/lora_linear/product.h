// Blocked products of packed operands: what the forward and the backward are made of.
//
// A product whose k is too long for a chunk of rows to stay in L2 runs in blocks of k over panels
// of columns, with fp32 partial sums of the panel in L2 (multiply below).
//
// An engine E gives: T (element), TA, TB (packed elements), MR, NR, NV, KR, the
// blocks ROWS, COLUMNS, K_BLOCK, and
//   pack_a(src, ld, rows, k, dst)                     strip of MR rows from row-major [rows, k]
//   pack_a_scaled(src, ld, rows, k, factor, dst)      the same, times factor
//   pack_a_f32(src, ld, rows, k, factor, dst)         the same from fp32
//   pack_a_t(src, ld, rows, k, dst)                   the same from [k, rows]
//   mask_a(strip, k, masks, ldmask, dst)              copy of a strip, dropped elements zero
//   pack_b_rows<Src>(src, ld, k, n, width, masks, n0, ldmask, dst)  one strip of B from [k, n];
//                    masks (null: none) select elements, n0 is the strip's first column in them
//   pack_b_cols<Src>(src, ld, k, n, width, dst)                 the same from [n, k]
//   micro(segments, count, rows, width, c, ldc, accumulate[, ahead])  C (+)= sum of A B over
//                    segments, fetching `ahead` into L2
//   add_masked(lora, rows, width, masks, ldmask, k0, c)         c += kept elements of lora
//   store(c, ldc, rows, n, bias, dst, ld)             fp32 tile -> T, bias added
//   Tail, micro_then(..., tail, output, ahead)        micro, then store `output`; an engine may
//                    leave the store in the tail and do it under the next product; flush(tail)
//   enter(), leave()                                  per-thread state of the unit
#pragma once

#include <algorithm>

#include "lora_linear.h"

namespace lora_kernels::lora_linear {
namespace {

// One product of a chain that shares an accumulator. k is a multiple of KR.
template <class E>
struct Segment {
  const typename E::TA* a;
  const typename E::TB* b;
  int64_t k;
};

struct Range {
  int64_t begin, end;
};

// What a later product will read: an engine may fetch it while it computes.
struct Ahead {
  const char* data = nullptr;
  int64_t bytes = 0;
};

// Slice `part` of `parts` of an array of elements.
template <class V>
Ahead ahead_slice(const V* data, int64_t count, int64_t part, int64_t parts) {
  const int64_t bytes = count * static_cast<int64_t>(sizeof(V));
  const int64_t slice = round_up((bytes + parts - 1) / parts, 64);
  const int64_t begin = std::min(bytes, part * slice);
  return {reinterpret_cast<const char*>(data) + begin, std::min(bytes - begin, slice)};
}

inline Range share(int64_t count, int part, int parts) {
  return {count * part / parts, count * (part + 1) / parts};
}

// Hands out cache-line aligned pieces of the thread's workspace; with base null it only measures.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class V>
  V* take(int64_t count) {
    V* piece = reinterpret_cast<V*>(base_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(V)), 64) + 64;
    return base_ ? piece : nullptr;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

template <class E>
int64_t strip_width(int64_t n, int64_t n0) {
  return std::min<int64_t>(E::NR, round_up(n - n0, E::NV));
}

// C[rows, n] = A B for one packed strip and a packed B of n columns, strip by strip, in blocks of k.
template <class E>
void multiply_strip(const typename E::TA* a, const typename E::TB* b, int64_t k, int64_t n,
                    int64_t rows, float* c, int64_t ldc) {
  for (int64_t n0 = 0; n0 < n; n0 += E::NR) {
    const int64_t width = strip_width<E>(n, n0);
    for (int64_t k0 = 0; k0 < k; k0 += E::K_BLOCK) {
      const Segment<E> segment{a + k0 * E::MR, b + n0 * k + k0 * width,
                               std::min<int64_t>(E::K_BLOCK, k - k0)};
      E::micro(&segment, 1, rows, width, c + n0, ldc, k0 > 0);
    }
  }
}

// Where a finished tile goes. `extra` is a second tile (ld NR) that is added unscaled.
template <class E>
struct Output {
  typename E::T* dst;
  int64_t ld;
  int64_t rows, n;
  const float* bias;
  const float* extra;
  bool stream;  // dst and ld are aligned to cache lines, and dst should not displace the cache
};

// One A B of the sum that makes an output: strips of A are MR * k apart, strips of B NR * k.
template <class E>
struct Term {
  const typename E::TA* a;
  const typename E::TB* b;
  int64_t k;
};

// Rows of a chunk, in strips: a chunk, a panel of COLUMNS columns, one block of K_BLOCK of both
// operands and the fp32 sums of chunk x panel share L2. Square blocks balance the traffic of the
// two operands from L3.
template <class E>
int64_t chunk_strips(int64_t max_strips) {
  const int64_t chunks = (max_strips * E::MR + E::ROWS - 1) / E::ROWS;  // of equal size
  return chunks == 0 ? 1 : (max_strips + chunks - 1) / chunks;
}

// The most strips that a thread has. Chunks are made from this number and not from a thread's own:
// fewer strips may give fewer and larger chunks than the workspace was measured for.
template <class E>
int64_t strips_per_thread(int64_t m, Grid grid) {
  const int64_t strips = (m + E::MR - 1) / E::MR;
  return (strips + grid.threads_m - 1) / grid.threads_m;
}

// fp32 sums of one panel; none where one block of k covers everything.
template <class E>
int64_t panel_floats(int64_t strips, int64_t k) {
  return k <= E::K_BLOCK ? 0 : strips * E::MR * int64_t{E::COLUMNS / E::NR} * E::NR;
}

// Results beyond this are stored past the cache: fetching their lines first, only to overwrite
// them, costs more than the reader gains.
constexpr int64_t kStreamBytes = int64_t{1} << 20;

template <class E>
bool streams(const void* dst, int64_t ld, int64_t rows, int64_t n) {
  constexpr int64_t e = sizeof(typename E::T);
  return rows * n * e >= kStreamBytes && reinterpret_cast<uintptr_t>(dst) % 64 == 0 &&
         ld * e % 64 == 0;
}

// out[strips x columns] = sum of terms, for row strips [0, strips) and column strips `cols`.
// make_output(i, j) gives the destination of tile (i, j) and runs once per tile, before its last
// block.
template <class E, class MakeOutput>
void multiply(const Term<E>* terms, int count, int64_t strips, int64_t n, Range cols, float* sums,
              typename E::Tail& tail, const MakeOutput& make_output) {
  constexpr int kMaxSegments = 2 * kMaxGroup;
  constexpr int64_t kPanel = E::COLUMNS / E::NR;
  for (int64_t j0 = cols.begin; j0 < cols.end; j0 += kPanel) {
    const int64_t j1 = std::min(j0 + kPanel, cols.end);
    int term = 0;
    int64_t k0 = 0;  // position in terms[term]
    for (bool first = true; term < count; first = false) {
      // The next block: pieces of terms until K_BLOCK is reached. A rest of less than half a
      // block is not worth another round of sums.
      struct Piece {
        int term;
        int64_t k0, k;
      } pieces[kMaxSegments];
      int piece_count = 0;
      for (int64_t room = E::K_BLOCK; term < count;) {
        const int64_t left = terms[term].k - k0;
        if (room == 0 && left > E::K_BLOCK / 2) break;
        const int64_t k = left <= room + E::K_BLOCK / 2 ? left : room;
        pieces[piece_count++] = {term, k0, k};
        room = std::max<int64_t>(0, room - k);
        k0 += k;
        if (k0 == terms[term].k) {
          ++term;
          k0 = 0;
        }
      }
      const bool last = term == count;
      for (int64_t j = j0; j < j1; ++j) {
        const int64_t width = strip_width<E>(n, j * E::NR);
        // The strip of B that follows streams from L3; every product of this one fetches a slice.
        const Term<E>& next_term = terms[j + 1 < j1 ? pieces[0].term : last ? 0 : term];
        const int64_t next_j = j + 1 < j1 ? j + 1 : last ? j1 : j0;
        const int64_t next_k0 = j + 1 < j1 ? pieces[0].k0 : last ? 0 : k0;
        const int64_t next_width = strip_width<E>(n, next_j * E::NR);
        const auto* next = next_term.b + next_j * E::NR * next_term.k + next_k0 * next_width;
        const int64_t next_count =
            next_j < cols.end ? next_width * std::min<int64_t>(E::K_BLOCK, next_term.k - next_k0)
                              : 0;
        for (int64_t i = 0; i < strips; ++i) {
          Segment<E> segments[kMaxSegments];
          for (int s = 0; s < piece_count; ++s) {
            const Term<E>& t = terms[pieces[s].term];
            segments[s] = {t.a + (i * t.k + pieces[s].k0) * E::MR,
                           t.b + j * E::NR * t.k + pieces[s].k0 * width, pieces[s].k};
          }
          const Ahead ahead = ahead_slice(next, next_count, i, strips);
          float* sum = sums + ((j - j0) * strips + i) * E::MR * E::NR;
          if (last) {
            E::micro_then(segments, piece_count, width, first ? nullptr : sum, tail,
                          make_output(i, j), ahead);
          } else {
            E::micro(segments, piece_count, E::MR, width, sum, E::NR, !first, ahead);
          }
        }
      }
    }
  }
  E::flush(tail);
}

}  // namespace
}  // namespace lora_kernels::lora_linear
