#include "hopper.h"

#include <cmath>
#include <cstring>
#include <map>
#include <vector>

namespace lora_kernels::emulator {
namespace {

struct Mbarrier {
  int count = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;  // parity of the phase that runs
  std::vector<int> waiting;
};

struct Copy {
  uint32_t destination, barrier;
  const TensorMap* map;
  int at[4];
};

// A product of the 32 lanes of a warp; operands of A in registers are read through the pointers.
struct Issued {
  Product lane[kWarp];
  int warp_in_group;
};

// The accumulators of a warp that products under way belong to.
struct Flight {
  std::vector<std::vector<float>> d;  // [lane][count]
  bool late = false;
};

struct WarpState {
  std::vector<Issued> open;
  std::vector<std::vector<Issued>> groups;
  std::map<float*, Flight> flights;  // by lane 0's accumulators
};

std::map<uint32_t, Mbarrier> mbarriers;
std::vector<Copy> copies;
std::map<int, WarpState> warps;

void settle(Mbarrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  b.pending = b.count;
  b.phase ^= 1;
  for (int thread : b.waiting) wake(thread);
  b.waiting.clear();
}

Mbarrier& find(uint32_t barrier) {
  const auto found = mbarriers.find(barrier);
  if (found == mbarriers.end()) fail("an mbarrier that was never initialised");
  return found->second;
}

uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7u) << 4); }

int64_t box_bytes(const TensorMap& m) {
  return int64_t{2} * m.box[0] * m.box[1] * m.box[2] * m.box[3];
}

void carry_out(const Copy& c) {
  const TensorMap& m = *c.map;
  unsigned char* shared = dynamic_shared();
  uint32_t row = 0;
  for (int z = 0; z < m.box[3]; ++z) {
    for (int y = 0; y < m.box[2]; ++y) {
      for (int x = 0; x < m.box[1]; ++x, ++row) {
        for (int e = 0; e < m.box[0]; ++e) {
          const int64_t at[4] = {c.at[0] + e, c.at[1] + x, c.at[2] + y, c.at[3] + z};
          int64_t offset = 0;
          bool inside = true;
          for (int i = 0; i < 4; ++i) {
            inside = inside && at[i] >= 0 && at[i] < m.extent[i];
            offset += at[i] * m.stride[i];
          }
          unsigned char* to =
              shared + swizzled(c.destination + row * 128 + 2 * static_cast<uint32_t>(e));
          if (inside) {
            std::memcpy(to, m.data + offset, 2);
          } else {
            std::memset(to, 0, 2);
          }
        }
      }
    }
  }
  Mbarrier& b = mbarriers[c.barrier];
  b.bytes -= box_bytes(m);
  settle(b);
}

void reset() {
  mbarriers.clear();
  copies.clear();
  warps.clear();
}

bool busy() { return !copies.empty(); }

void step() {
  const uint32_t i = draw(static_cast<uint32_t>(copies.size()));
  const Copy copy = copies[i];
  copies[i] = copies.back();
  copies.pop_back();
  carry_out(copy);
}

const bool registered = (set_async_unit({reset, busy, step}), true);

// Element (mn, k) of a 16-wide step: PTX ISA, "matrix descriptor format", 128-byte swizzle.
float fetch(const Product& p, uint64_t descriptor, bool mn_major, uint32_t mn, uint32_t k) {
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const uint32_t leading = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) fail("an operand without the 128-byte swizzle");
  const uint32_t offset = mn_major
                              ? 2 * (mn % 64) + mn / 64 * leading + 128 * (k % 8) + k / 8 * stride
                              : 128 * (mn % 8) + mn / 8 * stride + 2 * k;
  const unsigned char* at = dynamic_shared() + swizzled(start + offset);
  check_shared(at, 2, 2);
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  return p.widen(bits);
}

void multiply(const Issued& op, Flight& flight) {
  const Product& first = op.lane[0];
  const int columns = 2 * first.count;
  float a[16][16];
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      if (first.a == nullptr) {
        a[row][k] = fetch(first, first.a_descriptor, false,
                          static_cast<uint32_t>(16 * op.warp_in_group + row),
                          static_cast<uint32_t>(k));
      } else {
        const int lane = 4 * (row % 8) + k % 8 / 2, reg = row / 8 + 2 * (k / 8);
        const uint32_t pair = op.lane[lane].a[reg];
        a[row][k] = first.widen(static_cast<uint16_t>(k % 2 ? pair >> 16 : pair));
      }
    }
  }
  for (int n = 0; n < columns; ++n) {
    float b[16];
    for (int k = 0; k < 16; ++k) {
      b[k] = fetch(first, first.b_descriptor, first.transposed_b, static_cast<uint32_t>(n),
                   static_cast<uint32_t>(k));
    }
    for (int row = 0; row < 16; ++row) {
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k];
      const int lane = 4 * (row % 8) + n % 8 / 2, reg = 4 * (n / 8) + 2 * (row / 8) + n % 2;
      float& d = flight.d[static_cast<size_t>(lane)][static_cast<size_t>(reg)];
      d = first.accumulate ? d + sum : sum;
    }
  }
}

WarpState& own_warp() { return warps[current_thread() / kWarp]; }

void issue(const void* const* in, void* const*) {
  Issued op;
  for (int lane = 0; lane < kWarp; ++lane) op.lane[lane] = *static_cast<const Product*>(in[lane]);
  op.warp_in_group = current_thread() / kWarp % 4;
  const Product& first = op.lane[0];
  for (const Product& p : op.lane) {
    if (p.b_descriptor != first.b_descriptor || p.a_descriptor != first.a_descriptor ||
        p.accumulate != first.accumulate) {
      fail("lanes give a product different operands");
    }
  }
  WarpState& w = own_warp();
  auto [at, is_new] = w.flights.try_emplace(first.d);
  Flight& flight = at->second;
  if (is_new) {
    flight.late = draw(2) != 0;
    for (const Product& p : op.lane) {
      flight.d.emplace_back(p.d, p.d + p.count);
      std::memset(p.d, 0xff, sizeof(float) * static_cast<size_t>(p.count));
    }
  }
  if (!flight.late) multiply(op, flight);
  w.open.push_back(op);
}

// All lanes are here, so that operands in registers can still be read.
void retire(const void* const* in, void* const*) {
  WarpState& w = own_warp();
  const size_t pending = static_cast<size_t>(*static_cast<const int*>(in[0]));
  while (w.groups.size() > pending) {
    const std::vector<Issued> group = w.groups.front();
    w.groups.erase(w.groups.begin());
    for (const Issued& op : group) {
      const auto at = w.flights.find(op.lane[0].d);
      if (at->second.late) multiply(op, at->second);
    }
    for (const Issued& op : group) {  // those that no later group goes on with are done
      bool used = false;
      for (const auto& later : w.groups) {
        for (const Issued& other : later) used = used || other.lane[0].d == op.lane[0].d;
      }
      const auto at = w.flights.find(op.lane[0].d);
      if (used || at == w.flights.end()) continue;
      for (size_t lane = 0; lane < kWarp; ++lane) {
        const std::vector<float>& d = at->second.d[lane];
        std::memcpy(op.lane[lane].d, d.data(), sizeof(float) * d.size());
      }
      w.flights.erase(at);
    }
  }
}

void close_group(const void* const*, void* const*) {
  WarpState& w = own_warp();
  w.groups.push_back(w.open);
  w.open.clear();
}

struct StoredMatrix {
  uint32_t address, r[4];
};

void store_matrix(const void* const* in, void* const*) {
  const auto lane_of = [&](int lane) { return static_cast<const StoredMatrix*>(in[lane]); };
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int lane = 0; lane < kWarp; ++lane) {
      unsigned char* row = dynamic_shared() + lane_of(8 * matrix + lane / 4)->address;
      check_shared(row, 16, 16);
      std::memcpy(row + 4 * (lane % 4), &lane_of(lane)->r[matrix], 4);
    }
  }
}

}  // namespace

void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  check_shared(dynamic_shared() + barrier, 8, 8);
  Mbarrier b;
  b.count = b.pending = static_cast<int>(arrivals);
  mbarriers[barrier] = b;
}

void mbarrier_arrive(uint32_t barrier, uint32_t bytes) {
  Mbarrier& b = find(barrier);
  b.bytes += bytes;
  if (--b.pending < 0) fail("more arrivals at an mbarrier than it counts");
  settle(b);
}

void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  while (find(barrier).phase == parity) {
    find(barrier).waiting.push_back(current_thread());
    suspend();
  }
}

void tma_load(uint32_t destination, const TensorMap* map, uint32_t barrier, const int (&at)[4]) {
  (void)registered;
  find(barrier);
  if (destination % 1024 != 0) fail("a swizzled box off its 1024 bytes");
  unsigned char* to = dynamic_shared() + destination;
  const int64_t bytes = box_bytes(*map);
  check_shared(to, static_cast<size_t>(bytes), 128);
  std::memset(to, 0xff, static_cast<size_t>(bytes));
  Copy copy{destination, barrier, map, {at[0], at[1], at[2], at[3]}};
  copies.push_back(copy);
}

void wgmma(const Product& product) { warp_collective("wgmma", issue, &product, nullptr); }
void wgmma_commit() { warp_collective("wgmma commit", close_group, nullptr, nullptr); }
void wgmma_wait(int pending) { warp_collective("wgmma wait", retire, &pending, nullptr); }

void store_matrix_x4(uint32_t row_address, const uint32_t (&r)[4]) {
  const StoredMatrix m{row_address, {r[0], r[1], r[2], r[3]}};
  warp_collective("stmatrix", store_matrix, &m, nullptr);
}

}  // namespace lora_kernels::emulator
