// Rotary embedding of several tensors that share positions, either way.
//
// Math      of a rotated pair of channels   z1 = y1 cos1 - y2 sin1,  z2 = y2 cos2 + y1 sin2;
//           inverse (the gradient)          z1 = y1 cos1 + y2 sin2,  z2 = y2 cos2 - y1 sin1.
//           A pair lies R / 2 (half-rotated) or 1 (interleaved) apart; channels from R on pass.
// Shapes    x, y [B, S, heads, D] of T, any strides, y may be x; cos, sin rows of R entries.
// Grid      x: threads over (position, group of 4 heads of one tensor, item of a head), items
//           fastest. An item is 16 bytes of x: those of both halves of a pair (half-rotated), of
//           whole pairs (interleaved), or copied ones; where rows are no multiple of 16 bytes, one
//           pair or one channel.
// Loads     a thread has up to 8 loads of 16 bytes in flight; its rows of cos and sin are read
//           once for its 4 heads, by other groups of the position from the first-level cache.
// Bytes     x once, y once, cos and sin of a position once from memory. No shared memory.
// Numerics  fp32, one rounding to T. A position outside of the cache gives NaN in the R channels.
// Limits    fp32, bf16, fp16; 8 tensors; B S < 2^31.
#pragma once

#include "tables.cuh"

namespace lora_kernels::rope::cuda {

constexpr int kThreads = 256;
constexpr int kHeads = 4;  // of a thread

enum class Pairing : int { kHalf, kInterleaved, kScalar };

struct RotateArgs {
  RotateParams p;
  int first_group[kMaxTensors];
  int groups, items;
  uint32_t first_place, threads;
  bool wide_tables;  // 16-byte loads of cos and sin
};

template <class T, int V>
struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Elements {
  T e[V];
};

// Channels [channel, channel + V) of a row of a table.
template <int V>
LK_DEVICE void load_channels(const Table& t, int64_t row, int channel, bool wide, float (&out)[V]) {
  if (V > 1 && wide) {
    const int64_t at = row + channel;
    if (t.dtype == Dtype::kFloat32) {
      const auto v = *reinterpret_cast<const Elements<float, V>*>(
          static_cast<const float*>(t.data) + at);
#pragma unroll
      for (int i = 0; i < V; ++i) out[i] = v.e[i];
    } else {
      const auto v = *reinterpret_cast<const Elements<bf16, V>*>(
          static_cast<const bf16*>(t.data) + at);
      const bool is_bf16 = t.dtype == Dtype::kBFloat16;
#pragma unroll
      for (int i = 0; i < V; ++i) out[i] = is_bf16 ? widen(v.e[i]) : widen(fp16{v.e[i].bits});
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < V; ++i) out[i] = load_channel(t, row, channel + i);
}

template <class T>
LK_DEVICE T narrowed(float value) {
  T out;
  narrow(value, out);
  return out;
}

template <class T, Pairing kPairing>
__global__ void __launch_bounds__(kThreads) rotate_kernel(const __grid_constant__ RotateArgs args) {
  // Channels of a load; a half-rotated or single item has two of them.
  constexpr int V = kPairing == Pairing::kScalar ? 1 : 16 / static_cast<int>(sizeof(T));
  constexpr int kLoads = kPairing == Pairing::kInterleaved ? 1 : 2;
  constexpr int kPairs = kLoads * V / 2;
  using Chunk = Elements<T, V>;
  const RotateParams& p = args.p;
  const uint32_t index = blockIdx.x * static_cast<uint32_t>(kThreads) + threadIdx.x;
  if (index >= args.threads) return;
  const int item = static_cast<int>(index % args.items);
  const uint32_t group_index = index / args.items;
  const int group = static_cast<int>(group_index % args.groups);
  const uint32_t place = args.first_place + group_index / args.groups;
  int t = 0;
  while (t + 1 < p.tensors && group >= args.first_group[t + 1]) ++t;
  const RotateTensor& tensor = p.tensor[t];
  const int head = (group - args.first_group[t]) * kHeads;
  const int heads = tensor.heads - head < kHeads ? tensor.heads - head : kHeads;

  const int R = p.rotation.channels;
  const bool interleaved = kPairing == Pairing::kInterleaved ||
                           (kPairing == Pairing::kScalar && p.rotation.interleaved);
  const int rotated_items = kPairing == Pairing::kInterleaved ? R / V : R / (2 * V);
  const bool rotated = item < rotated_items;
  // The first channel of each load.
  const int step = kPairing == Pairing::kScalar && interleaved ? 2 : V;
  const int one = rotated ? item * step : R + (item - rotated_items) * V;
  const int two = one + (interleaved ? 1 : R / 2);
  const int loads = rotated ? kLoads : 1;

  const int64_t b = place / static_cast<uint32_t>(p.rotation.sequence);
  const int64_t n = place % static_cast<uint32_t>(p.rotation.sequence);
  const T* x = static_cast<const T*>(tensor.x) + b * tensor.x_batch + n * tensor.x_row +
               head * tensor.x_head;
  T* y = static_cast<T*>(tensor.y) + b * tensor.y_batch + n * tensor.y_row + head * tensor.y_head;

  Chunk v[kHeads][kLoads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (h < heads && i < loads) {
        v[h][i] = *reinterpret_cast<const Chunk*>(x + h * tensor.x_head +
                                                  (i == 0 ? one : two) * tensor.x_channel);
      }
    }
  }
  if (rotated) {
    const TableRow row = table_row(p.rotation, place);
    float c[kLoads][V], s[kLoads][V];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      load_channels<V>(p.rotation.cos, row.cos, i == 0 ? one : two, args.wide_tables, c[i]);
      load_channels<V>(p.rotation.sin, row.sin, i == 0 ? one : two, args.wide_tables, s[i]);
    }
    PairFactors f[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      f[i] = kLoads == 2 ? pair_factors(c[0][i], c[kLoads - 1][i], s[0][i], s[kLoads - 1][i],
                                        p.inverse)
                         : pair_factors(c[0][2 * i % V], c[0][(2 * i + 1) % V], s[0][2 * i % V],
                                        s[0][(2 * i + 1) % V], p.inverse);
      if (!row.known) f[i].c1 = f[i].c2 = not_a_number();
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        T& first = kLoads == 2 ? v[h][0].e[i] : v[h][0].e[2 * i % V];
        T& second = kLoads == 2 ? v[h][kLoads - 1].e[i] : v[h][0].e[(2 * i + 1) % V];
        const float y1 = widen(first), y2 = widen(second);
        first = narrowed<T>(y1 * f[i].c1 + y2 * f[i].s1);
        second = narrowed<T>(y2 * f[i].c2 + y1 * f[i].s2);
      }
    }
  }
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (h < heads && i < loads) {
        *reinterpret_cast<Chunk*>(y + h * tensor.y_head +
                                  (i == 0 ? one : two) * tensor.y_channel) = v[h][i];
      }
    }
  }
}

}  // namespace lora_kernels::rope::cuda
