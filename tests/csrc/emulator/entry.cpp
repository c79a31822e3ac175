// C entries of the kernels in the emulator, for tests/test_emulator.py (ctypes). Every launcher
// takes the address of its Params, whose layout Python repeats and checks by size.
#include "common/emulator/scheduler.h"
#include "lora_linear/cuda/gemm_sm80_tiles.h"
#include "lora_linear/cuda/launch.h"

namespace cuda = lora_kernels::lora_linear::cuda;
namespace emulator = lora_kernels::emulator;

extern "C" {

void lk_options(uint64_t seed, int fault, size_t shared_limit) {
  emulator::set_options({seed, fault, shared_limit});
}
void lk_clear_memory() { emulator::clear_global(); }
void lk_register_memory(const void* begin, size_t bytes) {
  emulator::register_global(begin, bytes);
}
const char* lk_error() { return emulator::error(); }
uint64_t lk_shared_phases() { return emulator::shared_phases().all; }
uint64_t lk_conflicting_phases() { return emulator::shared_phases().conflicting; }
uint64_t lk_blocks_run() { return emulator::blocks_run(); }

#define LK_ENTRY(name, Params)                                                   \
  size_t lk_sizeof_##name() { return sizeof(cuda::Params); }                     \
  const char* lk_check_##name(const cuda::Params* p) { return cuda::check(*p); } \
  int lk_##name(const cuda::Params* p) {                                         \
    return static_cast<int>(cuda::launch_##name(*p, nullptr));                   \
  }

LK_ENTRY(pad, PadParams)
LK_ENTRY(shrink, ShrinkParams)
LK_ENTRY(dy_pass, DyPassParams)
LK_ENTRY(da, DaParams)
LK_ENTRY(gemm_sm80, GemmParams)

// One tile variant of the GEMM instead of the launcher's choice.
int lk_gemm_sm80_tile(const cuda::GemmParams* p, int tile) {
  return static_cast<int>(
      cuda::launch_gemm_sm80_tile(*p, static_cast<cuda::GemmTile>(tile), nullptr));
}
int lk_gemm_sm80_choice(const cuda::GemmParams* p) {
  return static_cast<int>(cuda::choose_tile(*p));
}

size_t lk_workspace_shrink(const cuda::ShrinkParams* p) { return cuda::shrink_workspace(*p); }
size_t lk_workspace_dy_pass(const cuda::DyPassParams* p) { return cuda::dy_pass_workspace(*p); }
size_t lk_workspace_da(const cuda::DaParams* p) { return cuda::da_workspace(*p); }

}  // extern "C"
