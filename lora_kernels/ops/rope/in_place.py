"""The rotation of heads that the caller has just made, without a second tensor.

For ops that compose rope with what wrote the heads; nothing is recorded for autograd, and nothing
else may hold the tensors.
"""

from __future__ import annotations

from torch import Tensor

from lora_kernels._backends import cpu as cpu_library
from lora_kernels.ops.rope import validate
from lora_kernels.ops.rope.contract import problem_of
from lora_kernels.ops.rope.problem import choose, launcher


def rotate_in_place(
    heads: list[Tensor], cos: Tensor, sin: Tensor, position_ids: Tensor | None,
    interleaved: bool, backend: str,
) -> list[Tensor]:  # fmt: skip
    """Every tensor of heads [..., S, H, D], rotated: itself where the backend has a kernel for
    that, else a new one."""
    validate.check_values(position_ids, cos.shape[0])
    problem = problem_of(heads, cos, interleaved)
    name, _ = choose(problem, backend, "fwd")
    library, _ = cpu_library.load()
    if name == "cpu" and library is not None and all(t.stride(-1) == 1 for t in heads):
        return library.rope_rotate(heads, cos, sin, position_ids, interleaved, False, True)
    module = launcher(problem, backend, "fwd")
    if name == "cuda":
        turned: list[Tensor] = module.rotate_in_place(heads, cos, sin, position_ids, interleaved)
        return turned
    made: list[Tensor] = module.rope_fwd(heads, cos, sin, position_ids, interleaved)
    return made
