// Host entry of the CUDA kernels of attention, on the LibTorch stable ABI: library
// lora_kernels_cuda. Shapes, dtypes and values are those of lora_kernels/ops/attention/cuda.py,
// which has checked them; here only what a wrong caller could crash on is checked again.
//
// Forward: one launch. Backward: delta (and dsinks), dk and dv, dq. Everything runs on the current
// stream of q's device, allocates through torch and never waits for the device, so a call can be
// captured into a graph. Operands are read with their strides; one without rows of 16 aligned
// bytes is copied first.
#include <tuple>

#include "../../common/stable_torch.h"
#include "backward_sm90.h"
#include "forward_sm90.h"
#include "launch.h"

namespace lora_kernels::attention::cuda {
namespace {

using stable::check_launch;
using stable::Place;
using stable::ScalarType;
using stable::Tensor;

constexpr stable::Require require{"attention"};

// [B, S, heads, D] or packed [T, heads, D] as the kernels want it; `held` keeps a copy alive.
struct Operand {
  Tensor held;
  Strided strided;
};

bool aligned(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (t.size(last) > 1 && t.stride(last) != 1) return false;
  for (int64_t d = 0; d < last; ++d) {
    if (t.size(d) > 1 && t.stride(d) % 8 != 0) return false;
  }
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

int64_t stride_of(const Tensor& t, int64_t d) { return t.size(d) > 1 ? t.stride(d) : 0; }

Operand as_operand(const Tensor& t, const Tensor& like, const char* name) {
  require(t.dim() == 3 || t.dim() == 4, "an operand has not three or four dimensions");
  if (!stable::same_device(t, like)) {
    require.refuse(std::string(name) + " is on another device than q");
  }
  if (t.scalar_type() != like.scalar_type()) {
    require.refuse(std::string(name) + " and q differ in dtype");
  }
  Tensor held = t;
  if (!aligned(held)) held = torch::stable::contiguous(held);
  if (!aligned(held)) held = torch::stable::clone(held);
  const int64_t first = held.dim() - 3;
  return {held,
          {held.const_data_ptr(), first == 1 ? stride_of(held, 0) : 0, stride_of(held, first),
           stride_of(held, first + 1)}};
}

Results as_results(const Tensor& t) {
  if (t.numel() == 0) return {nullptr, 0, 0, 0};
  const int64_t heads = t.size(t.dim() - 2), d = t.size(t.dim() - 1), rows = t.size(t.dim() - 3);
  return {t.mutable_data_ptr(), t.dim() == 4 ? rows * heads * d : 0, heads * d, d};
}

// An optional vector or matrix of statistics or integers: contiguous, of one dtype.
const void* plain(const std::optional<Tensor>& t, ScalarType type, int64_t numel, const Tensor& q,
                  const char* name) {
  if (!t.has_value()) return nullptr;
  if (!stable::same_device(*t, q) || !t->is_contiguous() || t->scalar_type() != type ||
      t->numel() != numel) {
    require.refuse(std::string(name) + " has another shape, dtype or device than expected");
  }
  return t->const_data_ptr();
}

struct Options {
  double scale;
  int64_t left, right;
  double softcap, keep_scale;
  int64_t threshold;
};

int side(int64_t keys, int64_t most) {  // of the window
  require(keys >= -1, "a side of the window is below -1");
  return static_cast<int>(keys >= most ? -1 : keys);
}

struct Problem {
  AttentionParams params{};
  Operand q, k, v;

  Problem(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
          const std::optional<Tensor>& sinks, const std::optional<Tensor>& cu_rows,
          const std::optional<Tensor>& cu_keys, const std::optional<Tensor>& slopes,
          const std::optional<Tensor>& seed, const Options& o)
      : q(as_operand(q_in, q_in, "q")),
        k(as_operand(k_in, q_in, "k")),
        v(as_operand(v_in, q_in, "v")) {
    AttentionParams& p = params;
    const int64_t n = q_in.dim(), head_dim = q_in.size(n - 1);
    require(k_in.dim() == n && v_in.dim() == n && (n == 3) == cu_rows.has_value() &&
                cu_rows.has_value() == cu_keys.has_value(),
            "q, k, v and cu_seqlens do not fit");
    for (int64_t d = 0; d < n; ++d) {
      require(k_in.size(d) == v_in.size(d), "k and v differ in shape");
      require(q_in.size(d) <= INT32_MAX && k_in.size(d) <= INT32_MAX, "an extent is too large");
    }
    require(k_in.size(n - 1) == head_dim, "q and k differ in their head size");
    require(n == 3 || k_in.size(0) == q_in.size(0), "q and k differ in their batch");
    p.dtype = stable::dtype_of(q_in, "q");
    p.head_dim = static_cast<int>(head_dim);
    p.rows = static_cast<int>(q_in.size(n - 3));
    p.keys = static_cast<int>(k_in.size(n - 3));
    p.heads = static_cast<int>(q_in.size(n - 2));
    p.kv_heads = static_cast<int>(k_in.size(n - 2));
    p.batch = static_cast<int>(n == 4 ? q_in.size(0) : cu_rows->numel() - 1);
    const int64_t ends = p.batch + 1;
    p.cu_rows = static_cast<const int32_t*>(plain(cu_rows, ScalarType::Int, ends, q_in, "cu_rows"));
    p.cu_keys = static_cast<const int32_t*>(plain(cu_keys, ScalarType::Int, ends, q_in, "cu_keys"));
    p.q = q.strided;
    p.k = k.strided;
    p.v = v.strided;
    p.scale = static_cast<float>(o.scale);
    p.softcap = static_cast<float>(o.softcap);
    p.capped_scale = o.softcap != 0.0 ? static_cast<float>(o.scale / o.softcap) : 0.0f;
    p.left = side(o.left, p.keys - 1);
    p.right = side(o.right, p.rows - 1);
    p.sinks =
        static_cast<const float*>(plain(sinks, ScalarType::Float, p.heads, q_in, "sinks"));
    if (slopes.has_value()) {
      require(slopes->dim() == 2 && (slopes->size(0) == 1 || slopes->size(0) == p.batch),
              "slopes is not [1 or batch, heads]");
      p.slopes = static_cast<const float*>(
          plain(slopes, ScalarType::Float, slopes->size(0) * p.heads, q_in, "slopes"));
      p.slopes_batch = slopes->size(0) == 1 ? 0 : p.heads;
    }
    require(o.threshold >= 0 && o.threshold <= 65536, "threshold is not in 0..65536");
    p.keep_scale = static_cast<float>(o.keep_scale);
    p.drop_threshold = static_cast<uint32_t>(o.threshold);
    if (o.threshold != 0) {
      require(seed.has_value(), "dropout needs a seed: one int64 on the device of q");
      p.seed = static_cast<const int64_t*>(plain(seed, ScalarType::Long, 1, q_in, "seed"));
    }
  }

  int64_t statistics() const {
    return int64_t{params.cu_rows == nullptr ? params.batch : 1} * params.heads * params.rows;
  }
};

// Does the Hopper kernel run? `refusal` is why it cannot; a kernel asked for by name has to.
bool takes_sm90(const char* refusal, const std::string& kernel, const Place& place) {
  if (kernel == "sm90") {
    require(place.hopper, "the sm_90a kernels need compute capability 9.0");
    require(refusal);
    return true;
  }
  require(kernel == "auto" || kernel == "sm80",
          "the kernel is unknown; accepted: auto, sm80, sm90");
  return kernel == "auto" && place.hopper && refusal == nullptr;
}

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, std::optional<Tensor> sinks,
                                   std::optional<Tensor> cu_rows, std::optional<Tensor> cu_keys,
                                   std::optional<Tensor> slopes, std::optional<Tensor> seed,
                                   double scale, int64_t left, int64_t right, double softcap,
                                   double keep_scale, int64_t threshold, std::string kernel) {
  const Place place(q);
  const Problem problem(q, k, v, sinks, cu_rows, cu_keys, slopes, seed,
                        {scale, left, right, softcap, keep_scale, threshold});
  const AttentionParams& a = problem.params;
  Tensor out, lse;
  if (q.dim() == 4) {
    out = stable::empty(q, {a.batch, a.rows, a.heads, a.head_dim});
    lse = stable::empty(q, {a.batch, a.heads, a.rows}, ScalarType::Float);
  } else {
    out = stable::empty(q, {a.rows, a.heads, a.head_dim});
    lse = stable::empty(q, {a.heads, a.rows}, ScalarType::Float);
  }
  const ForwardParams p{a, as_results(out), static_cast<float*>(lse.mutable_data_ptr())};
  require(check(p));
  if (takes_sm90(check_forward_sm90(p), kernel, place)) {
    check_launch(launch_forward_sm90(p, place.stream), "attention_forward_sm90");
  } else {
    check_launch(launch_forward_sm80(p, place.stream), "attention_forward_sm80");
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    Tensor dout, std::optional<Tensor> dlse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v,
    std::optional<Tensor> sinks, std::optional<Tensor> cu_rows, std::optional<Tensor> cu_keys,
    std::optional<Tensor> slopes, std::optional<Tensor> seed, double scale, int64_t left,
    int64_t right, double softcap, double keep_scale, int64_t threshold, bool need_dq,
    bool need_dkv, bool need_dsinks, std::string kernel) {
  const Place place(q);
  const Problem problem(q, k, v, sinks, cu_rows, cu_keys, slopes, seed,
                        {scale, left, right, softcap, keep_scale, threshold});
  const AttentionParams& a = problem.params;
  require(out.dim() == q.dim() && dout.dim() == q.dim(), "out or dout has another shape than q");
  for (int64_t d = 0; d < q.dim(); ++d) {
    require(out.size(d) == q.size(d) && dout.size(d) == q.size(d),
            "out or dout has another shape than q");
  }
  const Operand held_out = as_operand(out, q, "out"), held_dout = as_operand(dout, q, "dout");
  const int64_t statistics = problem.statistics();
  Tensor delta = stable::empty(q, {statistics}, ScalarType::Float);
  const Tensor none = stable::empty(q, {0});
  Tensor dq = need_dq ? stable::empty(q, {q.sizes().begin(), q.sizes().end()}) : none;
  Tensor dk = need_dkv ? stable::empty(q, {k.sizes().begin(), k.sizes().end()}) : none;
  Tensor dv = need_dkv ? stable::empty(q, {v.sizes().begin(), v.sizes().end()}) : none;
  Tensor dsinks = need_dsinks ? stable::empty(q, {a.heads}, ScalarType::Float) : none;
  require(!need_dsinks || sinks.has_value(), "there are no sinks");
  BackwardParams p{};
  p.a = a;
  p.out = held_out.strided;
  p.dout = held_dout.strided;
  p.lse = static_cast<const float*>(plain(lse, ScalarType::Float, statistics, q, "lse"));
  p.dlse = static_cast<const float*>(plain(dlse, ScalarType::Float, statistics, q, "dlse"));
  p.delta = static_cast<float*>(delta.mutable_data_ptr());
  p.dq = as_results(dq);
  p.dk = as_results(dk);
  p.dv = as_results(dv);
  if (need_dsinks) p.dsinks = static_cast<float*>(dsinks.mutable_data_ptr());
  require(check(p));
  check_launch(launch_delta(p, place.stream), "attention_delta");
  const bool sm90 = takes_sm90(check_backward_sm90(p), kernel, place);
  if (p.dk.data != nullptr) {
    check_launch(sm90 ? launch_key_gradients_sm90(p, place.stream)
                      : launch_key_gradients_sm80(p, place.stream),
                 "attention_key_gradients");
  }
  if (p.dq.data != nullptr) {
    check_launch(sm90 ? launch_query_gradients_sm90(p, place.stream)
                      : launch_query_gradients_sm80(p, place.stream),
                 "attention_query_gradients");
  }
  return {dq, dk, dv, dsinks};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(LK_LIBRARY, m) {
  m.def(
      "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? cu_rows, "
      "Tensor? cu_keys, Tensor? slopes, Tensor? seed, float scale, int left, int right, "
      "float softcap, float keep_scale, int threshold, str kernel) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_bwd(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor q, Tensor k, "
      "Tensor v, Tensor? sinks, Tensor? cu_rows, Tensor? cu_keys, Tensor? slopes, Tensor? seed, "
      "float scale, int left, int right, float softcap, float keep_scale, int threshold, "
      "bool need_dq, bool need_dkv, bool need_dsinks, str kernel) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)");
}

STABLE_TORCH_LIBRARY_IMPL(LK_LIBRARY, LK_KEY, m) {
  m.impl("attention_fwd", TORCH_BOX(&forward));
  m.impl("attention_bwd", TORCH_BOX(&backward));
}

}  // namespace lora_kernels::attention::cuda
