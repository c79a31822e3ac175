"""The loop that the chunked backends share: some rows of logits at a time, by library GEMMs.

A backend passes `rows_to_losses`, which turns a chunk of logits into losses and, where
coefficients are given, into their gradient. Nothing here depends on how it does that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Logits of a chunk: large enough for a GEMM at full speed, small enough to be reused at once.
_CHUNK_ELEMENTS = 1 << 24
# On a GPU the head is read anew for every chunk, so that it takes a thousand rows to hide that.
_GPU_CHUNK_ELEMENTS = 1 << 27
_LEAST_ROWS = 64
_GPU_ROW_ELEMENTS = 64  # rows of logits begin at whole cache lines, as fast GEMM kernels need

# (logits [m, V], labels [m], coefficients [m] or None) -> (losses [m], gradient [m, V] or None in
# the dtype of the logits, which it may overwrite)
RowsToLosses = Callable[[Tensor, Tensor, "Tensor | None"], "tuple[Tensor, Tensor | None]"]


def chunk_rows(vocabulary: int, on_gpu: bool = False) -> int:
    elements = _GPU_CHUNK_ELEMENTS if on_gpu else _CHUNK_ELEMENTS
    return max(_LEAST_ROWS, elements // vocabulary)


def _buffer(hidden: Tensor, rows: int, vocabulary: int) -> Tensor:
    """[rows, vocabulary], on a GPU every row aligned."""
    if not hidden.is_cuda:
        return hidden.new_empty(rows, vocabulary)
    width = -(-vocabulary // _GPU_ROW_ELEMENTS) * _GPU_ROW_ELEMENTS
    return hidden.new_empty(rows, width)[:, :vocabulary]


def _counted(labels: Tensor, ignore_index: int) -> Tensor | None:
    """Indices of the rows that count, where leaving the others out is worth the copy. On a GPU
    their number would have to be waited for."""
    if labels.device.type != "cpu":
        return None
    valid = labels != ignore_index
    count = int(valid.sum())
    return None if count > 0.9 * labels.numel() else valid.nonzero().squeeze(1)


class Head:
    """The head and its adapter in the compute dtype, made once for all chunks."""

    def __init__(
        self, dtype: torch.dtype, weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None,
        bias: Tensor | None, scaling: float,
    ) -> None:  # fmt: skip
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.a = None if lora_a is None else lora_a.to(dtype)
        self.b = None if lora_b is None else lora_b.to(dtype)
        self.scaling = scaling

    def logits(self, hidden: Tensor, into: Tensor) -> tuple[Tensor, Tensor | None]:
        """[m, V], written to `into`, and S [m, r]."""
        if self.bias is None:
            z = torch.mm(hidden, self.weight.t(), out=into)
        else:
            z = torch.addmm(self.bias, hidden, self.weight.t(), out=into)
        if self.a is None or self.b is None:
            return z, None
        s = hidden @ self.a.t()
        return z.addmm_(s, self.b.t(), alpha=self.scaling), s


class Gradients:
    """Of all chunks; those of parameters are summed in fp32 (fp64 for fp64 parameters)."""

    def __init__(self, hidden: Tensor, owners: list[Tensor | None], needs: list[bool]) -> None:
        self.needs = needs
        self.owners = owners
        self.hidden = torch.empty_like(hidden) if needs[0] else hidden.new_empty(0)
        self.sums: list[Tensor | None] = [
            None if owner is None or not need else owner.new_zeros(owner.shape, dtype=_wide(owner))
            for owner, need in zip(owners, needs[1:], strict=True)
        ]

    def add(self, head: Head, dz: Tensor, hidden: Tensor, s: Tensor | None, into: Tensor) -> None:
        """`into` is where the gradient of this chunk's hidden states goes."""
        dw, da, db, dbias = self.sums
        ds = None
        if head.b is not None and (self.needs[0] or da is not None):
            ds = (dz @ head.b).mul_(head.scaling)
        if self.needs[0]:
            torch.mm(dz, head.weight, out=into)
            if ds is not None and head.a is not None:
                into.addmm_(ds, head.a)
        if dw is not None:
            dw += dz.t() @ hidden
        if da is not None and ds is not None:
            da += ds.t() @ hidden
        if db is not None and s is not None:
            db.add_(dz.t() @ s, alpha=head.scaling)
        if dbias is not None:
            dbias += dz.sum(0, dtype=dbias.dtype)

    def finished(self) -> list[Tensor]:
        grads = [self.hidden]
        for owner, total in zip(self.owners, self.sums, strict=True):
            if owner is None or total is None:
                grads.append(self.hidden.new_empty(0))
            else:
                grads.append(total.to(owner.dtype))
        return grads


class ChunkedRows:
    """`rows_to_losses` of one set of options; a backend's own subclass is called per chunk."""

    def __init__(
        self, ignore_index: int, label_smoothing: float, softcap: float, z_loss: float
    ) -> None:
        self.ignore_index, self.smoothing = ignore_index, label_smoothing
        self.softcap, self.z_loss = softcap, z_loss

    def __call__(
        self, z: Tensor, labels: Tensor, coefficients: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError


def backend_pair(
    rows: type[ChunkedRows],
) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, list[Tensor]]]]:
    """The two functions that contract.py calls, over chunks that `rows` turns into losses."""

    def linear_cross_entropy_fwd(
        hidden: Tensor, weight: Tensor, labels: Tensor, lora_a: Tensor | None,
        lora_b: Tensor | None, bias: Tensor | None, scaling: float, ignore_index: int,
        label_smoothing: float, softcap: float, z_loss: float,
    ) -> Tensor:  # fmt: skip
        """Losses [M], fp32 (fp64 for fp64 inputs)."""
        return run(
            hidden, weight, labels, lora_a, lora_b, bias, scaling, ignore_index, None,
            [False] * 5, rows(ignore_index, label_smoothing, softcap, z_loss),
        )[0]  # fmt: skip

    def linear_cross_entropy_grad(
        coefficients: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor,
        lora_a: Tensor | None, lora_b: Tensor | None, bias: Tensor | None, scaling: float,
        ignore_index: int, label_smoothing: float, softcap: float, z_loss: float,
        needs: list[bool],
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """Losses [M] and the gradients that `needs` names (hidden, weight, A, B, bias)."""
        return run(
            hidden, weight, labels, lora_a, lora_b, bias, scaling, ignore_index, coefficients,
            needs, rows(ignore_index, label_smoothing, softcap, z_loss),
        )  # fmt: skip

    return linear_cross_entropy_fwd, linear_cross_entropy_grad


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def run(
    hidden: Tensor, weight: Tensor, labels: Tensor, lora_a: Tensor | None,
    lora_b: Tensor | None, bias: Tensor | None, scaling: float, ignore_index: int,
    coefficients: Tensor | None, needs: list[bool], rows_to_losses: RowsToLosses,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Losses [M] and, where `coefficients` are given, the gradients that `needs` names."""
    losses = hidden.new_zeros(hidden.shape[0], dtype=_wide(hidden))
    head = Head(hidden.dtype, weight, lora_a, lora_b, bias, scaling)
    grads = Gradients(hidden, [weight, lora_a, lora_b, bias], needs)
    counted = _counted(labels, ignore_index)
    if counted is not None and needs[0]:
        grads.hidden.zero_()
    count = hidden.shape[0] if counted is None else counted.numel()
    step = min(count, chunk_rows(weight.shape[0], hidden.is_cuda))
    # One buffer for all chunks: fresh pages would cost as much as the losses.
    logits = _buffer(hidden, step, weight.shape[0])
    for begin in range(0, count, max(step, 1)):
        rows = slice(begin, min(begin + step, count))
        index = None if counted is None else counted[rows]
        h = hidden[rows] if index is None else hidden[index]
        y = labels[rows] if index is None else labels[index]
        g = coefficients
        if g is not None:
            g = g[rows] if index is None else g[index]
        z, s = head.logits(h, logits[: h.shape[0]])
        part, dz = rows_to_losses(z, y, g)
        if index is None:
            losses[rows] = part
        else:
            losses[index] = part
        if dz is not None:
            into = grads.hidden[rows] if index is None and needs[0] else torch.empty_like(h)
            grads.add(head, dz, h, s, into)
            if index is not None and needs[0]:
                grads.hidden[index] = into
    return losses, grads.finished()
