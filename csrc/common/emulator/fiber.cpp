#include "fiber.h"

#include <cstdint>

namespace lora_kernels::emulator {
namespace {

// makecontext passes ints only: pointers travel in halves.
void trampoline(unsigned entry_high, unsigned entry_low, unsigned arg_high, unsigned arg_low) {
  const auto join = [](unsigned high, unsigned low) {
    return static_cast<uintptr_t>((static_cast<uint64_t>(high) << 32) | low);
  };
  reinterpret_cast<void (*)(void*)>(join(entry_high, entry_low))(
      reinterpret_cast<void*>(join(arg_high, arg_low)));
}

}  // namespace

void Fiber::create(char* stack, size_t bytes, void (*entry)(void*), void* argument) {
  getcontext(&start_);
  start_.uc_stack.ss_sp = stack;
  start_.uc_stack.ss_size = bytes;
  start_.uc_link = nullptr;
  const uint64_t e = reinterpret_cast<uintptr_t>(entry), a = reinterpret_cast<uintptr_t>(argument);
  makecontext(&start_, reinterpret_cast<void (*)()>(trampoline), 4, static_cast<unsigned>(e >> 32),
              static_cast<unsigned>(e), static_cast<unsigned>(a >> 32), static_cast<unsigned>(a));
  started_ = false;
}

void Fiber::resume(std::jmp_buf& from) {
  if (_setjmp(from) != 0) return;
  if (started_) _longjmp(state_, 1);
  started_ = true;
  setcontext(&start_);
}

void Fiber::yield(std::jmp_buf& to) {
  if (_setjmp(state_) == 0) _longjmp(to, 1);
}

}  // namespace lora_kernels::emulator
