// Arguments and launcher of the projection that leaves its heads rotated. Torch-free; host C++.
#pragma once

#include "../../lora_linear/cuda/launch.h"
#include "../../rope/cuda/params.h"

namespace lora_kernels::lora_qkv::cuda {

namespace lora = lora_linear::cuda;

constexpr int kMaxGroup = lora::kMaxGroup;

// Of every problem of `gemm` (layout kNK, no masks; N a multiple of head_dim) the first `rotated`
// heads leave the accumulators rotated.
struct ProjectionParams {
  lora::GemmParams gemm;
  rope::cuda::Rotation rotation;  // m of gemm: whole sequences
  int head_dim;                   // even
  int rotated[kMaxGroup];         // heads
};

// Null when the launcher accepts the arguments, else one sentence. Host code, no device access.
const char* check(const ProjectionParams&);

// 1 launch for all problems; sm_80 and newer. Returns at once: cudaSuccess, the error of the
// launch, or cudaErrorInvalidValue for what check() refuses. Bitwise reproducible.
cudaError_t launch_project(const ProjectionParams&, cudaStream_t);

// The same on Hopper (sm_90a), for heads of 64, 128 or 256 channels that are half-rotated as a
// whole and operands with 16-byte rows; check_sm90 says why not. Compute capability 9.0 is the
// caller's to check. `worthwhile`: there are tiles of 128 x 256 for half of the multiprocessors;
// not measured.
const char* check_sm90(const ProjectionParams&);
bool worthwhile_sm90(const ProjectionParams&);
cudaError_t launch_project_sm90(const ProjectionParams&, cudaStream_t);

// project_sm90_{bf16,fp16}.cu
const void* project_sm90_bf16();
const void* project_sm90_fp16();

// project_sm80_{bf16,fp16}.cu
cudaError_t run_project_bf16(const ProjectionParams&, cudaStream_t);
cudaError_t run_project_fp16(const ProjectionParams&, cudaStream_t);

}  // namespace lora_kernels::lora_qkv::cuda
