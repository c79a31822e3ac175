// What the host entries of attention and of attention_decode share: tensors as rows, tasks on threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>

#include "../common/tensor_operands.h"
#include "attention.h"

namespace lora_kernels::attention {

inline Dtype dtype_of(at::ScalarType type) { return lora_kernels::dtype_of(type, "attention"); }

inline Rows rows_of(const at::Tensor& t) {
  void* data = const_cast<void*>(t.const_data_ptr());
  if (t.dim() == 3) return {data, 0, t.stride(0), t.stride(1)};
  return {data, t.stride(0), t.stride(1), t.stride(2)};
}

inline RowValues row_values(const at::Tensor& t) {
  float* data = const_cast<float*>(t.const_data_ptr<float>());
  if (t.dim() == 2) return {data, 0, t.stride(0)};
  return {data, t.stride(0), t.stride(1)};
}

inline int64_t threads_here() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// Tasks differ in size (causal), so threads take the next one as they come; what a task computes
// does not depend on who runs it.
template <class Body>
void run_tasks(int64_t tasks, const Body& body) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min(threads_here(), tasks);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t task = next++; task < tasks; task = next++) body(task);
    }
  });
}

}  // namespace lora_kernels::attention
