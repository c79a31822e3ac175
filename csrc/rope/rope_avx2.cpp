// rope for avx2: 8 lanes.
#define LK_LANES 8
#include "rotate.h"

namespace lora_kernels::rope {

RotateKernel rotate_avx2(Dtype dtype, bool interleaved, bool inverse) {
  return rotate_of(dtype, interleaved, inverse);
}

}  // namespace lora_kernels::rope
