// Launchers of the GPU kernels of attention. Torch-free; host C++.
//
// Each returns at once: cudaSuccess, the error of the launch, or cudaErrorInvalidValue when check()
// has a reason against the arguments. Extents of zero are allowed. All results are bitwise
// reproducible: nothing is added by atomics, and every sum has one order.
#pragma once

#include <cstddef>

#include "../../common/cuda_runtime.h"
#include "params.h"

namespace lora_kernels::attention::cuda {

// Opt-in shared memory per block that the sm_80 kernels need at most; compute capability 8.6, 8.9
// and 12.0 have 99 KiB.
constexpr size_t kSharedMemoryNeeded = 98 << 10;

// Null when the launcher accepts the arguments, else one sentence. Pure host code; compute
// capability >= 8.0 is the caller's to check.
const char* check(const ForwardParams&);
const char* check(const BackwardParams&);

cudaError_t launch_forward_sm80(const ForwardParams&, cudaStream_t);  // 1 launch

// Backward: delta first (it also makes dsinks), then the two others in any order.
cudaError_t launch_delta(const BackwardParams&, cudaStream_t);            // 1, with dsinks 2
cudaError_t launch_key_gradients_sm80(const BackwardParams&, cudaStream_t);    // dk and dv
cudaError_t launch_query_gradients_sm80(const BackwardParams&, cudaStream_t);  // dq

// The instantiations, one translation unit per dtype.
cudaError_t run_forward_sm80_bf16(const ForwardParams&, cudaStream_t);
cudaError_t run_forward_sm80_fp16(const ForwardParams&, cudaStream_t);
cudaError_t run_key_gradients_sm80_bf16(const BackwardParams&, cudaStream_t);
cudaError_t run_key_gradients_sm80_fp16(const BackwardParams&, cudaStream_t);
cudaError_t run_query_gradients_sm80_bf16(const BackwardParams&, cudaStream_t);
cudaError_t run_query_gradients_sm80_fp16(const BackwardParams&, cudaStream_t);

}  // namespace lora_kernels::attention::cuda
