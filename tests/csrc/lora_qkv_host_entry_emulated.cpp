// The host entry of lora_qkv on CPU tensors, its kernels in the emulator: library
// lora_kernels_emulated.
#include "lora_qkv/cuda/lora_qkv_cuda.cpp"
