// The few things a CUDA host entry needs from torch, on the LibTorch stable ABI: contiguous
// operands, workspaces from torch's allocator (so that stream order and graph capture hold), the
// current stream, errors, and the library that its operators belong to. Needs
// -DTORCH_TARGET_VERSION.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "dtype.h"

#if defined(LK_EMULATOR)
#include "emulator/scheduler.h"
#define LK_LIBRARY lora_kernels_emulated
#define LK_KEY CPU
#else
#include <cuda_runtime_api.h>
#define LK_LIBRARY lora_kernels_cuda
#define LK_KEY CUDA
#endif

// libtorch_cuda has it; weak, so that the library loads beside a torch that was built without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace lora_kernels::stable {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] inline void fail(const std::string& message) { throw std::runtime_error(message); }

// What an entry asks of its caller; messages begin with the name of its op.
class Require {
 public:
  explicit constexpr Require(const char* op) : op_(op) {}

  void operator()(const char* why) const {  // null: nothing is wrong
    if (why != nullptr) refuse(why);
  }
  void operator()(bool right, const char* why) const {
    if (!right) refuse(why);
  }
  [[noreturn]] void refuse(const std::string& why) const { fail(std::string(op_) + ": " + why); }

 private:
  const char* op_;
};

#if defined(LK_EMULATOR)

inline void check_launch(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess) fail(std::string(kernel) + ": error " + std::to_string(error));
}

inline bool on_device(const Tensor& t) { return t.is_cpu(); }

struct Place {
  explicit Place(const Tensor&) {}
  cudaStream_t stream = nullptr;
  int sm_count = 2;
  bool hopper = emulator::shared_limit() >= size_t{227} << 10;  // only Hopper has as much
};

#else

inline void check_launch(cudaError_t error, const char* kernel) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // a launch error is not sticky: leave none behind for the next caller
  fail(std::string(kernel) + ": " + cudaGetErrorString(error));
}

inline cudaStream_t current_stream(int32_t device) {
  if (aoti_torch_get_current_cuda_stream == nullptr) fail("this torch is built without CUDA");
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &stream) != 0) fail("no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

inline int device_attribute(cudaDeviceAttr attribute, int32_t device) {
  int value = 0;
  check_launch(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

inline bool on_device(const Tensor& t) { return t.is_cuda(); }

// What a call needs to know about where x lies; x's device is current as long as this lives.
struct Place {
  explicit Place(const Tensor& x)
      : guard(x.get_device_index()),
        stream(current_stream(x.get_device_index())),
        sm_count(device_attribute(cudaDevAttrMultiProcessorCount, x.get_device_index())),
        hopper(device_attribute(cudaDevAttrComputeCapabilityMajor, x.get_device_index()) == 9 &&
               device_attribute(cudaDevAttrComputeCapabilityMinor, x.get_device_index()) == 0) {}

  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
  int sm_count;
  bool hopper;
};

#endif

inline bool same_device(const Tensor& t, const Tensor& other) {
  return on_device(t) && t.get_device_index() == other.get_device_index();
}

inline Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      fail(std::string(name) + " has an unsupported dtype; float32, bfloat16 and float16 are");
  }
}

// A matrix whose rows have unit column stride, do not overlap, and are `ld` elements apart.
struct Matrix {
  Tensor tensor;
  const void* data;
  int64_t rows, columns, ld;
};

inline Matrix as_matrix(const Tensor& t, const char* name) {
  if (t.dim() != 2) fail(std::string(name) + " is not two-dimensional");
  const int64_t rows = t.size(0), columns = t.size(1);
  const bool unit = columns <= 1 || t.stride(1) == 1;
  const bool apart = rows <= 1 || t.stride(0) >= columns;
  Tensor held = unit && apart ? t : torch::stable::contiguous(t);
  const int64_t ld = rows <= 1 ? columns : held.stride(0);
  return {held, held.const_data_ptr(), rows, columns, ld > columns ? ld : columns};
}

inline Tensor empty(const Tensor& like, std::vector<int64_t> sizes,
                    std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, sizes, dtype);
}

inline Tensor workspace(const Tensor& like, size_t bytes) {
  return empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

}  // namespace lora_kernels::stable
