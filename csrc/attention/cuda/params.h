// GPU kernels of attention: what the host entry hands to the launchers of launch.h.
// No torch headers; plain data, copied into the kernels' argument space.
//
// Formulas: lora_kernels/ops/attention/reference.py. q [B, S, H, D], k and v [B, Sk, Hk, D] with
// any strides of batch, position and head that are multiples of 16 bytes, and unit stride of D;
// packed: [T, H, D] and [Tk, Hk, D] with the ends of the sequences in device memory. T is bfloat16
// or float16 (float32 is refused: check() says so), D is 64 or 128, v as wide as q and k.
// Statistics are fp32 in natural logarithms. Every pointer is a device pointer of the current
// device.
#pragma once

#include <cstdint>

#include "../../common/dtype.h"
#include "../../common/host_device.h"

namespace lora_kernels::attention::cuda {

// Element (b, i, h, d) lies at data + b * batch + i * row + h * head + d (elements).
struct Strided {
  const void* data;
  int64_t batch, row, head;
};

struct Results {
  void* data;
  int64_t batch, row, head;
};

struct AttentionParams {
  Dtype dtype;
  int head_dim;
  int batch;               // sequences
  int heads, kv_heads;     // heads = kv_heads * group; query head h reads head h / group
  int rows, keys;          // of each sequence; packed: of all of them together
  const int32_t* cu_rows;  // [batch + 1] ends of the packed sequences; null: not packed
  const int32_t* cu_keys;
  Strided q, k, v;          // batch stride 0 where packed
  float scale;              // of the scores
  float softcap;            // c of c tanh(z / c); 0: none
  float capped_scale;       // scale / softcap; 0 without
  int left, right;          // keys before and after its position that a query sees; -1: all
  const float* sinks;       // [heads] or null
  const float* slopes;      // [batch or 1, heads] or null
  int slopes_batch;         // 0 or heads
  float keep_scale;         // 1 / P(keep); 1 without dropout, 0 when nothing is kept
  uint32_t drop_threshold;  // keep <=> draw >= threshold (_philox.py); 0: no dropout
  const int64_t* seed;      // device memory, read where there is dropout
};

LK_HOST_DEVICE inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Places of tiles of `size` out of `extent` rows (or keys).
inline int64_t count_places(const AttentionParams& p, int extent, int size) {
  return p.cu_rows == nullptr ? p.batch * ceil_div(extent, size) : extent / size + p.batch;
}

struct ForwardParams {
  AttentionParams a;
  Results out;
  float* lse;  // [B, H, S], packed [H, T]
};

struct BackwardParams {
  AttentionParams a;
  Strided out, dout;
  const float* lse;   // as the forward gave it
  const float* dlse;  // gradient of lse, or null
  float* delta;       // workspace in the shape of lse
  Results dq;         // data null: not wanted
  Results dk, dv;     // both or none
  float* dsinks;      // [heads], or null
};

}  // namespace lora_kernels::attention::cuda
