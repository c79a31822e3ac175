#include "gemm_sm90_table.cuh"

namespace lora_kernels::lora_linear::cuda {

const void* gemm_sm90_fp16(OperandLayout layout, int block_n, bool masked) {
  return gemm_sm90_table<fp16>(layout, block_n, masked);
}

}  // namespace lora_kernels::lora_linear::cuda
