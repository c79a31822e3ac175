// Fibers: ucontext gives each its stack once; later switches are setjmp/longjmp, which, other than
// swapcontext, make no system call.
#pragma once

#include <ucontext.h>

#include <csetjmp>
#include <cstddef>

namespace lora_kernels::emulator {

class Fiber {
 public:
  // `entry` is called on the fiber's stack with `argument` and must never return.
  void create(char* stack, size_t bytes, void (*entry)(void*), void* argument);
  void resume(std::jmp_buf& from);  // from the scheduler into the fiber
  void yield(std::jmp_buf& to);     // from the fiber back to the scheduler

 private:
  std::jmp_buf state_;
  ucontext_t start_;
  bool started_ = false;
};

}  // namespace lora_kernels::emulator
