"""linear_cross_entropy on the compiled CPU library: library GEMMs around csrc/linear_cross_entropy,
which turns a chunk of logits into losses and their gradient in place, without an fp32 copy."""

from __future__ import annotations

from torch import Tensor

from lora_kernels._backends import cpu as backend
from lora_kernels.ops.linear_cross_entropy import chunks
from lora_kernels.ops.linear_cross_entropy.problem import LinearCrossEntropyProblem


def supports(problem: LinearCrossEntropyProblem) -> tuple[bool, str]:
    why = backend.lacking(
        "linear_cross_entropy_rows", "linear_cross_entropy", "hidden", problem.device, problem.dtype
    )
    if why:
        return False, why
    module, _ = backend.load()
    assert module is not None
    return True, f"{module.linear_cross_entropy_engine(problem.dtype)} kernels"


class _Rows(chunks.ChunkedRows):
    def __call__(
        self, z: Tensor, labels: Tensor, coefficients: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        module, _ = backend.load()
        assert module is not None
        g = None if coefficients is None else coefficients.float().contiguous()
        losses = module.linear_cross_entropy_rows(
            z, labels.contiguous(), g, self.ignore_index, self.smoothing, self.softcap, self.z_loss
        )
        return losses, None if g is None else z


linear_cross_entropy_fwd, linear_cross_entropy_grad = chunks.backend_pair(_Rows)
