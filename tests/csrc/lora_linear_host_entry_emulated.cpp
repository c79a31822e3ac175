// The host entry of lora_linear on CPU tensors, its kernels in the emulator: library
// lora_kernels_emulated. The Hopper GEMM is not there.
#include "lora_linear/cuda/lora_linear_cuda.cpp"

namespace lora_kernels::lora_linear::cuda {

const char* check_sm90(const GemmParams&, Sm90Config) { return "the emulator has no sm_90a"; }
Sm90Config choose_sm90(const GemmParams&) { return Sm90Config::kChoose; }
cudaError_t launch_gemm_sm90(const GemmParams&, Sm90Config, cudaStream_t) {
  return cudaErrorInvalidValue;
}

}  // namespace lora_kernels::lora_linear::cuda
