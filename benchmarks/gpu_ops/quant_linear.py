"""quant_linear: against the dense weight in the dtype of X, and bitsandbytes.

No row of X is dequantization, one row is decoding: their share of a copy's bandwidth counts. Many
rows are training.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_ops.row import GpuOp, Judge, Keywords, Work
from benchmarks.peers import UnavailableError, load
from lora_kernels.ops import dequantize, quant_linear, quant_lora_linear
from lora_kernels.ops.quant_linear import reference
from lora_kernels.testing import (
    BudgetExceededError,
    QuantLinearInputs,
    compare,
    lora_linear_results,
    quant_linear_inputs,
    yardstick,
)
from lora_kernels.testing.oracle import LoraLinearResults

BF16, FP16 = torch.bfloat16, torch.float16


def _bytes_of(i: QuantLinearInputs) -> Judge:
    """Dequantization has no budget: the bytes of the reference or none."""
    want = reference.dequantize(i.q.parts, i.q.spec, i.dense.x.dtype)

    def check(got: dict[str, Tensor], label: str) -> object:
        if not torch.equal(got["y"], want):
            different = int((got["y"] != want).sum())
            raise BudgetExceededError(f"{i.q.format}, {label}: {different} elements differ")
        return None

    return check


def _judge(i: QuantLinearInputs) -> Judge:
    if i.dense.x.shape[0] == 0:
        return _bytes_of(i)
    needs = "xab" if i.adapter else "x"
    oracle = lora_linear_results(i.dense, torch.float64, needs=needs)
    low = yardstick(i.dense, oracle, needs)

    def check(got: dict[str, Tensor], label: str) -> object:
        made = LoraLinearResults(
            ys=[got["y"]], dx=got["dx"], dws=[], dbiases=[None],
            das=[got["da"]] if "da" in got else [], dbs=[got["db"]] if "db" in got else [],
        )  # fmt: skip
        return compare(made, oracle, low, f"{i.q.format}, {label}: ")

    return check


def _dequantize_work(i: QuantLinearInputs, provider: str) -> Work:
    dtype = i.dense.x.dtype
    if provider == "dense":
        raise UnavailableError("a dense weight needs no dequantization")
    if provider == "bitsandbytes":
        packed, state = _bitsandbytes_weight(i)
        theirs = load("bitsandbytes.functional", "dequantize_4bit")
        return Work(lambda: {"y": theirs(packed, state)})
    return Work(lambda: {"y": dequantize(i.q, dtype=dtype, backend=provider)})


def _work(i: QuantLinearInputs, provider: str) -> Work:
    d = i.dense
    if d.x.shape[0] == 0:
        return _dequantize_work(i, provider)
    named = {"x": d.x, "a": d.lora_as[0], "b": d.lora_bs[0]}
    named = {n: t.detach().requires_grad_(n == "x" or i.adapter) for n, t in named.items()}
    leaves = {n: t for n, t in named.items() if t.requires_grad}
    peer = None
    if provider == "dense":
        peer = _dense(i)
    elif provider == "bitsandbytes":
        peer = _bitsandbytes(i)

    def forward() -> dict[str, Tensor]:
        x, a, b = named["x"], named["a"], named["b"]
        if peer is not None:
            y = peer(x)
            if i.adapter:
                y = y + d.scalings[0] * F.linear(F.linear(x, a), b)
            return {"y": y}
        if not i.adapter:
            return {"y": quant_linear(x, i.q, d.biases[0], backend=provider)}
        y = quant_lora_linear(
            x, i.q, a, b, d.scalings[0], bias=d.biases[0], dropout_p=d.dropout_p, seed=d.seed,
            backend=provider,
        )  # fmt: skip
        return {"y": y}

    if peer is not None and d.dropout_p:
        raise UnavailableError(f"{provider} is called here without dropout")
    return Work(forward, leaves, {"y": d.dys[0]})


def _dense(i: QuantLinearInputs) -> Any:
    weight, bias = i.dense.weights[0], i.dense.biases[0]
    return lambda x: F.linear(x, weight, bias)


def _bitsandbytes(i: QuantLinearInputs) -> Any:
    """Its own kernels on the very same packed weight."""
    packed, state = _bitsandbytes_weight(i)
    bias, matmul = i.dense.biases[0], load("bitsandbytes", "matmul_4bit")
    return lambda x: matmul(x, packed.t(), quant_state=state, bias=bias)


def _bitsandbytes_weight(i: QuantLinearInputs) -> tuple[Tensor, Any]:
    spec = i.q.spec
    if spec.format not in ("nf4", "fp4"):
        raise UnavailableError("bitsandbytes is called here for its 4-bit formats")
    state_of = load("bitsandbytes.functional", "QuantState")
    parts = i.q.named_parts()
    nested, offset = None, None
    if spec.nested_block_size:
        offset = parts["offset"]
        nested = state_of(
            absmax=parts["nested_absmax"], code=parts["nested_code"],
            blocksize=spec.nested_block_size, dtype=torch.float32,
        )  # fmt: skip
    state = state_of(
        absmax=parts["absmax"], shape=torch.Size(spec.shape), code=parts["code"],
        blocksize=spec.block_size, quant_type=spec.format, dtype=i.dense.x.dtype, offset=offset,
        state2=nested,
    )  # fmt: skip
    return parts["packed"].view(-1, 1), state


def _problem(i: QuantLinearInputs) -> Keywords:
    d, spec = i.dense, i.q.spec
    return {
        "M": d.x.shape[0], "K": d.x.shape[1], "N": spec.shape[0],
        "rank": d.lora_as[0].shape[0] if i.adapter else 0, "format": spec.format,
        "layout": spec.layout, "block_size": spec.block_size,
        "nested": spec.nested_block_size > 0, "act_order": spec.act_order, "dtype": d.x.dtype,
        "dropout_p": d.dropout_p,
    }  # fmt: skip


def _case(M: int, K: int, N: int, rank: int, format: str, **options: Any) -> Keywords:
    return {
        "M": M, "K": K, "N": N, "rank": rank, "dtype": BF16, "format": format, "bias": False,
        **options,
    }  # fmt: skip


ROW = GpuOp(
    name="quant_linear",
    small=(
        {"M": 33, "K": 128, "N": 96, "rank": 8, "dtype": BF16, "format": "nf4",
         "double_quant": True},
        {"M": 1, "K": 192, "N": 80, "rank": 0, "dtype": BF16, "format": "nf4"},
        {"M": 5, "K": 256, "N": 64, "rank": 4, "dtype": FP16, "format": "int4"},
        {"M": 70, "K": 96, "N": 40, "rank": 16, "dtype": BF16, "format": "int8",
         "dropout_p": 0.25},
        {"M": 0, "K": 130, "N": 33, "rank": 0, "dtype": BF16, "format": "nf4"},
        {"M": 17, "K": 70, "N": 45, "rank": 5, "dtype": BF16, "format": "fp8"},
        {"M": 9, "K": 160, "N": 77, "rank": 20, "dtype": BF16, "format": "int4_awq",
         "block_size": 32, "adapter_dtype": torch.float32},
        {"M": 100, "K": 384, "N": 136, "rank": 3, "dtype": FP16, "format": "fp8_block"},
    ),
    cases={
        "1×4096×4096 nf4 bfloat16": _case(1, 4096, 4096, 0, "nf4"),
        "8192×4096×4096 nf4 nested r16 bfloat16": _case(
            8192, 4096, 4096, 16, "nf4", double_quant=True
        ),
        "1×4096×4096 nf4 nested r16 bfloat16": _case(1, 4096, 4096, 16, "nf4", double_quant=True),
        "dequantize 4096×4096 nf4 nested bfloat16": _case(0, 4096, 4096, 0, "nf4"),
        "1×4096×14336 nf4 bfloat16": _case(1, 4096, 14336, 0, "nf4"),
        "64×4096×4096 nf4 bfloat16": _case(64, 4096, 4096, 0, "nf4"),
        "dequantize 4096×4096 int4 bfloat16": _case(0, 4096, 4096, 0, "int4"),
        "1×4096×14336 int4 bfloat16": _case(1, 4096, 14336, 0, "int4"),
        "8×4096×14336 nf4 bfloat16": _case(8, 4096, 14336, 0, "nf4"),
        "64×4096×4096 nf4 nested r16 bfloat16": _case(64, 4096, 4096, 16, "nf4", double_quant=True),
        "2048×4096×14336 int4 r16 bfloat16": _case(2048, 4096, 14336, 16, "int4"),
        "1×4096×4096 int8 bfloat16": _case(1, 4096, 4096, 0, "int8"),
        "1×4096×4096 fp8 bfloat16": _case(1, 4096, 4096, 0, "fp8"),
    },
    inputs=quant_linear_inputs,
    judge=_judge,
    work=_work,
    problem=_problem,
    peers=("dense", "bitsandbytes"),
)  # fmt: skip
