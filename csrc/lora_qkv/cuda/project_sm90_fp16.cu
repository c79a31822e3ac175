#include "project_sm90.cuh"

namespace lora_kernels::lora_qkv::cuda {

const void* project_sm90_fp16() {
  return reinterpret_cast<const void*>(&project_sm90_kernel<fp16>);
}

}  // namespace lora_kernels::lora_qkv::cuda
