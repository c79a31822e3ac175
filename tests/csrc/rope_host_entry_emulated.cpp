// The host entry of rope on CPU tensors, its kernel in the emulator: library lora_kernels_emulated.
#include "rope/cuda/rope_cuda.cpp"
