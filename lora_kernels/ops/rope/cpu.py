"""rope on the compiled CPU library (csrc/rope): one pass over q and k, either way.

Heads may have any strides as long as the channels of a head lie side by side, as they do in the
parts of a fused projection; nothing is copied then.
"""

from __future__ import annotations

from torch import Tensor

from lora_kernels._backends import cpu as backend
from lora_kernels.ops.rope.problem import RopeProblem


def supports(problem: RopeProblem) -> tuple[bool, str]:
    why = backend.lacking("rope_rotate", "rope", "q", problem.device, problem.dtype)
    if why:
        return False, why
    return True, "one pass over the heads"


def _rotate(
    heads: list[Tensor], cos: Tensor, sin: Tensor, position_ids: Tensor | None,
    interleaved: bool, inverse: bool,
) -> list[Tensor]:  # fmt: skip
    module, _ = backend.load()
    assert module is not None
    return module.rope_rotate(heads, cos, sin, position_ids, interleaved, inverse, False)


def rope_fwd(
    heads: list[Tensor], cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> list[Tensor]:
    """Every tensor of heads [..., S, H, D] rotated."""
    return _rotate(heads, cos, sin, position_ids, interleaved, False)


def rope_bwd(
    grads: list[Tensor], cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> list[Tensor]:
    """Gradients of heads from those of the results."""
    return _rotate(grads, cos, sin, position_ids, interleaved, True)
