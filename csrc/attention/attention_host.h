// Host entries of attention on the CPU, as bound to Python. Formulas:
// lora_kernels/ops/attention/reference.py. Dense q is [B, S, H, D], packed [T, H, D] with cu_seqlens;
// the mask is 4-D, slopes are [1 or B, H]; window sides of -1 are unlimited, softcap 0 is none.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace lora_kernels::attention {

using Maybe = std::optional<at::Tensor>;

std::string engine_name(at::ScalarType dtype);

// (out, lse)
std::tuple<at::Tensor, at::Tensor> attention_fwd(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Maybe& sinks,
    const Maybe& mask, const Maybe& cu_seqlens, const Maybe& cu_seqlens_k, const Maybe& slopes,
    const Maybe& seed, double scale, int64_t left, int64_t right, double softcap, double dropout_p);

// (dq, dk, dv, delta, dmask): empty where not needed; delta is [B, H, S] or [H, T], dmask fp32.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_bwd(
    const at::Tensor& dout, const Maybe& dlse, const at::Tensor& out, const at::Tensor& lse,
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Maybe& mask,
    const Maybe& cu_seqlens, const Maybe& cu_seqlens_k, const Maybe& slopes, const Maybe& seed,
    double scale, int64_t left, int64_t right, double softcap, double dropout_p, bool need_dq,
    bool need_dk, bool need_dv, bool need_dmask);

// (out, lse) of the newest rows q over a cache; block_table null: contiguous; num_splits 0: chosen.
std::tuple<at::Tensor, at::Tensor> attention_decode(
    const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
    const at::Tensor& cache_seqlens, const Maybe& block_table, const Maybe& sinks,
    const Maybe& slopes, double scale, int64_t left, int64_t right, double softcap,
    int64_t num_splits);

}  // namespace lora_kernels::attention
