// Compiled with the AMX target where the compiler has one.
#include "amx_peak.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include "isa.h"

#if defined(__AMX_BF16__)
#include "amx_config.h"
#endif

namespace lora_kernels::cpu {
#if defined(__AMX_BF16__)
namespace {

constexpr double kFlopsPerTileProduct = 2.0 * 16 * 16 * 32;

double tile_products_per_second(double seconds) {
  _tile_loadconfig(&kTileConfig);
  // Operands as random as real ones: on zeros the unit draws less power and clocks higher.
  alignas(64) uint16_t operands[4][512];
  uint32_t state = 12345;
  for (auto& tile : operands) {
    for (uint16_t& v : tile) {
      state = state * 1664525u + 1013904223u;
      v = static_cast<uint16_t>(0x3f00u | ((state >> 16) & 0x80ffu));
    }
  }
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, operands[0], 64);
  _tile_loadd(5, operands[1], 64);
  _tile_loadd(6, operands[2], 64);
  _tile_loadd(7, operands[3], 64);
  using clock = std::chrono::steady_clock;
  const auto start = clock::now();
  double done = 0, elapsed = 0;
  do {
    for (int i = 0; i < 4096; ++i) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    done += 4 * 4096;
    elapsed = std::chrono::duration<double>(clock::now() - start).count();
  } while (elapsed < seconds);
  _tile_release();
  return done / elapsed;
}

}  // namespace

double amx_peak_gflops(double seconds, int threads) {
  if (active_isa() < Isa::kAmx) return 0.0;
  std::vector<double> rates(threads, 0.0);
  std::vector<std::thread> workers;
  for (int t = 0; t < threads; ++t) {
    workers.emplace_back([&, t] { rates[t] = tile_products_per_second(seconds); });
  }
  double sum = 0;
  for (int t = 0; t < threads; ++t) {
    workers[t].join();
    sum += rates[t];
  }
  return sum * kFlopsPerTileProduct * 1e-9;
}
#else
double amx_peak_gflops(double, int) { return 0.0; }
#endif

}  // namespace lora_kernels::cpu
