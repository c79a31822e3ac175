#include "memory.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lora_kernels::cpu {

std::shared_ptr<void> allocate(size_t bytes) {
  constexpr size_t kPage = size_t{2} << 20;
  const size_t alignment = bytes >= kPage ? kPage : 64;
  const size_t size = (std::max<size_t>(bytes, 1) + alignment - 1) / alignment * alignment;
  void* block = std::aligned_alloc(alignment, size);
  if (block == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  if (alignment == kPage) madvise(block, size, MADV_HUGEPAGE);  // advice only
#endif
  return {block, std::free};
}

void* thread_workspace(size_t bytes) {
  static thread_local std::shared_ptr<void> block;
  static thread_local size_t capacity = 0;
  if (bytes > capacity) {
    block.reset();
    block = allocate(bytes);
    capacity = bytes;
  }
  return block.get();
}

}  // namespace lora_kernels::cpu
