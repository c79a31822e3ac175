// The host entry of attention on CPU tensors, its kernels in the emulator: library
// lora_kernels_emulated.
#include "attention/cuda/attention_cuda.cpp"
#include "attention/cuda/forward_sm90.cpp"
#include "attention/cuda/backward_sm90.cpp"
