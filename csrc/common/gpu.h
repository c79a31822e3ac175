// What a kernel source needs to be compiled by nvcc or, with -DLK_EMULATOR, by a host compiler
// against emulator/. Kernels touch hardware only through the wrappers of this folder, each with a
// GPU body and an emulator body side by side.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"
#include "emulator/faults.h"

#if defined(LK_EMULATOR)

#include "emulator/scheduler.h"
#define LK_DEVICE inline
#define LK_DYNAMIC_SHARED(name) unsigned char* name = lora_kernels::emulator::dynamic_shared()

#else

#include <cuda_runtime.h>
#define LK_DEVICE __device__ __forceinline__
#define LK_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

#endif

namespace lora_kernels {

// Bytes of dynamic shared memory that a block may have on the current device; 0 without a device.
inline size_t shared_memory_limit() {
#if defined(LK_EMULATOR)
  return emulator::shared_limit();
#else
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
      cudaSuccess) {
    return 0;
  }
  return static_cast<size_t>(bytes);
#endif
}

// Dynamic shared memory beyond this needs an opt-in per kernel.
constexpr size_t kDefaultShared = 48 << 10;

template <class Params>
cudaError_t launch_kernel(void (*kernel)(Params), dim3 grid, unsigned threads, size_t shared,
                          cudaStream_t stream, const Params& params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
#if defined(LK_EMULATOR)
  (void)stream;
  const bool ok = emulator::run_grid(grid, dim3(threads), shared, [&] { kernel(params); });
  return ok ? cudaSuccess : cudaErrorLaunchFailure;
#else
  if (shared > kDefaultShared) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  // clang-format off: it does not know the launch syntax in a header
  kernel<<<grid, threads, shared, stream>>>(params);
  // clang-format on
  return cudaGetLastError();
#endif
}

}  // namespace lora_kernels
