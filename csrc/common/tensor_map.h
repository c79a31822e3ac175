// Tensor maps of four dimensions for the copy engine: 16-bit elements, boxes of 64 columns with the
// 128-byte swizzle. Host code; the driver's encoder is found through the runtime, so that nothing
// links against the driver library.
#pragma once

#include <cstdint>

#include "dtype.h"

#if defined(LK_EMULATOR)
#include "emulator/hopper.h"
#else
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <atomic>
#endif

namespace lora_kernels {

// Innermost first; strides of the dimensions after the first, in bytes.
struct TensorOf4 {
  const void* data;
  int64_t extent[4], stride[3];
  int box[4];
};

#if defined(LK_EMULATOR)

using TensorMap = emulator::TensorMap;

inline cudaError_t encode_tensor_map(TensorMap* map, Dtype, const TensorOf4& t) {
  map->data = static_cast<const unsigned char*>(t.data);
  for (int i = 0; i < 4; ++i) {
    map->extent[i] = t.extent[i];
    map->stride[i] = i == 0 ? 2 : t.stride[i - 1];
    map->box[i] = t.box[i];
  }
  return cudaSuccess;
}

#else

using TensorMap = CUtensorMap;

// cudaErrorNotSupported where the driver has no tensor maps.
inline cudaError_t encode_tensor_map(TensorMap* map, Dtype dtype, const TensorOf4& t) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static std::atomic<Encode> found{nullptr};
  Encode encode = found.load(std::memory_order_acquire);
  if (encode == nullptr) {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult status{};
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault,
                                         &status) != cudaSuccess ||
        status != cudaDriverEntryPointSuccess || entry == nullptr) {
      return cudaErrorNotSupported;
    }
    encode = reinterpret_cast<Encode>(entry);
    found.store(encode, std::memory_order_release);
  }
  cuuint64_t extents[4], strides[3];
  cuuint32_t box[4];
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  for (int i = 0; i < 4; ++i) {
    extents[i] = static_cast<cuuint64_t>(t.extent[i]);
    box[i] = static_cast<cuuint32_t>(t.box[i]);
    if (i > 0) strides[i - 1] = static_cast<cuuint64_t>(t.stride[i - 1]);
  }
  const CUtensorMapDataType type = dtype == Dtype::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result = encode(
      map, type, 4, const_cast<void*>(t.data), extents, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

#endif

}  // namespace lora_kernels
