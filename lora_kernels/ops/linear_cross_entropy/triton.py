"""linear_cross_entropy with a Triton kernel: library GEMMs around triton_rows.py, which turns a
chunk of logits into losses and their gradient in place, without an fp32 copy.

Nothing here waits for the device. CPU tensors run in Triton's interpreter when TRITON_INTERPRET=1
was set before the first launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels._backends import triton as backend
from lora_kernels.ops.linear_cross_entropy import chunks
from lora_kernels.ops.linear_cross_entropy.problem import LinearCrossEntropyProblem

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 4096  # logits of a program in registers: 16 per thread


def supports(problem: LinearCrossEntropyProblem) -> tuple[bool, str]:
    """Can the kernel run `problem`, at whatever speed; the reason is for people."""
    able, reason = backend.usable(problem.device, None, "hidden")
    if not able:
        return False, reason
    if problem.dtype not in _DTYPES:
        return False, f"dtype {problem.dtype} is not supported; float32, bfloat16 and float16 are"
    if max(problem.M, problem.V) >= 2**31 - _BLOCK:
        return False, "an extent of about 2**31 or more is not supported"
    return True, reason


def _kernel() -> Any:
    from lora_kernels.ops.linear_cross_entropy import triton_rows

    return triton_rows.rows_to_losses


class _Rows(chunks.ChunkedRows):
    def __call__(
        self, z: Tensor, labels: Tensor, coefficients: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        losses = torch.empty(z.shape[0], dtype=torch.float32, device=z.device)
        g = losses if coefficients is None else coefficients.float().contiguous()
        block = min(_BLOCK, max(16, 1 << (z.shape[1] - 1).bit_length()))
        kernel = _kernel()
        with backend.on_device(z), backend.arithmetic(kernel):
            kernel[(z.shape[0],)](
                z, labels.contiguous(), g, losses, z.shape[1], z.stride(0), self.ignore_index,
                self.smoothing, self.softcap or 1.0, self.z_loss,
                BLOCK=block, GRAD=coefficients is not None, SOFTCAP=self.softcap != 0.0,
                SMOOTHED=self.smoothing != 0.0, num_warps=8 if block == _BLOCK else 4,
            )  # fmt: skip
        return losses, None if coefficients is None else z


linear_cross_entropy_fwd, linear_cross_entropy_grad = chunks.backend_pair(_Rows)
