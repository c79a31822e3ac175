// Launchers of the GPU kernels of gated_activation. Torch-free; host C++.
//
// Each returns at once: cudaSuccess, the error of the launch, or cudaErrorInvalidValue when check()
// has a reason against the arguments. Results are bitwise reproducible for equal arguments,
// sm_count included: partial sums go to the workspace and a second kernel adds them in order.
#pragma once

#include <cstddef>

#include "../../common/cuda_runtime.h"
#include "params.h"

namespace lora_kernels::gated_activation::cuda {

// Null when the launcher accepts the arguments, else one sentence. Host code, no device access.
const char* check(const ActivateParams&);
const char* check(const GradientParams&);

size_t activate_workspace(const ActivateParams&);  // bytes; `workspace` itself is not read
size_t gradients_workspace(const GradientParams&);

cudaError_t launch_activate(const ActivateParams&, cudaStream_t);   // 1, or 2 when N is split
cudaError_t launch_gradients(const GradientParams&, cudaStream_t);  // 1, or 2 with members

}  // namespace lora_kernels::gated_activation::cuda
