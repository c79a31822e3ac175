// The emulator and the wrappers of csrc/common against plain loops: instruction by instruction.
// Entry: lk_selftest(name), see the table at the end. Some kernels are wrong on purpose; Python
// expects the emulator's message for them.
#include <cstdint>
#include <cstring>

#include "common/barrier.cuh"
#include "common/mma.cuh"
#include "common/tile.cuh"

namespace lora_kernels {
namespace {

struct Arguments {
  float* out;
};

bf16 value(int i) {
  bf16 v;
  from_float(static_cast<float>((i * 37 + 11) % 61 - 30) / 8.0f, v);
  return v;
}

// out [16, 8] = A [16, 16] B [16, 8] from tiles in shared memory; B as [n, k] and as [k, n].
template <bool kTransposed>
__global__ void mma_kernel(const Arguments args) {
  LK_DYNAMIC_SHARED(shared);
  bf16 *a = reinterpret_cast<bf16*>(shared), *b = a + 16 * 16;
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) a[tile_offset<16>(i / 16, i % 16 / 8) + i % 8] = value(i);
  for (int i = lane; i < 128; i += 32) {
    const int k = i / 8, n = i % 8;  // element (k, n) is value(1000 + i)
    b[kTransposed ? tile_offset<8>(k, 0) + n : tile_offset<16>(n, k / 8) + k % 8] = value(1000 + i);
  }
  __syncthreads();
  uint32_t ra[4], rb[2];
  ldmatrix_x4<false>(ra, a + tile_offset<16>(lane % 16, lane / 16));
  ldmatrix_x2<kTransposed>(rb, kTransposed ? b + tile_offset<8>(lane % 16, 0)
                                           : b + tile_offset<16>(lane % 8, lane / 8 % 2));
  float d[4] = {};
  mma_16816<bf16>(d, ra, rb[0], rb[1]);
  for (int i = 0; i < 4; ++i)
    args.out[(lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2] = d[i];
}

bool mma_is_right(bool transposed) {
  float out[128];
  const Arguments args{out};
  if (launch_kernel(transposed ? mma_kernel<true> : mma_kernel<false>, dim3(1), 32, 1024, nullptr,
                    args) != cudaSuccess) {
    return false;
  }
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k)
        sum += to_float(value(16 * i + k)) * to_float(value(1000 + 8 * k + j));
      if (out[8 * i + j] != sum) return false;
    }
  }
  return true;
}

__global__ void warp_sum_kernel(const Arguments args) {
  args.out[threadIdx.x] = warp_sum(static_cast<float>(threadIdx.x % 32));
}

bool warp_sum_is_right() {
  float out[64];
  const Arguments args{out};
  if (launch_kernel(warp_sum_kernel, dim3(1), 64, 0, nullptr, args) != cudaSuccess) return false;
  for (float f : out) {
    if (f != 496.0f) return false;
  }
  return true;
}

const uint16_t source[8] alignas(16) = {1, 2, 3, 4, 5, 6, 7, 8};

// Poison before the wait, the data and zeros after it.
__global__ void copy_kernel(const Arguments args) {
  LK_DYNAMIC_SHARED(shared);
  auto* to = reinterpret_cast<uint16_t*>(shared);
  for (int i = 0; i < 8; ++i) to[i] = 9;
  cp_async16(to, source, 10);
  cp_async_commit();
  bool ok = to[0] == 0xffff && to[7] == 0xffff;
  cp_async_wait<1>();
  ok = ok && to[0] == 0xffff;  // one group may still be under way
  cp_async_wait<0>();
  for (int i = 0; i < 8; ++i) ok = ok && to[i] == (i < 5 ? i + 1 : 0);
  args.out[0] = ok ? 1.0f : 0.0f;
}

bool copy_is_right() {
  float out = 0.0f;
  const Arguments args{&out};
  return launch_kernel(copy_kernel, dim3(1), 1, 64, nullptr, args) == cudaSuccess && out == 1.0f;
}

// Rows 128 bytes apart lie in the same banks; the swizzle moves them.
template <bool kSwizzled>
__global__ void banks_kernel(const Arguments) {
  LK_DYNAMIC_SHARED(shared);
  const bf16* tile = reinterpret_cast<const bf16*>(shared);
  const int lane = threadIdx.x;
  uint32_t r[4];
  ldmatrix_x4<false>(r, tile + (kSwizzled ? tile_offset<64>(lane, 0) : 64 * lane));
}

bool conflicts_are_counted() {
  const Arguments args{nullptr};
  auto& phases = emulator::shared_phases();
  const auto before = phases;
  if (launch_kernel(banks_kernel<true>, dim3(1), 32, 4096, nullptr, args) != cudaSuccess)
    return false;
  if (phases.all != before.all + 4 || phases.conflicting != before.conflicting) return false;
  if (launch_kernel(banks_kernel<false>, dim3(1), 32, 4096, nullptr, args) != cudaSuccess)
    return false;
  return phases.conflicting == before.conflicting + 4;
}

// Two halves of a block hand a value over through a named barrier each way.
__global__ void named_barrier_kernel(const Arguments args) {
  LK_DYNAMIC_SHARED(shared);
  auto* slot = reinterpret_cast<int*>(shared);
  if (threadIdx.x < 32) {
    slot[threadIdx.x] = static_cast<int>(threadIdx.x) + 1;
    named_barrier(1, 64);
    named_barrier(2, 64);
    args.out[threadIdx.x] = static_cast<float>(slot[threadIdx.x]);
  } else {
    named_barrier(1, 64);
    slot[threadIdx.x - 32] *= 2;
    named_barrier(2, 64);
  }
}

bool named_barrier_is_right() {
  float out[32];
  const Arguments args{out};
  if (launch_kernel(named_barrier_kernel, dim3(1), 64, 256, nullptr, args) != cudaSuccess)
    return false;
  for (int i = 0; i < 32; ++i) {
    if (out[i] != static_cast<float>(2 * (i + 1))) return false;
  }
  return true;
}

// ---- wrong on purpose ---------------------------------------------------------------------------

__global__ void deadlock_kernel(const Arguments) {
  if (threadIdx.x < 32) {
    named_barrier(1, 64);
  } else {
    named_barrier(2, 64);
  }
}

__global__ void divergent_kernel(const Arguments args) {
  uint32_t r[4] = {};
  LK_DYNAMIC_SHARED(shared);
  if (threadIdx.x == 3) {
    args.out[0] = warp_sum(1.0f);
  } else {
    ldmatrix_x4<false>(r, shared);
  }
}

__global__ void returned_lane_kernel(const Arguments args) {
  if (threadIdx.x == 3) return;
  args.out[0] = warp_sum(1.0f);
}

__global__ void outside_kernel(const Arguments) {
  LK_DYNAMIC_SHARED(shared);
  cp_async16(shared + 64, source, 16);
}

__global__ void past_end_kernel(const Arguments) {
  LK_DYNAMIC_SHARED(shared);
  shared[64] = 0;
}

__global__ void misaligned_kernel(const Arguments) {
  LK_DYNAMIC_SHARED(shared);
  cp_async16(shared, source + 1, 8);
}

__global__ void unregistered_kernel(const Arguments) {
  LK_DYNAMIC_SHARED(shared);
  emulator::clear_global();
  emulator::register_global(shared, 64);
  cp_async16(shared, source, 16);
}

bool runs(void (*kernel)(Arguments), unsigned threads) {
  float out[64];
  return launch_kernel(kernel, dim3(1), threads, 64, nullptr, Arguments{out}) == cudaSuccess;
}

struct Case {
  const char* name;
  bool (*run)();
};

const Case cases[] = {
    {"mma", [] { return mma_is_right(false); }},
    {"mma_trans", [] { return mma_is_right(true); }},
    {"warp_sum", warp_sum_is_right},
    {"cp_async", copy_is_right},
    {"named_barrier", named_barrier_is_right},
    {"bank_conflicts", conflicts_are_counted},
    {"deadlock", [] { return runs(deadlock_kernel, 64); }},
    {"divergent", [] { return runs(divergent_kernel, 32); }},
    {"returned_lane", [] { return runs(returned_lane_kernel, 32); }},
    {"outside", [] { return runs(outside_kernel, 1); }},
    {"past_end", [] { return runs(past_end_kernel, 1); }},
    {"misaligned", [] { return runs(misaligned_kernel, 1); }},
    {"unregistered", [] { return runs(unregistered_kernel, 1); }},
};

}  // namespace
}  // namespace lora_kernels

// 1: passed, 0: wrong result or stopped by the emulator, -1: no such case.
extern "C" int lk_selftest(const char* name) {
  for (const auto& c : lora_kernels::cases) {
    if (std::strcmp(c.name, name) == 0) return c.run() ? 1 : 0;
  }
  return -1;
}
