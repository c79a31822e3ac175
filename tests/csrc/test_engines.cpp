// Every engine of this machine against double precision loops, through the Engine tables: odd
// shapes, several threads, split columns, blocks of k, dropout. No torch.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "lora_linear/lora_linear.h"

using namespace lora_kernels;
using namespace lora_kernels::lora_linear;

namespace {

struct Matrix {
  int64_t rows, columns;
  std::vector<float> values;
  float operator()(int64_t i, int64_t j) const { return values[i * columns + j]; }
};

template <class T>
std::vector<T> narrow(Matrix& m) {
  std::vector<T> out(m.values.size());
  for (size_t i = 0; i < out.size(); ++i) {
    from_float(m.values[i], out[i]);
    m.values[i] = to_float(out[i]);
  }
  return out;
}

Matrix random_matrix(std::mt19937& generator, int64_t rows, int64_t columns, float scale) {
  std::normal_distribution<float> normal(0.0f, scale);
  Matrix m{rows, columns, std::vector<float>(rows * columns)};
  for (float& v : m.values) v = normal(generator);
  return m;
}

bool kept(const DropoutParams& d, int64_t row, int64_t k) {
  if (d.threshold == 0) return true;
  uint32_t bits[4];
  philox_keep_block(d, static_cast<uint32_t>(row), static_cast<uint32_t>(k / 128), 0, bits);
  return (bits[k % 128 / 32] >> (k % 32)) & 1u;
}

std::shared_ptr<void> pack(const Engine& e, Dtype dtype, const void* src, int64_t ld, int64_t k,
                           int64_t n, bool columns) {
  auto block = cpu::allocate(packed_b_bytes(e, k, n));
  for (int part = 0; part < 3; ++part) {
    (columns ? e.pack_b_cols : e.pack_b_rows)(dtype, src, ld, k, n, block.get(), part, 3);
  }
  return block;
}

template <class T>
double worst(const std::vector<T>& got, const std::vector<double>& want) {
  double scale = 0, error = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    scale = std::max(scale, std::abs(want[i]));
    error = std::max(error, std::abs(static_cast<double>(to_float(got[i])) - want[i]));
  }
  return scale == 0 ? error : error / scale;
}

template <class T>
void check_engine(const Engine& e, Dtype dtype, int64_t m, int64_t k, int64_t n, int64_t r, Grid grid,
                  uint32_t threshold, double epsilon) {
  std::mt19937 generator(static_cast<unsigned>(m + 3 * k + 7 * n + 11 * r));
  Matrix x = random_matrix(generator, m, k, 1.0f), dy = random_matrix(generator, m, n, 1.0f);
  Matrix w = random_matrix(generator, n, k, 1.0f / std::sqrt(static_cast<float>(k)));
  Matrix a = random_matrix(generator, r, k, 1.0f / std::sqrt(static_cast<float>(k)));
  Matrix b = random_matrix(generator, n, r, 1.0f / std::sqrt(static_cast<float>(r)));
  Matrix bias = random_matrix(generator, 1, n, 1.0f);
  const std::vector<T> xt = narrow<T>(x), dyt = narrow<T>(dy), wt = narrow<T>(w);
  const std::vector<T> at = narrow<T>(a), bt = narrow<T>(b);
  const float scaling = 0.75f;

  FwdParams p{};
  p.m = m;
  p.k = k;
  p.members = 1;
  p.dropout = {threshold, {7, 9}};
  p.keep_scale = 65536.0f / static_cast<float>(65536 - threshold);
  p.x = xt.data();
  p.ldx = k;
  std::vector<T> y(m * n), s(m * r), dx(m * k);
  p.s = s.data();
  p.lds = r;
  const auto w_fwd = pack(e, dtype, wt.data(), k, k, n, true);
  const auto a_fwd = pack(e, dtype, at.data(), k, k, r, true);
  const auto b_fwd = pack(e, dtype, bt.data(), r, r, n, true);
  p.member[0] = {w_fwd.get(), a_fwd.get(), b_fwd.get(), bias.values.data(), y.data(), n, n, r, 0,
                 scaling};
  const int threads = grid.threads_m * grid.threads_n;
  for (int t = 0; t < threads; ++t) {
    e.fwd(p, grid, t, cpu::thread_workspace(e.fwd_workspace(p, grid)));
  }

  BwdParams q{};
  q.m = m;
  q.k = k;
  q.members = 1;
  q.dropout = p.dropout;
  q.keep_scale = p.keep_scale;
  q.x = xt.data();
  q.ldx = k;
  q.s = s.data();
  q.lds = r;
  q.dx = dx.data();
  q.lddx = k;
  const int64_t rp = round_up(r, e.mr), kp = round_up(k, e.nv), np = round_up(n, e.nv);
  std::vector<float> da_parts(grid.threads_m * rp * kp), db_parts(grid.threads_m * rp * np);
  const auto w_bwd = pack(e, dtype, wt.data(), k, n, k, false);
  const auto a_bwd = pack(e, dtype, at.data(), k, r, k, false);
  const auto b_bwd = pack(e, dtype, bt.data(), r, n, r, false);
  q.member[0] = {w_bwd.get(), a_bwd.get(), b_bwd.get(), dyt.data(), n, n, r, 0, scaling,
                 da_parts.data(), db_parts.data()};
  for (int t = 0; t < threads; ++t) {
    e.bwd(q, grid, t, cpu::thread_workspace(e.bwd_workspace(q, grid)));
  }

  std::vector<double> sw(m * r), yw(m * n), dsw(m * r), dxw(m * k), daw(r * k), dbw(n * r);
  const double ks = p.keep_scale;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t c = 0; c < r; ++c) {
      double sum = 0, back = 0;
      for (int64_t l = 0; l < k; ++l) sum += kept(p.dropout, i, l) ? double{x(i, l)} * a(c, l) : 0.0;
      for (int64_t l = 0; l < n; ++l) back += double{dy(i, l)} * b(l, c);
      sw[i * r + c] = sum * ks;
      dsw[i * r + c] = back * scaling * ks;
    }
    for (int64_t j = 0; j < n; ++j) {
      double sum = bias(0, j);
      for (int64_t l = 0; l < k; ++l) sum += double{x(i, l)} * w(j, l);
      for (int64_t c = 0; c < r; ++c) sum += scaling * sw[i * r + c] * b(j, c);
      yw[i * n + j] = sum;
      for (int64_t c = 0; c < r; ++c) dbw[j * r + c] += scaling * double{dy(i, j)} * sw[i * r + c];
    }
    for (int64_t l = 0; l < k; ++l) {
      const bool keep = kept(p.dropout, i, l);
      double sum = 0;
      for (int64_t j = 0; j < n; ++j) sum += double{dy(i, j)} * w(j, l);
      for (int64_t c = 0; c < r; ++c) {
        sum += keep ? dsw[i * r + c] * a(c, l) : 0.0;
        daw[c * k + l] += keep ? dsw[i * r + c] * x(i, l) : 0.0;
      }
      dxw[i * k + l] = sum;
    }
  }
  std::vector<float> da(r * k), db(n * r);
  for (int64_t part = 0; part < grid.threads_m; ++part) {
    for (int64_t c = 0; c < r; ++c) {
      for (int64_t l = 0; l < k; ++l) da[c * k + l] += da_parts[(part * rp + c) * kp + l];
      for (int64_t j = 0; j < n; ++j) {
        db[j * r + c] += scaling * db_parts[(part * rp + c) * np + j];
      }
    }
  }
  const double errors[] = {worst(y, yw), worst(s, sw), worst(dx, dxw), worst(da, daw), worst(db, dbw)};
  const char* names[] = {"y", "s", "dx", "da", "db"};
  for (int i = 0; i < 5; ++i) {
    CHECK(errors[i] <= epsilon, "%s m=%ld k=%ld n=%ld r=%ld grid %dx%d threshold %u: %s off by %.2g",
          e.name, static_cast<long>(m), static_cast<long>(k), static_cast<long>(n),
          static_cast<long>(r), grid.threads_m, grid.threads_n, threshold, names[i], errors[i]);
  }
}

template <class T>
void check_all(const Engine* (*engine)(Dtype), Dtype dtype, double epsilon) {
  const Engine* e = engine(dtype);
  if (e == nullptr) return;
  for (uint32_t threshold : {0u, 20000u}) {
    check_engine<T>(*e, dtype, 1, 1, 1, 1, {1, 1}, threshold, epsilon);
    check_engine<T>(*e, dtype, 3, 130, 47, 5, {1, 2}, threshold, epsilon);
    check_engine<T>(*e, dtype, 65, 96, 97, 16, {2, 1}, threshold, epsilon);
    check_engine<T>(*e, dtype, 130, 37, 200, 33, {2, 2}, threshold, epsilon);
    check_engine<T>(*e, dtype, 70, 1500, 64, 8, {1, 1}, threshold, epsilon);
    check_engine<T>(*e, dtype, 70, 64, 1500, 8, {3, 1}, threshold, epsilon);
  }
}

void check_isa(const Engine* (*engine)(Dtype)) {
  // Relative to the largest element: the rounding of the result and of S, and the sums.
  check_all<float>(engine, Dtype::kFloat32, 0x1p-19);
  check_all<bf16>(engine, Dtype::kBFloat16, 0x1p-6);
  check_all<fp16>(engine, Dtype::kFloat16, 0x1p-9);
}

}  // namespace

int main() {
  const cpu::Isa isa = cpu::machine_isa();
  check_isa(engine_baseline);
  if (isa >= cpu::Isa::kAvx2) check_isa(engine_avx2);
  if (isa >= cpu::Isa::kAvx512) check_isa(engine_avx512);
  if (isa >= cpu::Isa::kAmx) check_isa(engine_amx);
  std::printf("engines up to %s\n", cpu::isa_name(isa));
  return finish("engines");
}
