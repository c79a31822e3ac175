// Launcher of project_sm80.cuh, and what it accepts. Host code only.
#include "launch.h"

#include "../../rope/cuda/launch.h"

namespace lora_kernels::lora_qkv::cuda {

const char* check(const ProjectionParams& p) {
  if (const char* why = lora::check(p.gemm)) return why;
  if (p.gemm.layout != lora::OperandLayout::kNK) return "the layout is not kNK";
  if (p.head_dim < 2 || p.head_dim % 2 != 0) return "the channels of a head are not even";
  if (const char* why = rope::cuda::check(p.rotation, p.head_dim)) return why;
  if (p.gemm.m % p.rotation.sequence != 0) return "the rows are not whole sequences";
  for (int i = 0; i < p.gemm.problems; ++i) {
    const int64_t n = p.gemm.problem[i].n;
    if (n % p.head_dim != 0) return "the columns are not whole heads";
    if (p.rotated[i] < 0 || p.rotated[i] > n / p.head_dim) {
      return "more heads rotated than there are";
    }
  }
  return nullptr;
}

cudaError_t launch_project(const ProjectionParams& p, cudaStream_t stream) {
  if (check(p) != nullptr) return cudaErrorInvalidValue;
  return p.gemm.dtype == Dtype::kBFloat16 ? run_project_bf16(p, stream)
                                          : run_project_fp16(p, stream);
}

}  // namespace lora_kernels::lora_qkv::cuda
