"""quant_linear against the fp64 oracle of the linear layer on the dequantized weight.

The weight of oracle and yardstick is what the reference dequantizes in the dtype of x, so the error
of quantization, hundreds of times larger than a kernel's, hides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.quant_linear import (
    QuantTensor,
    quant_linear,
    quant_lora_linear,
    quantize,
    reference,
)
from lora_kernels.testing.budget import Margin
from lora_kernels.testing.check import compare
from lora_kernels.testing.inputs import LoraLinearInputs, lora_linear_inputs
from lora_kernels.testing.oracle import LoraLinearResults, lora_linear_results, yardstick


@dataclass(frozen=True)
class QuantLinearInputs:
    """A quantized weight, and the arguments of the linear layer whose weight is its values."""

    q: QuantTensor
    dense: LoraLinearInputs
    adapter: bool


def quant_linear_inputs(
    M: int | Sequence[int] = 7,
    K: int = 20,
    N: int = 33,
    rank: int = 4,
    dtype: torch.dtype = torch.float32,
    *,
    format: str = "nf4",
    block_size: int | None = None,
    double_quant: bool | None = None,
    layout: str = "contiguous",
    **options: Any,
) -> QuantLinearInputs:
    """Random inputs, scaled as :func:`lora_linear_inputs`; rank 0 leaves the adapter out.

    Args:
        format, block_size, double_quant: as :func:`lora_kernels.ops.quantize`.
        layout: of every tensor but the weight.
        **options: further keywords of :func:`lora_linear_inputs`.
    """
    if rank == 0:
        options["scaling"] = 0.0
    made = lora_linear_inputs(M, K, N, max(rank, 1), dtype, **options)
    q = quantize(made.weights[0], format, block_size, double_quant)
    dense = replace(made, weights=[reference.dequantize(q.parts, q.spec, dtype)])
    return QuantLinearInputs(q, dense.with_layout(layout), rank > 0)


def quant_linear_op(
    inputs: QuantLinearInputs, backend: str | None, needs: str = "xabc"
) -> LoraLinearResults:
    """Forward and backward on one backend; `needs` as in :func:`lora_linear_op`, without w."""
    i = inputs.dense

    def leaf(t: Tensor, key: str) -> Tensor:
        return t.detach().requires_grad_(key in needs)

    x, a, b = leaf(i.x, "x"), leaf(i.lora_as[0], "a"), leaf(i.lora_bs[0], "b")
    bias = None if i.biases[0] is None else leaf(i.biases[0], "c")
    if inputs.adapter:
        y = quant_lora_linear(
            x, inputs.q, a, b, i.scalings[0],
            bias=bias, dropout_p=i.dropout_p, seed=i.seed, backend=backend,
        )  # fmt: skip
    else:
        y = quant_linear(x, inputs.q, bias, backend=backend)
    if y.requires_grad:
        y.backward(i.dys[0].to(y.dtype))
    return LoraLinearResults(
        ys=[y.detach()],
        dx=i.x.new_empty(0) if x.grad is None else x.grad,
        dws=[],
        das=[] if a.grad is None else [a.grad],
        dbs=[] if b.grad is None else [b.grad],
        dbiases=[None if bias is None else bias.grad],
    )


def check_quant_linear(
    inputs: QuantLinearInputs, backend: str | None, needs: str = "xabc"
) -> dict[str, Margin]:
    """The op against oracle and yardstick; raises BudgetExceededError, returns the margins."""
    oracle = lora_linear_results(inputs.dense, torch.float64, needs=needs)
    actual = quant_linear_op(inputs, backend, needs)
    label = f"{inputs.q.format}, {backend}: "
    return compare(actual, oracle, yardstick(inputs.dense, oracle, needs), label)
