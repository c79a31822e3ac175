#include "memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <unordered_map>

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

void join_pages(const void* block, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, since Linux 6.1; an older system refuses it
  constexpr size_t kMostKnown = 4096;
  if (bytes < 2 * kPage) return;
  static std::mutex mutex;
  static std::unordered_map<uintptr_t, size_t> known;  // blocks that were asked for
  const auto begin = reinterpret_cast<uintptr_t>(block);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (known.size() > kMostKnown) known.clear();
    size_t& size = known[begin];
    if (size == bytes) return;
    size = bytes;
  }
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, end = (begin + bytes) / kPage * kPage;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, kCollapse);  // advice only
#else
  (void)block;
  (void)bytes;
#endif
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
