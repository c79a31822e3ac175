// Bias and rotation in the accumulators of wgmma, thread by thread, against the formula in double:
// which thread holds which element is written here from the PTX ISA (m64nNk16, D fragment).
#include <cmath>
#include <vector>

#include "check.h"
#include "lora_qkv/cuda/rotate_accumulators.cuh"

using namespace lora_kernels;
using namespace lora_kernels::lora_qkv::cuda;

namespace {

constexpr int kColumns = 256, kRows = 64;

struct Place {
  int row, column;
};

// Of register i of thread t.
Place place_of(int t, int i) {
  return {16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2), 8 * (i / 4) + 2 * (t % 4) + i % 2};
}

float value(int a, int b) { return static_cast<float>((a * 37 + b * 11) % 61 - 30) / 8.0f; }

template <int D>
void run(int rotated, int rows, bool bias, bool ids) {
  constexpr int kSequence = 5;
  const int n = 2 * kColumns - D, first_row = 64, first_column = kColumns;  // one head is missing
  std::vector<float> cos(50 * D), sin(50 * D), biases(n);
  for (int i = 0; i < 50 * D; ++i) {
    cos[i] = std::cos(0.37f * static_cast<float>(i));
    sin[i] = std::sin(0.53f * static_cast<float>(i));
  }
  for (int i = 0; i < n; ++i) biases[i] = value(i, 5);
  std::vector<int64_t> positions(200);
  for (int i = 0; i < 200; ++i) positions[i] = (i * 7) % 50;
  positions[first_row + 3] = 50;
  rope::cuda::Rotation r{};
  r.cos = {cos.data(), Dtype::kFloat32, 0, D, 1};
  r.sin = {sin.data(), Dtype::kFloat32, 0, D, 1};
  r.sequence = kSequence;
  r.channels = D;
  if (ids) {
    r.ids = positions.data();
    r.ids_bytes = 8;
    r.ids_batch = kSequence;
    r.ids_row = 1;
    r.positions = 50;
  }
  const HeadsOfProblem heads{bias ? biases.data() : nullptr, Dtype::kFloat32, n, rotated};
  for (int t = 0; t < 128; ++t) {
    float d[kColumns / 2];
    for (int i = 0; i < kColumns / 2; ++i) {
      const Place at = place_of(t, i);
      d[i] = value(first_row + at.row, first_column + at.column);
    }
    rotate_accumulators<D>(r, heads, {first_row, first_column, rows}, t, d);
    for (int i = 0; i < kColumns / 2; ++i) {
      const Place at = place_of(t, i);
      const int row = first_row + at.row, column = first_column + at.column;
      if (row >= rows || column >= n) continue;
      const int head = column / D, channel = column % D;
      const auto y = [&](int c) {
        return static_cast<double>(value(row, head * D + c)) + (bias ? biases[head * D + c] : 0.0f);
      };
      double want = y(channel);
      const int64_t position = ids ? positions[row] : row % kSequence;
      if (head < rotated && position >= 50) {
        CHECK(std::isnan(d[i]), "a position outside of the cache, row %d", row);
        continue;
      }
      if (head < rotated) {
        const int half = D / 2, other = channel < half ? channel + half : channel - half;
        const double sign = channel < half ? -1.0 : 1.0;
        want = y(channel) * cos[position * D + channel] +
               sign * y(other) * sin[position * D + channel];
      }
      CHECK(std::fabs(d[i] - want) <= 1e-6 * (1.0 + std::fabs(want)),
            "D %d row %d column %d: %g %g", D, row, column, d[i], want);
    }
  }
}

template <int D>
void run_all() {
  const int heads = (2 * kColumns - D) / D;
  for (const int rotated : {heads, kColumns / D, heads - 1 > 0 ? heads - 1 : 0}) {
    for (const int rows : {200, 100}) {
      run<D>(rotated, rows, true, false);
      run<D>(rotated, rows, rotated % 2 == 0, true);
    }
  }
}

}  // namespace

int main() {
  run_all<64>();
  run_all<128>();
  run_all<256>();
  return finish("project_sm90");
}
