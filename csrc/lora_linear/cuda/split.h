// How long sums are shared between blocks. Host code; the same answer for the workspace query and
// for the launch.
#pragma once

#include <cstdint>

#include "../../common/host_device.h"

namespace lora_kernels::lora_linear::cuda {

LK_HOST_DEVICE inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Split {
  int parts;         // >= 1
  int64_t per_part;  // steps, the last part may have fewer
};

// `steps` steps of each of `blocks` blocks, no part shorter than `least` steps. Up to one block per
// multiprocessor: with two or three tiles under way each, half of them saturate the memory, and
// more parts only make more partial sums. wanted > 0 asks for that many parts.
inline Split choose_split(int64_t steps, int64_t blocks, int sm_count, int64_t least, int wanted) {
  int64_t parts = wanted;
  if (parts <= 0) {
    parts = blocks > 0 ? sm_count / blocks : 1;
    if (parts > steps / least) parts = steps / least;
  }
  if (parts > steps) parts = steps;
  if (parts < 1) parts = 1;
  const int64_t per_part = steps > 0 ? ceil_div(steps, parts) : 1;
  return {static_cast<int>(steps > 0 ? ceil_div(steps, per_part) : 1), per_part};
}

}  // namespace lora_kernels::lora_linear::cuda
