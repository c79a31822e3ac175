// Attention forward for Hopper (sm_90a): TMA, mbarriers and wgmma. Torch-free host interface.
#pragma once

#include "launch.h"

namespace lora_kernels::attention::cuda {

// Null when launch_forward_sm90 accepts the arguments (those that check() accepts), else one
// sentence.
const char* check_forward_sm90(const ForwardParams&);

// One launch. cudaErrorInvalidValue for what check_forward_sm90 refuses; cudaErrorNotSupported when
// the driver has no tensor maps. Compute capability 9.0 exactly is the caller's to check.
cudaError_t launch_forward_sm90(const ForwardParams&, cudaStream_t);

}  // namespace lora_kernels::attention::cuda
