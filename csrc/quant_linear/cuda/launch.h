// Launchers of the GPU kernels of quant_linear. Torch-free; host C++.
//
// Each returns at once: cudaSuccess, the error of the launch, or cudaErrorInvalidValue when check()
// has a reason against the arguments. Results are bitwise reproducible for equal arguments,
// sm_count included: partial sums go to the workspace and a second kernel adds them in order.
#pragma once

#include <cstddef>

#include "../../common/cuda_runtime.h"
#include "params.h"

namespace lora_kernels::quant_linear::cuda {

// Null when the launcher accepts the arguments, else one sentence. Host code, no device access.
const char* check(const DequantizeParams&);
const char* check(const QuantizeFlatParams&);
const char* check(const QuantizeNestedParams&);
const char* check(const QuantizeRowsParams&);
const char* check(const SkinnyParams&);

size_t skinny_workspace(const SkinnyParams&);  // bytes; `workspace` itself is not read

cudaError_t launch_dequantize(const DequantizeParams&, cudaStream_t);   // 1 launch
cudaError_t launch_quantize_flat(const QuantizeFlatParams&, cudaStream_t);
cudaError_t launch_quantize_nested(const QuantizeNestedParams&, cudaStream_t);
cudaError_t launch_quantize_rows(const QuantizeRowsParams&, cudaStream_t);
// 1, or 2 where the sum is shared out or there is a low-rank term
cudaError_t launch_skinny(const SkinnyParams&, cudaStream_t);

}  // namespace lora_kernels::quant_linear::cuda
