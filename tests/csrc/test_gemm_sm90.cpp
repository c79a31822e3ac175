// The integer side of the sm_90a GEMM against models of the hardware, written from the PTX ISA:
// where the copy engine puts the elements of a box, which bytes a wgmma descriptor names, how
// accumulators and stmatrix lie. Every operand tile of the kernel is written by the first and read
// by the second; the two share no code with smem_tile.h.
#include <cstdlib>
#include <map>
#include <vector>

#include "check.h"
#include "common/philox.h"
#include "lora_linear/cuda/gemm_sm90_schedule.h"

using namespace lora_kernels;
using namespace lora_kernels::lora_linear::cuda;

namespace {

// The 128-byte swizzle as a function of the address: bits 4-6 are xored with bits 7-9.
uint32_t hardware_swizzle(uint32_t address) { return address ^ ((address >> 7 & 7u) << 4); }

// Shared memory whose 16-bit elements remember which matrix element they are.
struct Element {
  int outer = -1, inner = -1;
  bool operator==(const Element& o) const { return outer == o.outer && inner == o.inner; }
};
using Shared = std::map<uint32_t, Element>;

// A box of `rows` rows of 64 elements, first element (row, column) of the source, at `address`.
void copy_box(Shared& shared, uint32_t address, int row, int column, int rows) {
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < 64; ++c) {
      const uint32_t at = hardware_swizzle(address + static_cast<uint32_t>(128 * r + 2 * c));
      CHECK(shared.emplace(at, Element{row + r, column + c}).second, "two elements at %u", at);
    }
  }
}

struct Fields {
  uint32_t start, leading, stride, base_offset, layout;
};

Fields decode(uint64_t d) {
  return {static_cast<uint32_t>(d & 0x3fff) << 4, static_cast<uint32_t>(d >> 16 & 0x3fff) << 4,
          static_cast<uint32_t>(d >> 32 & 0x3fff) << 4, static_cast<uint32_t>(d >> 49 & 7),
          static_cast<uint32_t>(d >> 62)};
}

// The element that wgmma takes as (mn, k) of a 16-wide step.
Element fetch(const Shared& shared, uint64_t descriptor, bool mn_major, int mn, int k) {
  const Fields f = decode(descriptor);
  CHECK(f.layout == 1 && f.base_offset == 0, "layout %u base offset %u", f.layout, f.base_offset);
  const auto u = [](int v) { return static_cast<uint32_t>(v); };
  const uint32_t offset =
      mn_major ? 2 * u(mn % 64) + u(mn / 64) * f.leading + 128 * u(k % 8) + u(k / 8) * f.stride
               : 128 * u(mn % 8) + u(mn / 8) * f.stride + 2 * u(k);
  const auto found = shared.find(hardware_swizzle(f.start + offset));
  return found == shared.end() ? Element{} : found->second;
}

constexpr uint32_t kStage = 5 * kSwizzlePeriod;  // any multiple of the pattern

void check_k_major(int rows) {
  Shared shared;
  for (int box = 0; box < rows / 128; ++box) {
    copy_box(shared, kStage + static_cast<uint32_t>(box * 128 * kTileRowBytes), 128 * box, 0, 128);
  }
  for (int first = 0; first < rows; first += 64) {  // the consumers of A start at rows 0 and 64
    const uint32_t tile = kStage + static_cast<uint32_t>(first * kTileRowBytes);
    for (int s = 0; s < 4; ++s) {
      for (int mn = 0; mn < rows - first; ++mn) {
        for (int k = 0; k < 16; ++k) {
          const Element got =
              fetch(shared, k_major_descriptor(tile, static_cast<uint32_t>(s)), false, mn, k);
          CHECK((got == Element{first + mn, 16 * s + k}), "K-major row %d k %d: %d %d", first + mn,
                16 * s + k, got.outer, got.inner);
        }
      }
    }
  }
}

void check_n_major(int columns) {
  const uint32_t box_bytes = 64 * kTileRowBytes;
  Shared shared;
  for (int box = 0; box < columns / 64; ++box) {
    copy_box(shared, kStage + static_cast<uint32_t>(box) * box_bytes, 0, 64 * box, 64);
  }
  for (int s = 0; s < 4; ++s) {
    const uint64_t d = n_major_descriptor(kStage, static_cast<uint32_t>(s), box_bytes);
    for (int n = 0; n < columns; ++n) {
      for (int k = 0; k < 16; ++k) {
        const Element got = fetch(shared, d, true, n, k);
        CHECK((got == Element{16 * s + k, n}), "N-major k %d column %d: %d %d", 16 * s + k, n,
              got.outer, got.inner);
      }
    }
  }
}

// The bits that CUTLASS 4.2 (make_gmma_desc) gives for the same layouts at address 0.
void check_known_bits() {
  const uint64_t n_major = 4611686293338849280u, k_major = 4611686293305360384u;
  CHECK(n_major_descriptor(0, 0, 8192) == n_major, "N-major");
  CHECK(n_major_descriptor(0, 1, 8192) == n_major + 2048 / 16, "N-major, second step");
  CHECK(k_major_descriptor(0, 0) == k_major, "K-major");
  CHECK(k_major_descriptor(0, 1) == k_major + 32 / 16, "K-major, second step");
}

// A descriptor with the two strides exchanged must not pass the model.
void check_model_notices() {
  Shared shared;
  for (int box = 0; box < 4; ++box) copy_box(shared, kStage + 8192u * box, 0, 64 * box, 64);
  const uint64_t wrong = wgmma_descriptor(kStage, kSwizzlePeriod, 8192);
  int bad = 0;
  for (int n = 0; n < 256; ++n) {
    for (int k = 0; k < 16; ++k) bad += !(fetch(shared, wrong, true, n, k) == Element{k, n});
  }
  CHECK(bad > 0, "exchanged strides went unnoticed");
}

// Accumulators through stmatrix into a staging box, out by the copy engine.
void check_staging() {
  std::map<uint32_t, Element> box;
  for (int warp = 0; warp < 4; ++warp) {
    for (int j = 0; j < 8; j += 2) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        for (int lane = 0; lane < 32; ++lane) {
          // Register `matrix` of the lane, as store_tile packs it.
          const int h = matrix % 2, column_block = j + matrix / 2;
          // The hardware: row lane / 4 of the matrix, at the address that lane 8 matrix + row gave.
          const int giver = 8 * matrix + lane / 4;
          const uint32_t address = swizzle_128b(static_cast<uint32_t>(16 * warp + giver % 16),
                                                static_cast<uint32_t>(j + giver / 16));
          for (int e = 0; e < 2; ++e) {
            const uint32_t at = address + static_cast<uint32_t>(2 * (2 * (lane % 4) + e));
            const Element element{16 * warp + lane / 4 + 8 * h,
                                  8 * column_block + 2 * (lane % 4) + e};
            CHECK(box.emplace(at, element).second, "two elements at %u", at);
          }
        }
      }
    }
  }
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < 64; ++column) {
      const auto found = box.find(hardware_swizzle(static_cast<uint32_t>(128 * row + 2 * column)));
      CHECK(found != box.end() && (found->second == Element{row, column}), "staged %d %d", row,
            column);
    }
  }
}

// Keep bits of every accumulator of a 64 x 256 tile against the CPU's draw of whole rows.
void check_keep_bits() {
  const DropoutParams d{6554, {0x12345678u, 0x9abcdef0u}};
  for (int block = 0; block < 2; ++block) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int h = 0; h < 2; ++h) {
        const uint32_t row = static_cast<uint32_t>(lane / 4 + 8 * h);
        uint32_t want[4];
        philox_keep_block(d, row, static_cast<uint32_t>(block), 3, want);
        for (int i = 0; i < 4; ++i) {
          uint32_t word[4];
          philox_words(d.key[0], d.key[1],
                       static_cast<uint32_t>(16 * block + keep_pair(i, lane % 4)), row, 3, word);
          for (int w = 0; w < 4; ++w) {
            const KeepPlace at = keep_place(block, w, i, h);
            for (int e = 0; e < 2; ++e) {
              const int index = at.bit + e;  // register 4 j + 2 h + e
              CHECK(index % 4 / 2 == h && index % 2 == e, "register %d", index);
              const int column = 64 * at.chunk + 8 * (index / 4) + 2 * (lane % 4) + e - 128 * block;
              const bool kept = ((e ? word[w] >> 16 : word[w] & 0xffffu)) >= d.threshold;
              CHECK(column >= 0 && column < 128 &&
                        kept == ((want[column / 32] >> (column % 32)) & 1u),
                    "block %d lane %d column %d", block, lane, column);
            }
          }
        }
      }
    }
  }
}

void check_schedule() {
  for (int m_blocks : {1, 2, 7, 8, 9, 33}) {
    for (int n_blocks : {1, 3, 16}) {
      for (int band : {1, 8, 16}) {
        std::vector<int> seen(static_cast<size_t>(m_blocks * n_blocks));
        for (int tile = 0; tile < m_blocks * n_blocks; ++tile) {
          const TilePlace at = place_tile(tile, m_blocks, n_blocks, band);
          const bool inside =
              at.m_block >= 0 && at.m_block < m_blocks && at.n_block >= 0 && at.n_block < n_blocks;
          CHECK(inside, "tile %d of %d x %d is outside", tile, m_blocks, n_blocks);
          if (inside) ++seen[static_cast<size_t>(at.m_block * n_blocks + at.n_block)];
        }
        for (int count : seen) CHECK(count == 1, "a tile was taken %d times", count);
      }
    }
  }
  for (int k = 1; k < 300; ++k) {
    const TermBlocks b = term_blocks(k);
    CHECK(b.tail >= 0 && b.tail <= 4 && 64 * b.full + 16 * b.tail >= k &&
              64 * b.full + 16 * b.tail < k + 16 && b.full + (b.tail > 0) == (k + 63) / 64,
          "k %d: %d blocks and %d steps", k, b.full, b.tail);
  }
}

}  // namespace

int main() {
  check_k_major(128);
  check_k_major(256);
  check_n_major(128);
  check_n_major(256);
  check_known_bits();
  check_model_notices();
  check_staging();
  check_keep_bits();
  check_schedule();
  CHECK(Sm90Tile<256>::kStages == 4 && Sm90Tile<128>::kStages == 6, "stages");
  return finish("gemm_sm90");
}
