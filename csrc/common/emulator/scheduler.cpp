#include "scheduler.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"

namespace lora_kernels::emulator {

Index thread_index, block_index;
dim3 block_extent, grid_extent;

namespace {

constexpr size_t kStack = 64 << 10;
constexpr size_t kGuard = 256;  // bytes after shared memory that must stay untouched
constexpr int kBarriers = 16;   // as many as a block has on hardware
constexpr unsigned char kPoison = 0xff;
constexpr char kLaneReturned[] = "a warp-wide instruction after a lane has returned";

struct Copy {
  void* to;
  const void* from;
  int bytes, source_bytes;
};

struct Thread {
  Fiber fiber;
  Index index;
  int id = 0;
  bool done = true;
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Copy> open;
};

struct Warp {
  std::vector<int> ready;
  const char* operation = nullptr;
  WarpFunction function = nullptr;
  const void* in[kWarp];
  void* out[kWarp];
  int arrived = 0, alive = 0, lanes = 0;
};

struct Barrier {
  std::vector<int> waiting;
  int threads = 0, arrived = 0;  // arrived without waiting
};

struct Range {
  const unsigned char *begin, *end;
};

struct Machine {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<char> stacks;
  std::vector<Warp> warps;
  Barrier barriers[kBarriers];
  std::vector<uint64_t> shared;  // aligned to 16 by hand
  unsigned char* shared_begin = nullptr;
  size_t shared_bytes = 0;
  const std::function<void()>* kernel = nullptr;
  Thread* current = nullptr;
  int alive = 0, warp = 0;
  std::jmp_buf scheduler;
  std::string error;
  bool failed = false;
  uint64_t random = 1, blocks = 0;
  Options options;
  std::vector<Range> global;
};

Machine machine;

// A static of its own: the unit registers itself before main, in whatever order.
AsyncUnit& async_unit() {
  static AsyncUnit unit{[] {}, [] { return false; }, [] {}};
  return unit;
}

}  // namespace

uint32_t draw(uint32_t below) {  // xorshift64*
  uint64_t& r = machine.random;
  r ^= r >> 12;
  r ^= r << 25;
  r ^= r >> 27;
  return static_cast<uint32_t>(((r * 0x2545F4914F6CDD1Dull) >> 33) % below);
}

namespace {

void ready(int thread) { machine.warps[thread / kWarp].ready.push_back(thread); }

void wait() { machine.current->fiber.yield(machine.scheduler); }

void release(Barrier& b) {
  for (int t : b.waiting) ready(t);
  b.waiting.clear();
  b.threads = b.arrived = 0;
}

// Threads that return lower the number that a full barrier waits for.
void thread_done() {
  Machine& m = machine;
  m.current->done = true;
  --m.alive;
  Warp& w = m.warps[m.current->id / kWarp];
  --w.alive;
  if (w.arrived > 0) fail(kLaneReturned);
  Barrier& b = m.barriers[0];
  if (b.threads == 0 && m.alive > 0 && static_cast<int>(b.waiting.size()) == m.alive) release(b);
}

void fiber_main(void* argument) {
  Thread* self = static_cast<Thread*>(argument);
  for (;;) {
    (*machine.kernel)();
    for (auto& group : self->groups) group.clear();
    thread_done();
    wait();
  }
}

void prepare_threads(int count) {
  Machine& m = machine;
  if (static_cast<int>(m.threads.size()) < count || m.failed) {
    m.threads.clear();
    m.stacks.resize(kStack * count);
    for (int t = 0; t < count; ++t) {
      m.threads.push_back(std::make_unique<Thread>());
      m.threads[t]->id = t;
      m.threads[t]->fiber.create(m.stacks.data() + kStack * t, kStack, fiber_main,
                                 m.threads[t].get());
    }
    m.failed = false;
  }
}

void start_block(int count) {
  Machine& m = machine;
  std::memset(m.shared_begin, kPoison, m.shared_bytes + kGuard);
  m.warps.assign((count + kWarp - 1) / kWarp, Warp{});
  for (Barrier& b : m.barriers) b = Barrier{};
  async_unit().reset();
  m.alive = count;
  for (int t = 0; t < count; ++t) {
    Thread& thread = *m.threads[t];
    const unsigned x = block_extent.x, y = block_extent.y;
    thread.index = {t % x, t / x % y, t / (x * y)};
    thread.done = false;
    thread.groups.clear();
    thread.open.clear();
    Warp& w = m.warps[t / kWarp];
    ++w.alive;
    ++w.lanes;
    ready(t);
  }
}

int pick_warp() {
  Machine& m = machine;
  const int count = static_cast<int>(m.warps.size());
  if (!m.warps[m.warp].ready.empty() && draw(16) != 0) return m.warp;
  const int first = static_cast<int>(draw(count));
  for (int i = 0; i < count; ++i) {
    if (!m.warps[(first + i) % count].ready.empty()) return (first + i) % count;
  }
  return -1;
}

void run_block(int count) {
  Machine& m = machine;
  start_block(count);
  m.warp = 0;
  while (m.alive > 0 && !m.failed) {
    if (async_unit().busy() && draw(512) == 0) async_unit().step();  // mostly late
    const int w = pick_warp();
    if (w < 0) {
      if (async_unit().busy()) {
        async_unit().step();
        continue;
      }
      m.error = "deadlock: every live thread waits at a barrier or a warp-wide instruction";
      m.failed = true;
      return;
    }
    m.warp = w;
    std::vector<int>& queue = m.warps[w].ready;
    const uint32_t i = draw(static_cast<uint32_t>(queue.size()));
    m.current = m.threads[queue[i]].get();
    queue[i] = queue.back();
    queue.pop_back();
    thread_index = m.current->index;
    m.current->fiber.resume(m.scheduler);
  }
  if (!m.failed && async_unit().busy()) {
    m.error = "a copy was under way when its block ended";
    m.failed = true;
  }
  for (size_t i = 0; i < kGuard && !m.failed; ++i) {
    if (m.shared_begin[m.shared_bytes + i] != kPoison) {
      m.error = "a write past the end of shared memory";
      m.failed = true;
    }
  }
}

}  // namespace

void set_options(const Options& options) { machine.options = options; }
bool planted(int fault) { return machine.options.planted_fault == fault; }
size_t shared_limit() { return machine.options.shared_limit; }

void register_global(const void* begin, size_t bytes) {
  const auto* p = static_cast<const unsigned char*>(begin);
  machine.global.push_back({p, p + bytes});
}
void clear_global() { machine.global.clear(); }

const char* error() { return machine.error.c_str(); }
uint64_t blocks_run() { return machine.blocks; }
SharedPhases& shared_phases() {
  static SharedPhases phases;
  return phases;
}

bool run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  Machine& m = machine;
  const int count = static_cast<int>(block.x * block.y * block.z);
  grid_extent = grid;
  block_extent = block;
  m.kernel = &kernel;
  m.error.clear();
  if (shared_bytes > m.options.shared_limit) {
    m.error = "more shared memory than a block may have";
    return false;
  }
  prepare_threads(count);
  m.shared_bytes = shared_bytes;
  m.shared.resize((shared_bytes + kGuard + 1024) / 8 + 1);
  const auto address = reinterpret_cast<uintptr_t>(m.shared.data());
  m.shared_begin = reinterpret_cast<unsigned char*>((address + 1023) / 1024 * 1024);
  m.random = m.options.seed * 0x9E3779B97F4A7C15ull + 0x632BE59BD9B4E019ull;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = {x, y, z};
        run_block(count);
        ++m.blocks;
        if (m.failed) return false;
      }
    }
  }
  return true;
}

void fail(const char* what) {
  Machine& m = machine;
  char where[160];
  std::snprintf(where, sizeof where, "%s (block %u,%u,%u thread %d)", what, block_index.x,
                block_index.y, block_index.z, m.current->id);
  m.error = where;
  m.failed = true;
  for (;;) wait();
}

unsigned char* dynamic_shared() { return machine.shared_begin; }

void barrier(int id, int threads) {
  Machine& m = machine;
  if (id < 0 || id >= kBarriers) fail("named barrier out of range");
  Barrier& b = m.barriers[id];
  if ((!b.waiting.empty() || b.arrived > 0) && b.threads != threads) {
    fail("a barrier with two thread counts");
  }
  b.threads = threads;
  const int needed = threads == 0 ? m.alive : threads;
  if (static_cast<int>(b.waiting.size()) + b.arrived + 1 < needed) {
    b.waiting.push_back(m.current->id);
    wait();
    return;
  }
  release(b);
  ready(m.current->id);  // nobody has a head start
  wait();
}

void barrier_arrive(int id, int threads) {
  if (id < 1 || id >= kBarriers) fail("named barrier out of range");
  Barrier& b = machine.barriers[id];
  if ((!b.waiting.empty() || b.arrived > 0) && b.threads != threads) {
    fail("a barrier with two thread counts");
  }
  b.threads = threads;
  ++b.arrived;
  const int there = static_cast<int>(b.waiting.size()) + b.arrived;
  if (there > threads) fail("more arrivals at a barrier than it counts");
  if (there == threads) release(b);
}

void set_async_unit(AsyncUnit unit) { async_unit() = unit; }
int current_thread() { return machine.current->id; }
void suspend() { wait(); }
void wake(int thread) { ready(thread); }

void warp_collective(const char* name, WarpFunction all, const void* in, void* out) {
  Machine& m = machine;
  Thread* self = m.current;
  Warp& w = m.warps[self->id / kWarp];
  if (w.alive != kWarp) fail(kLaneReturned);
  if (w.arrived == 0) {
    w.operation = name;
    w.function = all;
  } else if (w.function != all) {
    fail("lanes of one warp at different warp-wide instructions");
  }
  w.in[self->id % kWarp] = in;
  w.out[self->id % kWarp] = out;
  if (++w.arrived < kWarp) {
    wait();
    return;
  }
  all(w.in, w.out);
  w.arrived = 0;
  const int first = self->id / kWarp * kWarp;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (first + lane != self->id) ready(first + lane);
  }
}

void check_shared(const void* p, size_t bytes, size_t alignment) {
  const auto* q = static_cast<const unsigned char*>(p);
  const Machine& m = machine;
  if (q < m.shared_begin || q + bytes > m.shared_begin + m.shared_bytes) {
    fail("an address outside shared memory");
  }
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) fail("a misaligned shared access");
}

void check_global(const void* p, size_t bytes, size_t alignment) {
  const auto* q = static_cast<const unsigned char*>(p);
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) fail("a misaligned global access");
  if (machine.global.empty() || bytes == 0) return;
  for (const Range& r : machine.global) {
    if (q >= r.begin && q + bytes <= r.end) return;
  }
  fail("a global address outside every registered range");
}

void cp_async(void* shared, const void* global, int bytes, int source_bytes) {
  check_shared(shared, bytes, bytes);
  check_global(global, source_bytes, bytes);
  std::memset(shared, kPoison, bytes);
  machine.current->open.push_back({shared, global, bytes, source_bytes});
}

void cp_async_commit() {
  Thread& t = *machine.current;
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}

void cp_async_wait(int pending_groups) {
  auto& groups = machine.current->groups;
  while (static_cast<int>(groups.size()) > pending_groups) {
    for (const Copy& c : groups.front()) {
      std::memset(c.to, 0, c.bytes);
      std::memcpy(c.to, c.from, c.source_bytes);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace lora_kernels::emulator
