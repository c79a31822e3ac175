// Memory of the CPU kernels: workspaces that survive a call, packed weights on large pages.
#pragma once

#include <cstddef>
#include <memory>

namespace lora_kernels::cpu {

// Cache-line aligned, on 2 MiB pages where the system grants them; never null.
std::shared_ptr<void> allocate(size_t bytes);

// Asks for large pages under what is there already, for matrices that are read across their rows: each
// row is on a page of its own, and the walks to find it cost more than the reading. Only whole 2 MiB
// stretches of the block move, nothing changes in value; once per block, and from 4 MiB on.
void join_pages(const void* block, size_t bytes);

// A block of at least `bytes`, kept by the calling thread for its next call: fresh pages cost
// more to fault in than small problems take to compute.
void* thread_workspace(size_t bytes);

}  // namespace lora_kernels::cpu
