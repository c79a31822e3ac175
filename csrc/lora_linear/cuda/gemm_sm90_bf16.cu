#include "gemm_sm90_table.cuh"

namespace lora_kernels::lora_linear::cuda {

const void* gemm_sm90_bf16(OperandLayout layout, int block_n, Sm90Masks masks) {
  return gemm_sm90_table<bf16>(layout, block_n, masks);
}

}  // namespace lora_kernels::lora_linear::cuda
