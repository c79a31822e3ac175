"""Inputs that make a wrong LoRA term visible.

Random tensors scaled so that the adapter's update is as large as the frozen layer's output:
with B = 0, or an update of one per cent, a kernel without any LoRA term would pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# Around a slice lie large numbers: whoever reads them gives a wrong result. They are finite
# because torch's own bf16 GEMM on the CPU reads past the end of a row and multiplies by zero.
PADDING = 3e4
LAYOUTS = ("contiguous", "sliced", "strided", "permuted", "misaligned")


def relayout(t: Tensor, layout: str, padding: float = PADDING) -> Tensor:
    """The same values in other strides.

    ``sliced`` rows of a wider buffer; ``strided`` every second element; ``permuted`` the last
    two axes swapped in storage; ``misaligned`` one element after an aligned address. The
    memory around the values holds `padding`.
    """
    if layout == "contiguous" or t.dim() == 0:
        return t.contiguous()
    if layout == "sliced":
        view = t.new_full((*t.shape[:-1], t.shape[-1] + 5), padding)[..., 3:-2]
    elif layout == "strided":
        view = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), padding)[..., ::2]
    elif layout == "permuted":
        if t.dim() < 2:
            return t.contiguous()
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif layout == "misaligned":
        view = t.new_full((t.numel() + 1,), padding)[1:].view(t.shape)
    else:
        raise ValueError(f"layout={layout!r} is unknown; accepted: {', '.join(LAYOUTS)}")
    return view.copy_(t)


@dataclass(frozen=True)
class LoraLinearInputs:
    """Arguments of grouped_lora_linear and the output gradients dys, one per group member."""

    x: Tensor
    weights: list[Tensor]
    lora_as: list[Tensor]
    lora_bs: list[Tensor]
    biases: list[Tensor | None]
    scalings: list[float]
    dropout_p: float
    seed: int | None
    dys: list[Tensor]

    def with_layout(self, layout: str, padding: float = PADDING) -> LoraLinearInputs:
        """The same values, every tensor in another layout."""

        def move(ts: Sequence[Any]) -> list[Any]:
            return [None if t is None else relayout(t, layout, padding) for t in ts]

        return replace(
            self,
            x=relayout(self.x, layout, padding),
            weights=move(self.weights),
            lora_as=move(self.lora_as),
            lora_bs=move(self.lora_bs),
            biases=move(self.biases),
            dys=move(self.dys),
        )


def lora_linear_inputs(
    M: int | Sequence[int] = 7,
    K: int = 20,
    N: int | Sequence[int] = 33,
    rank: int | Sequence[int] = 4,
    dtype: torch.dtype = torch.float32,
    *,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = True,
    scaling: float | Sequence[float] = 0.7,
    dropout_p: float = 0.0,
    seed: int | None = 1234,
    layout: str = "contiguous",
    generator_seed: int = 0,
    device: str = "cpu",
) -> LoraLinearInputs:
    """Random inputs with W x, the update s B A x and the bias all of unit size.

    Args:
        M: rows, or the leading shape of x, e.g. ``(2, 3)``.
        N: out_features; a sequence makes a group whose members share x.
        rank: one rank or one per member (0: a member without an adapter); likewise `scaling`.
        dtype: of x, W, bias and dY. `adapter_dtype` of A and B, the same when None.
        layout: one of :data:`LAYOUTS`, for every tensor.
        device: where the values are drawn; each kind of device has its own generator.
    """
    lead = (M,) if isinstance(M, int) else tuple(M)
    ns = (N,) if isinstance(N, int) else tuple(N)
    ranks = (rank,) * len(ns) if isinstance(rank, int) else tuple(rank)
    scalings = [scaling] * len(ns) if isinstance(scaling, (int, float)) else list(scaling)
    generator = torch.Generator(device).manual_seed(generator_seed)

    def normal(shape: Sequence[int], std: float, dt: torch.dtype) -> Tensor:
        t = torch.randn(*shape, generator=generator, dtype=torch.float64, device=device) * std
        return t.to(dt)

    adapter_dtype = adapter_dtype or dtype
    made = LoraLinearInputs(
        x=normal((*lead, K), 1.0, dtype),
        weights=[normal((n, K), K**-0.5, dtype) for n in ns],
        lora_as=[normal((r, K), K**-0.5, adapter_dtype) for r in ranks],
        lora_bs=[
            normal((n, r), max(r, 1) ** -0.5 / (abs(s) or 1.0), adapter_dtype)
            for n, r, s in zip(ns, ranks, scalings, strict=True)
        ],
        biases=[normal((n,), 1.0, dtype) if bias else None for n in ns],
        scalings=scalings,
        dropout_p=dropout_p,
        seed=seed,
        dys=[normal((*lead, n), 1.0, dtype) for n in ns],
    )
    return made if layout == "contiguous" else made.with_layout(layout)
