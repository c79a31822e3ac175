// Runs a grid on one CPU thread, block after block; every CUDA thread of a block is a fiber.
//
// A fiber runs until it has to wait: at a barrier, or at a warp-wide instruction that some lane has
// not reached. Which fiber runs next is drawn from the seed: mostly one of the same warp, so that
// warps drift apart as far as the barriers let them. The same seed gives the same order.
//
// Shared memory is poisoned (all bits set: NaN in every floating format) when a block starts.
// cp.async poisons its destination when it is issued and writes it when the issuing thread waits
// for the group, so that a read before the wait, or a copy into a buffer that is still being read,
// shows up in the result. What is not modelled: the memory model of a GPU, time, and bank conflicts
// other than those of ldmatrix.
//
// Errors (a deadlock, lanes at different warp-wide instructions, an address outside shared memory
// or outside the registered global ranges, a misaligned access) end the grid; error() says which.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "runtime.h"

namespace lora_kernels::emulator {

constexpr int kWarp = 32;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// Position of the fiber that runs now.
extern Index thread_index, block_index;
extern dim3 block_extent, grid_extent;

struct Options {
  uint64_t seed = 0;
  int planted_fault = 0;            // faults.h
  size_t shared_limit = 163 << 10;  // bytes of shared memory per block
};
void set_options(const Options&);
bool planted(int fault);
size_t shared_limit();

// Global memory that kernels may touch; checked once a range is registered.
void register_global(const void* begin, size_t bytes);
void clear_global();

// Runs kernel() for every thread of the grid. Returns false after an error.
bool run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);
const char* error();
uint64_t blocks_run();  // since the start of the process

// Phases of ldmatrix (8 rows of 16 bytes each) so far, and those of them in which two rows fell
// into the same banks, so that hardware would take another cycle.
struct SharedPhases {
  uint64_t all = 0, conflicting = 0;
};
SharedPhases& shared_phases();

// Work that goes on beside the threads (copies by the copy engine): busy() tells whether there is
// some, step() does a part of it; reset() begins a block.
struct AsyncUnit {
  void (*reset)();
  bool (*busy)();
  void (*step)();
};
void set_async_unit(AsyncUnit);
uint32_t draw(uint32_t below);  // from the seed

// ---- called by fibers ---------------------------------------------------------------------------
unsigned char* dynamic_shared();
void barrier(int id, int threads);  // threads = 0: all that have not returned
void barrier_arrive(int id, int threads);
void suspend();         // until some thread or the asynchronous unit calls wake()
int current_thread();
void wake(int thread);

// A warp-wide instruction: `all` runs once, when every lane has arrived, and computes the 32
// outputs from the 32 inputs.
using WarpFunction = void (*)(const void* const* in, void* const* out);
void warp_collective(const char* name, WarpFunction all, const void* in, void* out);

void cp_async(void* shared, const void* global, int bytes, int source_bytes);
void cp_async_commit();
void cp_async_wait(int pending_groups);

void check_shared(const void* p, size_t bytes, size_t alignment);
void check_global(const void* p, size_t bytes, size_t alignment);
[[noreturn]] void fail(const char* what);

}  // namespace lora_kernels::emulator

#define threadIdx lora_kernels::emulator::thread_index
#define blockIdx lora_kernels::emulator::block_index
#define blockDim lora_kernels::emulator::block_extent
#define gridDim lora_kernels::emulator::grid_extent

inline void __syncthreads() { lora_kernels::emulator::barrier(0, 0); }

inline void __syncwarp() {
  lora_kernels::emulator::warp_collective(
      "syncwarp", [](const void* const*, void* const*) {}, nullptr, nullptr);
}
