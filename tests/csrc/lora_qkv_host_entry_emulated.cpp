// The host entry of lora_qkv on CPU tensors, its kernels in the emulator: library
// lora_kernels_emulated. The Hopper kernel is not there.
#include "lora_qkv/cuda/lora_qkv_cuda.cpp"

namespace lora_kernels::lora_qkv::cuda {

const char* check_sm90(const ProjectionParams&) { return "the emulator has no sm_90a"; }
bool worthwhile_sm90(const ProjectionParams&) { return false; }
cudaError_t launch_project_sm90(const ProjectionParams&, cudaStream_t) {
  return cudaErrorInvalidValue;
}

}  // namespace lora_kernels::lora_qkv::cuda
