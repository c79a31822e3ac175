// Host entry of rms_norm on the CPU: checks, output allocation, Params, threads.
#include "rms_norm_host.h"

#include <ATen/Parallel.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include "../common/tensor_operands.h"
#include "../cpu/isa.h"
#include "../cpu/memory.h"
#include "../lora_linear/lora_linear.h"
#include "rms_norm.h"

namespace lora_kernels::rms_norm {
namespace {

using Maybe = std::optional<at::Tensor>;

constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread
constexpr int64_t kMostChunks = 256;

Dtype dtype_of(const at::Tensor& t) { return lora_kernels::dtype_of(t.scalar_type(), "rms_norm"); }

const Kernels& kernels_for(Dtype dtype) {
  return *cpu::for_active_isa(kernels_amx, kernels_avx512, kernels_avx2, kernels_baseline, dtype);
}

// In whose layout the kernels of that dtype read A: both have AMX for the same dtypes.
const lora_linear::Engine& engine_for(Dtype dtype) {
  namespace ll = lora_linear;
  return *cpu::for_active_isa(ll::engine_amx, ll::engine_avx512, ll::engine_avx2,
                              ll::engine_baseline, dtype);
}

at::Tensor readable(const at::Tensor& t, const at::Tensor& like) {
  TORCH_CHECK(t.dim() == 2 && t.sizes() == like.sizes() && t.scalar_type() == like.scalar_type(),
              "rms_norm (cpu): x and dy must be 2-D, of one shape and dtype");
  return unit_columns(t);
}

// offset + weight in fp32, as it is where it is that already.
class Gain {
 public:
  Gain(const Maybe& weight, double offset, int64_t columns) {
    if (!weight.has_value()) return;
    TORCH_CHECK(weight->dim() == 1 && weight->size(0) == columns,
                "rms_norm (cpu): weight must have one element per column");
    kept_ = weight->to(at::kFloat).contiguous();
    if (offset == 0.0) {
      data_ = kept_.const_data_ptr<float>();
      return;
    }
    const float* from = kept_.const_data_ptr<float>();
    sums_.resize(columns);
    for (int64_t c = 0; c < columns; ++c) sums_[c] = from[c] + static_cast<float>(offset);
    data_ = sums_.data();
  }
  const float* data() const { return data_; }

 private:
  at::Tensor kept_;
  std::vector<float> sums_;
  const float* data_ = nullptr;
};

// All A side by side in the dtype of x, as the engine reads them.
std::shared_ptr<void> packed_adapters(const lora_linear::Engine& engine, const at::Tensor& x,
                                      const std::vector<at::Tensor>& lora_as) {
  std::vector<at::Tensor> low;
  for (const at::Tensor& a : lora_as) {
    TORCH_CHECK(a.dim() == 2 && a.size(1) == x.size(1),
                "rms_norm (cpu): A must be [rank, K] with the K of x");
    low.push_back(a.to(x.scalar_type()));
  }
  const at::Tensor all = low.size() == 1 ? low[0].contiguous() : at::cat(low).contiguous();
  const int64_t k = all.size(1), n = all.size(0);
  std::shared_ptr<void> packed = cpu::allocate(lora_linear::packed_b_bytes(engine, k, n));
  engine.pack_b_cols(dtype_of(all), all.const_data_ptr(), k, k, n, packed.get(), 0, 1);
  return packed;
}

// Elements of the rows decide how many of them are worth a thread.
int64_t grain(int64_t columns, int64_t rows_each) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns * rows_each));
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> rms_norm_fwd(const at::Tensor& x,
                                                            const Maybe& weight,
                                                            const std::vector<at::Tensor>& lora_as,
                                                            double eps, double offset) {
  const at::Tensor in = readable(x, x);
  const Dtype dtype = dtype_of(x);
  const Gain gain(weight, offset, x.size(1));
  int64_t ranks = 0;
  for (const at::Tensor& a : lora_as) ranks += a.size(0);
  at::Tensor y = at::empty(x.sizes(), x.options());
  at::Tensor rstd = at::empty({x.size(0)}, x.options().dtype(at::kFloat));
  at::Tensor s = at::empty({x.size(0), ranks}, x.options());
  std::shared_ptr<void> packed;
  if (ranks > 0) packed = packed_adapters(engine_for(dtype), x, lora_as);
  ForwardParams p{};
  p.rows = x.size(0);
  p.columns = x.size(1);
  p.x = in.const_data_ptr();
  p.ldx = in.stride(0);
  p.gain = gain.data();
  p.eps = static_cast<float>(eps);
  p.y = y.mutable_data_ptr();
  p.rstd = rstd.mutable_data_ptr<float>();
  p.a_packed = packed.get();
  p.ranks = ranks;
  p.s = s.mutable_data_ptr();
  const Kernels& k = kernels_for(dtype);
  const int64_t strips = (p.rows + k.strip - 1) / k.strip;
  at::parallel_for(0, strips, grain(p.columns, k.strip), [&](int64_t begin, int64_t end) {
    k.forward(p, begin, end, cpu::thread_workspace(k.workspace(p)));
  });
  return {y, rstd, s};
}

std::tuple<at::Tensor, at::Tensor> rms_norm_bwd(const at::Tensor& dy, const at::Tensor& x,
                                                const Maybe& weight, const at::Tensor& rstd,
                                                double offset, bool need_dweight) {
  const at::Tensor in = readable(x, x), d = readable(dy, x);
  TORCH_CHECK(rstd.scalar_type() == at::kFloat && rstd.dim() == 1 && rstd.size(0) == x.size(0),
              "rms_norm (cpu): rstd must be fp32, one number per row");
  const at::Tensor scales = rstd.contiguous();
  const Gain gain(weight, offset, x.size(1));
  const int64_t rows = x.size(0), columns = x.size(1);
  at::Tensor dx = at::empty(x.sizes(), x.options());
  BackwardParams p{};
  p.rows = rows;
  p.columns = columns;
  p.dy = d.const_data_ptr();
  p.lddy = d.stride(0);
  p.x = in.const_data_ptr();
  p.ldx = in.stride(0);
  p.gain = gain.data();
  p.rstd = scales.const_data_ptr<float>();
  p.dx = dx.mutable_data_ptr();
  const Kernels& k = kernels_for(dtype_of(x));
  if (!need_dweight || !weight.has_value()) {
    at::parallel_for(0, rows, grain(columns, 1), [&](int64_t begin, int64_t end) {
      k.backward(p, begin, end, nullptr);
    });
    return {dx, at::empty({0}, x.options())};
  }
  const int64_t most = kBlockRows * kMostChunks;
  p.chunk_rows = kBlockRows * std::max<int64_t>(1, (rows + most - 1) / most);
  const int64_t chunks = (rows + p.chunk_rows - 1) / p.chunk_rows;
  const at::Tensor slots = at::empty({chunks, columns}, x.options().dtype(at::kFloat));
  at::Tensor total = at::empty({columns}, x.options().dtype(at::kFloat));
  float* sums = total.mutable_data_ptr<float>();
  p.dweights = slots.mutable_data_ptr<float>();
  at::parallel_for(0, chunks, grain(columns, p.chunk_rows), [&](int64_t begin, int64_t end) {
    k.backward(p, begin, end, static_cast<float*>(cpu::thread_workspace(columns * sizeof(float))));
  });
  std::fill_n(sums, columns, 0.0f);
  for (int64_t i = 0; i < chunks; ++i) {
    for (int64_t c = 0; c < columns; ++c) sums[c] += p.dweights[i * columns + c];
  }
  return {dx, total.to(weight->scalar_type())};
}

}  // namespace lora_kernels::rms_norm
