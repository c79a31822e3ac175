// Tensors as the CPU kernels of every op read them: element type, rows, dropout, sums of threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <optional>

#include "dtype.h"
#include "philox.h"

namespace lora_kernels {

inline Dtype dtype_of(at::ScalarType type, const char* op) {
  switch (type) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      TORCH_CHECK(false, op, " (cpu): dtype ", type,
                  " is not supported; accepted: float32, bfloat16, float16");
  }
}

// The last axis lies side by side.
inline at::Tensor unit_columns(const at::Tensor& t) {
  return t.size(-1) == 1 || t.stride(-1) == 1 ? t : t.contiguous();
}

// Of a matrix: elements side by side, rows that do not overlap.
inline at::Tensor separate_rows(const at::Tensor& t) {
  return t.stride(1) == 1 && t.stride(0) >= t.size(1) ? t : t.contiguous();
}

inline int64_t row_stride(const at::Tensor& t) {
  return t.size(0) > 1 ? t.stride(0) : t.size(1);
}

// A matrix whose elements are of `dtype` or fp32.
inline at::Tensor rows_in(const at::Tensor& t, at::ScalarType dtype) {
  const bool read = t.scalar_type() == dtype || t.scalar_type() == at::kFloat;
  return separate_rows(read ? t : t.to(at::kFloat));
}

inline DropoutParams dropout_params(double dropout_p, const std::optional<at::Tensor>& seed) {
  DropoutParams d;
  if (dropout_p == 0.0 || !seed.has_value()) return d;
  d.threshold = static_cast<uint32_t>(std::nearbyint(dropout_p * 65536.0));
  const uint64_t value = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
  d.key[0] = static_cast<uint32_t>(value);
  d.key[1] = static_cast<uint32_t>(value >> 32);
  return d;
}

// By what kept elements are multiplied; everything is dropped at 65536.
inline float keep_scale(const DropoutParams& d) {
  return d.threshold >= 65536 ? 0.0f : 65536.0f / static_cast<float>(65536 - d.threshold);
}

// body(t) for t < threads, each on a thread where there are as many.
template <class Body>
void run_threads(int threads, const Body& body) {
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) body(static_cast<int>(t));
  });
}

// Adds the threads' partials in order: [parts, rank_padded, columns_padded] -> [rank, columns],
// or its transpose.
inline at::Tensor sum_partials(const at::Tensor& partials, int64_t rank, int64_t columns,
                               float factor, bool transpose, at::ScalarType dtype) {
  const int64_t parts = partials.size(0), ld = partials.size(2), block = partials.stride(0);
  const float* in = partials.const_data_ptr<float>();
  const at::Tensor out = at::empty(
      transpose ? at::IntArrayRef{columns, rank} : at::IntArrayRef{rank, columns}, at::kFloat);
  float* result = out.mutable_data_ptr<float>();
  at::parallel_for(0, columns, 512, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < rank; ++i) {
      for (int64_t j = begin; j < end; ++j) {
        float sum = 0.0f;
        for (int64_t p = 0; p < parts; ++p) sum += in[p * block + i * ld + j];
        result[transpose ? j * rank + i : i * columns + j] = sum * factor;
      }
    }
  });
  return out.to(dtype);
}

}  // namespace lora_kernels
