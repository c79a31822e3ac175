// The host entry of rms_norm on CPU tensors, its kernels in the emulator: library
// lora_kernels_emulated.
#include "rms_norm/cuda/rms_norm_cuda.cpp"
