// rope for avx512: 16 lanes.
#define LK_LANES 16
#include "rotate.h"

namespace lora_kernels::rope {

RotateKernel rotate_avx512(Dtype dtype, bool interleaved, bool inverse) {
  return rotate_of(dtype, interleaved, inverse);
}

}  // namespace lora_kernels::rope
