// Launchers of the GPU kernels of lora_linear. Torch-free; host C++.
//
// Each launcher returns at once: cudaSuccess, the error of the launch, or cudaErrorInvalidValue
// when check() has a reason against the arguments. Extents of zero are allowed: rows of S, dS, Y,
// dX for M = 0 do not exist, dA and dB are then zeros, and a sum over K = 0 or N = 0 is zero.
// All results are bitwise reproducible for equal arguments, sm_count included: partial sums go to
// the workspace and a second kernel adds them in a fixed order.
#pragma once

#include <cstddef>

#include "../../common/cuda_runtime.h"
#include "params.h"

namespace lora_kernels::lora_linear::cuda {

// Opt-in shared memory per block that every kernel has a variant for; compute capability 8.6, 8.9
// and 12.0 have 99 KiB. Launchers ask the current device for its limit and use more where it is
// there.
constexpr size_t kSharedMemoryNeeded = 98 << 10;

// Null when the launcher accepts the arguments, else one sentence: what was given and what is
// accepted. Pure host code, no device access; capability of the device is the caller's to check
// (compute capability >= 8.0).
const char* check(const PadParams&);
const char* check(const ShrinkParams&);
const char* check(const DyPassParams&);
const char* check(const DaParams&);
const char* check(const GemmParams&);

// Bytes that `workspace` must have; `workspace` itself is not read.
size_t shrink_workspace(const ShrinkParams&);
size_t dy_pass_workspace(const DyPassParams&);
size_t da_workspace(const DaParams&);

cudaError_t launch_pad(const PadParams&, cudaStream_t);         // 1 launch
cudaError_t launch_shrink(const ShrinkParams&, cudaStream_t);   // 1, or 2 when K is split
cudaError_t launch_dy_pass(const DyPassParams&, cudaStream_t);  // 2
cudaError_t launch_da(const DaParams&, cudaStream_t);           // 2
cudaError_t launch_gemm_sm80(const GemmParams&, cudaStream_t);  // 1; sm_80 and newer

}  // namespace lora_kernels::lora_linear::cuda
