// Every kernel table of quantized weights of this machine against double precision loops: nf4-like
// codes in aligned, straddling and odd blocks, int8, several threads, few and many rows. No torch.
#include "quant_linear/quant_linear.h"

#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "cpu/memory.h"

using namespace lora_kernels;
using namespace lora_kernels::quant_linear;

namespace {

struct Case {
  std::vector<uint8_t> codes;
  std::vector<float> scale;
  Weight weight{};

  Case(std::mt19937& generator, Layout layout, int64_t n, int64_t k, int64_t block) {
    std::uniform_real_distribution<float> uniform(0.5f, 1.5f);
    codes.resize(static_cast<size_t>(n * k));
    for (uint8_t& c : codes) c = static_cast<uint8_t>(generator());
    if (layout == Layout::kInt8) {
      for (uint8_t& c : codes) c = c == 128 ? 0 : c;
    }
    const int64_t scales = layout == Layout::kInt8 ? n : (n * k + block - 1) / block;
    scale.resize(static_cast<size_t>(scales));
    for (float& s : scale) s = uniform(generator);
    weight.layout = layout;
    weight.n = n;
    weight.k = k;
    weight.block = block;
    weight.codes = codes.data();
    weight.scale = scale.data();
    weight.factor = 1.0f / 127.0f;
    for (int i = 0; i < 16; ++i) weight.table[i] = std::tanh(0.2f * (i - 7));
  }

  float value(int64_t i, int64_t j) const {
    const int64_t e = i * weight.k + j;
    if (weight.layout == Layout::kInt8) {
      return static_cast<float>(static_cast<int8_t>(codes[e])) * scale[i] * weight.factor;
    }
    const int nibble = e % 2 ? codes[e / 2] & 15 : codes[e / 2] >> 4;
    return weight.table[nibble] * scale[e / weight.block];
  }
};

// All phases on `threads` threads, one after another.
template <class Params>
void run(const Job<Params>& job, const Params& p, int threads) {
  const auto shared = cpu::allocate(static_cast<size_t>(job.shared_bytes(p)) + 64);
  const auto own = cpu::allocate(static_cast<size_t>(job.own_bytes(p)) + 64);
  for (int phase = 0; phase < job.phases; ++phase) {
    for (int t = 0; t < threads; ++t) job.run(p, phase, t, threads, shared.get(), own.get());
  }
}

template <class T>
void check(const Kernels& kernels, Dtype dtype, const Case& made, int64_t m, int threads) {
  std::mt19937 generator(5);
  std::normal_distribution<float> normal;
  const Weight& w = made.weight;
  const auto random = [&](int64_t count) {
    std::vector<T> v(static_cast<size_t>(count));
    for (T& x : v) from_float(normal(generator), x);
    return v;
  };
  const std::vector<T> x = random(m * w.k), dy = random(m * w.n);
  std::vector<T> y(m * w.n), dx(m * w.k), all(w.n * w.k);
  std::vector<double> rounded(w.n * w.k);

  kernels.dequantize(w, dtype, all.data(), 0, w.n * w.k, false);
  for (int64_t e = 0; e < w.n * w.k; ++e) {
    T expected;
    from_float(made.value(e / w.k, e % w.k), expected);
    CHECK(to_float(all[e]) == to_float(expected), "%s: element %ld of the weight is %g", kernels.name,
          static_cast<long>(e), to_float(all[e]));
    rounded[e] = to_float(expected);
  }

  FwdParams f{};
  f.weight = &w;
  f.dtype = dtype;
  f.x = x.data();
  f.ldx = w.k;
  f.m = m;
  f.y = y.data();
  f.ldy = w.n;
  f.keep_scale = 1.0f;
  run(kernels.fwd, f, threads);
  BwdParams b{};
  b.weight = &w;
  b.dtype = dtype;
  b.dy = dy.data();
  b.lddy = w.n;
  b.m = m;
  b.dx = dx.data();
  b.lddx = w.k;
  b.keep_scale = 1.0f;
  run(kernels.bwd, b, threads);

  // One rounding of the result, one of each weight, and of each of the fp32 sums.
  const double unit = dtype == Dtype::kFloat32    ? 0x1p-24
                      : dtype == Dtype::kBFloat16 ? 0x1p-9
                                                  : 0x1p-12;
  const auto bound = [&](double sum, double size, int64_t terms) {
    return unit * (std::fabs(sum) + size) + static_cast<double>(terms) * 0x1p-24 * size;
  };
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < w.n; ++j) {
      double sum = 0, size = 0;
      for (int64_t k = 0; k < w.k; ++k) {
        const double term = rounded[j * w.k + k] * to_float(x[i * w.k + k]);
        sum += term;
        size += std::fabs(term);
      }
      CHECK(std::fabs(to_float(y[i * w.n + j]) - sum) <= bound(sum, size, w.k),
            "%s: y[%ld, %ld] of %ld rows is %g, not %g", kernels.name, static_cast<long>(i),
            static_cast<long>(j), static_cast<long>(m), to_float(y[i * w.n + j]), sum);
    }
    for (int64_t k = 0; k < w.k; ++k) {
      double sum = 0, size = 0;
      for (int64_t j = 0; j < w.n; ++j) {
        const double term = rounded[j * w.k + k] * to_float(dy[i * w.n + j]);
        sum += term;
        size += std::fabs(term);
      }
      CHECK(std::fabs(to_float(dx[i * w.k + k]) - sum) <= bound(sum, size, w.n),
            "%s: dx[%ld, %ld] of %ld rows is %g, not %g", kernels.name, static_cast<long>(i),
            static_cast<long>(k), static_cast<long>(m), to_float(dx[i * w.k + k]), sum);
    }
  }
}

void check_all(const Kernels* (*kernels)(Dtype)) {
  std::mt19937 generator(3);
  const Case cases[] = {{generator, Layout::kFlat, 67, 192, 64},
                        {generator, Layout::kFlat, 33, 192, 128},
                        {generator, Layout::kFlat, 40, 128, 32},
                        {generator, Layout::kFlat, 19, 77, 64},
                        {generator, Layout::kInt8, 35, 130, 1}};
  for (const Case& made : cases) {
    for (const int64_t m : {1, 17, 70}) {
      if (const Kernels* k = kernels(Dtype::kFloat32)) {
        check<float>(*k, Dtype::kFloat32, made, m, 3);
      }
      if (const Kernels* k = kernels(Dtype::kBFloat16)) {
        check<bf16>(*k, Dtype::kBFloat16, made, m, 2);
      }
      if (const Kernels* k = kernels(Dtype::kFloat16)) {
        check<fp16>(*k, Dtype::kFloat16, made, m, 1);
      }
    }
  }
}

}  // namespace

int main() {
  using cpu::Isa;
  check_all(kernels_baseline);
  if (cpu::machine_isa() >= Isa::kAvx2) check_all(kernels_avx2);
  if (cpu::machine_isa() >= Isa::kAvx512) check_all(kernels_avx512);
  if (cpu::machine_isa() >= Isa::kAmx) check_all(kernels_amx);
  return finish("quant_linear");
}
