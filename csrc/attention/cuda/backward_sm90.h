// Attention backward for Hopper (sm_90a): TMA, mbarriers and wgmma. Torch-free host interface.
#pragma once

#include "launch.h"

namespace lora_kernels::attention::cuda {

// Null when the launchers below accept the arguments (those that check() accepts), else one
// sentence.
const char* check_backward_sm90(const BackwardParams&);

// One launch each, after launch_delta: dk and dv, dq. Errors as launch_forward_sm90.
cudaError_t launch_key_gradients_sm90(const BackwardParams&, cudaStream_t);
cudaError_t launch_query_gradients_sm90(const BackwardParams&, cudaStream_t);

}  // namespace lora_kernels::attention::cuda
