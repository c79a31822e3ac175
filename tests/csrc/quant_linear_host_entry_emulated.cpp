// The host entry of quant_linear on CPU tensors, its kernels in the emulator: library
// lora_kernels_emulated.
#include "quant_linear/cuda/quant_linear_cuda.cpp"
