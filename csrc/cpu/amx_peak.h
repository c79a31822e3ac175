// Ceiling of the tile unit, for benchmarks: register-only TDPBF16PS on `threads` threads.
#pragma once

namespace lora_kernels::cpu {

// Sum over threads in GFLOP/s; 0 where the process may not use AMX.
double amx_peak_gflops(double seconds, int threads);

}  // namespace lora_kernels::cpu
