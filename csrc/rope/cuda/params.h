// Arguments of the GPU kernels of rope. POD, torch-free. Strides are in elements.
#pragma once

#include <cstdint>

#include "../../common/dtype.h"

namespace lora_kernels::rope::cuda {

constexpr int kMaxTensors = 8;  // that share positions, q and k in one launch

// cos or sin: [S, R], [B, S, R] or, with position ids, a cache [positions, R].
struct Table {
  const void* data;
  Dtype dtype;  // any of the three
  int64_t batch, row, channel;
};

// Which rotation a row has. Row m of all sequences is position m % sequence of m / sequence.
struct Rotation {
  Table cos, sin;
  const void* ids;  // [B, S] rows of the cache, or null
  int ids_bytes;    // of an id: 4 or 8
  int64_t ids_batch, ids_row;
  int64_t positions;  // rows of the cache
  int64_t sequence;   // S
  int channels;       // R, even
  bool interleaved;
};

struct RotateTensor {
  const void* x;  // [B, S, heads, D]
  void* y;        // the same shape; may be x with the same strides
  int64_t x_batch, x_row, x_head, x_channel;
  int64_t y_batch, y_row, y_head, y_channel;
  int heads;
};

struct RotateParams {
  Dtype dtype;  // of every x and y: any of the three
  Rotation rotation;
  int64_t batch;
  int head_dim;
  bool inverse;
  int tensors;
  RotateTensor tensor[kMaxTensors];
};

}  // namespace lora_kernels::rope::cuda
