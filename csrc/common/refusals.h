// What launchers of every op say against their arguments. Host code only.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace lora_kernels {

constexpr int64_t kMaxExtent = (int64_t{1} << 31) - 1024;

constexpr const char* kNull = "a pointer that is read or written is null";
constexpr const char* kStride = "a row stride is smaller than the row";
constexpr const char* kExtent = "an extent is not in 1..2^31 - 1024";

inline const char* check_half(Dtype dtype) {
  return dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16
             ? nullptr
             : "dtype is not supported; bfloat16 and float16 are";
}

}  // namespace lora_kernels
