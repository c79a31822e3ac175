// Host entry of rope on the CPU, as bound to Python.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace lora_kernels::rope {

// Every tensor of heads [..., S, H, D] rotated (inverse: by the transposed rotation): contiguous
// results, or in_place the tensors themselves. cos and sin are [S, R], [B or 1, S, R], or with
// position_ids [..., S], whose values the caller has checked, a cache [positions, R].
std::vector<at::Tensor> rope_rotate(const std::vector<at::Tensor>& heads, const at::Tensor& cos,
                                    const at::Tensor& sin,
                                    const std::optional<at::Tensor>& position_ids,
                                    bool interleaved, bool inverse, bool in_place);

}  // namespace lora_kernels::rope
