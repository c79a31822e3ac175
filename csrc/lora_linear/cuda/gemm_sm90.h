// The K-extended GEMM for Hopper (sm_90a): C_i = sum over terms of A_t B_t' (* keep mask) + bias,
// the problem of params.h, with TMA, wgmma and one fp32 accumulator. Torch-free host interface.
//
// Written by hand rather than with CUTLASS: the extra operand pairs, their masks and the group of
// problems sit in the innermost loops of producer and consumers, which the CUTLASS collectives do
// not open, so a custom collective of about the same length would have been needed, for 30 s and 3
// GB of compiler per instantiation against 2 s.
#pragma once

#include "launch.h"

namespace lora_kernels::lora_linear::cuda {

enum class Sm90Config : int {
  kChoose = 0,          // by the number of waves, see choose_sm90
  k128x256Cluster = 1,  // Cluster: two blocks share each B tile by multicast
  k128x256 = 2,
  k128x128Cluster = 3,
  k128x128 = 4,
};

// Null when launch_gemm_sm90 accepts the arguments (those that check() accepts), else one sentence:
// the copy engine needs 16-byte aligned pointers and row strides, and several masks per problem
// need a tile of 128 columns.
const char* check_sm90(const GemmParams&, Sm90Config = Sm90Config::kChoose);

// What kChoose means for these extents; pure host code.
Sm90Config choose_sm90(const GemmParams&);

// One launch of `kernel`, made of gemm_sm90.cuh for this config, whose argument begins with
// `first`: that is filled in, what follows is the caller's. Results as of launch_gemm_sm90.
struct Sm90Params;
cudaError_t launch_kernel_sm90(const GemmParams&, Sm90Config, const void* kernel, Sm90Params& first,
                               cudaStream_t);

// One launch. cudaErrorInvalidValue for what check_sm90 refuses; cudaErrorNotSupported when the
// driver has no tensor maps. Compute capability 9.0 exactly is the caller's to check.
cudaError_t launch_gemm_sm90(const GemmParams&, Sm90Config, cudaStream_t);

}  // namespace lora_kernels::lora_linear::cuda
