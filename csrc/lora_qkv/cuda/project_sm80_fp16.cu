#include "project_sm80_run.cuh"

namespace lora_kernels::lora_qkv::cuda {

cudaError_t run_project_fp16(const ProjectionParams& p, cudaStream_t stream) {
  return run_project<fp16>(p, stream);
}

}  // namespace lora_kernels::lora_qkv::cuda
