// Launcher of the GPU kernel of rope. Torch-free; host C++.
#pragma once

#include "../../common/cuda_runtime.h"
#include "params.h"

namespace lora_kernels::rope::cuda {

// Null when the arguments are accepted, else one sentence. Host code, no device access.
const char* check(const Rotation&, int head_dim);
const char* check(const RotateParams&);

// One launch for all tensors (one more per 2^30 threads); returns at once: cudaSuccess, the error
// of the launch, or cudaErrorInvalidValue for what check() refuses. Bitwise reproducible.
cudaError_t launch_rotate(const RotateParams&, cudaStream_t);

}  // namespace lora_kernels::rope::cuda
