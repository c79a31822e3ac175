// Launchers of the GPU kernels of rms_norm. Torch-free; host C++.
//
// Each returns at once: cudaSuccess, the error of the launch, or cudaErrorInvalidValue when check()
// has a reason against the arguments. Results are bitwise reproducible for equal arguments,
// sm_count included.
#pragma once

#include <cstddef>

#include "../../common/cuda_runtime.h"
#include "params.h"

namespace lora_kernels::rms_norm::cuda {

// Null when the launcher accepts the arguments, else one sentence. Host code, no device access.
const char* check(const NormalizeParams&);
const char* check(const GradientParams&);

size_t gradients_workspace(const GradientParams&);  // bytes; `workspace` itself is not read

cudaError_t launch_normalize(const NormalizeParams&, cudaStream_t);  // 1 launch
cudaError_t launch_gradients(const GradientParams&, cudaStream_t);   // 1, or 2 with dweight

}  // namespace lora_kernels::rms_norm::cuda
