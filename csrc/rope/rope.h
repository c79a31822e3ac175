// rope on the CPU: the rotation of heads, forward or transposed, into a result or in place. No torch
// headers. Formulas: lora_kernels/ops/rope/reference.py.
//
// Shapes   x, y [B, S, H, D] with any strides of B, S and H; channels lie side by side. Several such
//          tensors (q and k) share positions and tables. cos and sin: rows of R channels, R even,
//          addressed by (b, n), or by ids[b, n] where there are position ids.
// Bytes    every head read once and written once; the two rows of a position converted to fp32 once
//          for all heads of all tensors.
// Numerics fp32, products and sum rounded one by one (no contraction), as library calls do in fp32;
//          one rounding at the store. Positions are independent: threads do not change the result.
// Limits   ids are within the tables: the caller has checked them.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace lora_kernels::rope {

enum class TableDtype : int { kFloat32, kBFloat16, kFloat16, kFloat64 };

constexpr int kMaxTensors = 4;

struct Heads {
  const void* x;
  void* y;                  // x itself: in place
  int64_t count;            // heads
  int64_t xb, xs, xh;       // strides in elements
  int64_t yb, ys, yh;
};

struct Table {
  const void* data;
  TableDtype dtype;
  int64_t batch, row, channel;  // strides in elements; batch 0: shared
};

struct RopeParams {
  int64_t positions;        // S: place b * S + n
  int64_t channels;         // D
  int64_t rotated;          // R
  Table cos, sin;
  const void* ids;          // null: row n
  bool wide_ids;            // int64, else int32
  int64_t ids_batch, ids_row;
  int tensors;
  Heads heads[kMaxTensors];
};

// Places begin to end. scratch: 2 * rotated floats of the calling thread.
using RotateKernel = void (*)(const RopeParams&, int64_t begin, int64_t end, float* scratch);

RotateKernel rotate_avx512(Dtype, bool interleaved, bool inverse);
RotateKernel rotate_avx2(Dtype, bool interleaved, bool inverse);
RotateKernel rotate_baseline(Dtype, bool interleaved, bool inverse);

}  // namespace lora_kernels::rope
