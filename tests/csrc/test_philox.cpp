// The dropout generator against a plain transcription of its definition.
#include "common/philox.h"

#include <initializer_list>

#include "check.h"

using namespace lora_kernels;

namespace {

// Keep decision of one element, straight from lora_kernels/ops/_philox.py.
bool keep_element(const DropoutParams& d, uint32_t row, uint32_t k, uint32_t stream) {
  uint32_t c[4] = {16 * (k / 128) + (k % 32) / 2, row, stream, 0};
  uint32_t key[2] = {d.key[0], d.key[1]};
  for (int round = 0; round < 7; ++round) {
    const uint64_t p0 = uint64_t{c[0]} * 0xD2511F53u, p1 = uint64_t{c[2]} * 0xCD9E8D57u;
    const uint32_t next[4] = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ key[0],
                              static_cast<uint32_t>(p1),
                              static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ key[1],
                              static_cast<uint32_t>(p0)};
    for (int i = 0; i < 4; ++i) c[i] = next[i];
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  const uint32_t word = c[(k % 128) / 32];
  return (k % 2 ? word >> 16 : word & 0xffffu) >= d.threshold;
}

}  // namespace

int main() {
  for (uint32_t threshold : {1u, 6554u, 32768u, 65535u, 65536u}) {
    const DropoutParams d{threshold, {0x12345678u, 0x9abcdef0u}};
    uint64_t kept = 0;
    for (uint32_t row : {0u, 1u, 4097u}) {
      for (uint32_t stream : {0u, 2u}) {
        for (uint32_t block = 0; block < 9; ++block) {
          uint32_t keep[4];
          philox_keep_block(d, row, block, stream, keep);
          for (uint32_t c = 0; c < 128; ++c) {
            const bool want = keep_element(d, row, 128 * block + c, stream);
            const bool got = (keep[c / 32] >> (c % 32)) & 1u;
            kept += got;
            CHECK(got == want, "threshold %u row %u column %u stream %u", threshold, row,
                  128 * block + c, stream);
          }
        }
      }
    }
    CHECK(threshold != 65536u || kept == 0, "p = 1 kept %lu", static_cast<unsigned long>(kept));
  }
  return finish("philox");
}
