// rope for baseline: 4 lanes.
#define LK_LANES 4
#include "rotate.h"

namespace lora_kernels::rope {

RotateKernel rotate_baseline(Dtype dtype, bool interleaved, bool inverse) {
  return rotate_of(dtype, interleaved, inverse);
}

}  // namespace lora_kernels::rope
