#include "project_sm90.cuh"

namespace lora_kernels::lora_qkv::cuda {

const void* project_sm90_bf16() {
  return reinterpret_cast<const void*>(&project_sm90_kernel<bf16>);
}

}  // namespace lora_kernels::lora_qkv::cuda
