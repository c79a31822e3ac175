// The host entry of gated_activation on CPU tensors, its kernels in the emulator: library
// lora_kernels_emulated.
#include "gated_activation/cuda/gated_activation_cuda.cpp"
