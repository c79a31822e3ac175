"""A small run of every op on a backend against the fp64 oracle: seconds, not a test suite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

GPU_BACKENDS = ("triton", "cuda")  # checked on tensors of the GPU where there is one
# Shapes that `auto` is asked about: a layer of a mid-sized model, 2048 tokens.
TYPICAL: dict[str, dict[str, dict[str, Any]]] = {
    "attention": {
        dtype: {"B": 1, "S": 2048, "H": 32, "Hk": 8, "D": 64, "causal": True, "dtype": dtype}
        for dtype in ("float32", "bfloat16")
    },
    "lora_linear": {
        dtype: {"M": 2048, "K": 2048, "N": 2048, "rank": 16, "dtype": dtype}
        for dtype in ("float32", "bfloat16")
    },
    "linear_cross_entropy": {
        dtype: {"M": 2048, "K": 2048, "V": 50000, "rank": 16, "dtype": dtype}
        for dtype in ("float32", "bfloat16")
    },
    "quant_linear": {
        dtype: {"M": 2048, "K": 2048, "N": 2048, "rank": 16, "nested": True, "dtype": dtype}
        for dtype in ("float32", "bfloat16")
    },
    "dora_linear": {
        dtype: {"M": 2048, "K": 2048, "N": 2048, "rank": 16, "dtype": dtype}
        for dtype in ("float32", "bfloat16")
    },
    "gated_activation": {
        dtype: {"M": 2048, "N": 2048, "dtype": dtype} for dtype in ("float32", "bfloat16")
    },
    "rms_norm": {
        dtype: {"M": 2048, "K": 2048, "R": 48, "dtype": dtype} for dtype in ("float32", "bfloat16")
    },
    "lora_qkv": {
        dtype: {"M": 2048, "K": 2048, "H": 32, "Hk": 8, "D": 64, "dtype": dtype}
        for dtype in ("float32", "bfloat16")
    },
    "rope": {
        dtype: {"B": 1, "S": 2048, "H": 32, "Hk": 8, "D": 64, "dtype": dtype}
        for dtype in ("float32", "bfloat16")
    },
}


def self_check(op: str, backend: str) -> str:
    """``ok``, or what went wrong in one line."""
    try:
        _CHECKS[op](backend)
    except Exception as e:
        return " ".join(f"{type(e).__name__}: {e}".split())
    return "ok"


def _device(backend: str) -> str:
    return "cuda" if backend in GPU_BACKENDS and torch.cuda.is_available() else "cpu"


def _lora_linear(backend: str) -> None:
    from lora_kernels.ops._registry import find
    from lora_kernels.testing import check_lora_linear, lora_linear_inputs

    spec = find("lora_linear")
    device = _device(backend)
    shapes: dict[str, Any] = {"M": 70, "K": 96, "N": (80, 33), "rank": (8, 5)}
    for dtype in (torch.float32, torch.bfloat16):
        if not spec.supports(backend, spec.problem(**shapes, dtype=dtype, device=device))[0]:
            continue
        # Odd sizes reach the edges of every tile; dropout reaches the counter.
        for dropout_p in (0.0, 0.25):
            inputs = lora_linear_inputs(**shapes, dtype=dtype, dropout_p=dropout_p, device=device)
            check_lora_linear(inputs, backend)


def _quant_linear(backend: str) -> None:
    from lora_kernels.testing import check_quant_linear, moved, quant_linear_inputs

    for name in ("nf4", "int8", "int4", "fp8"):
        for dtype, dropout_p in ((torch.float32, 0.25), (torch.bfloat16, 0.0)):
            inputs = quant_linear_inputs(70, 96, 81, 5, dtype, format=name, dropout_p=dropout_p)
            check_quant_linear(moved(inputs, _device(backend)), backend)
        # A few rows, as in decoding, and more than one tile of them.
        for shape in ((3, 160, 72, 5), (130, 96, 81, 5)):
            inputs = quant_linear_inputs(*shape, torch.bfloat16, format=name)
            check_quant_linear(moved(inputs, _device(backend)), backend)


def _dora_linear(backend: str) -> None:
    from lora_kernels.testing import check_dora_linear, dora_linear_inputs

    for dtype, dropout_p in ((torch.float32, 0.25), (torch.bfloat16, 0.0)):
        check_dora_linear(dora_linear_inputs(70, 96, 81, 5, dtype, dropout_p=dropout_p), backend)


def _linear_cross_entropy(backend: str) -> None:
    from lora_kernels.testing import (
        check_linear_cross_entropy,
        linear_cross_entropy_inputs,
        moved,
    )

    for dtype in (torch.float32, torch.bfloat16):
        inputs = linear_cross_entropy_inputs((70,), 96, 1001, 5, dtype, label_smoothing=0.1)
        check_linear_cross_entropy(moved(inputs, _device(backend)), backend)


def _attention(backend: str) -> None:
    from lora_kernels.testing import attention_inputs, check_attention, moved

    for dtype in (torch.float32, torch.bfloat16):
        plain: dict[str, Any] = {"S": 70, "Hk": 2, "dtype": dtype, "causal": True}
        more: dict[str, Any] = {"window": (40, 0), "softcap": 3.0, "sinks": True}
        more |= {"dropout_p": 0.25, "seed": 7}
        for options in (plain, {**plain, **more}):
            check_attention(moved(attention_inputs(**options), _device(backend)), backend)


def _gated_activation(backend: str) -> None:
    from lora_kernels.ops._registry import find
    from lora_kernels.testing import check_gated_activation, gated_activation_inputs, moved

    kinds = ["silu", "gelu", "gelu_tanh", "relu", "relu_squared"]
    spec, device = find("gated_activation"), _device(backend)
    for dtype in (torch.float32, torch.bfloat16):
        if not spec.supports(backend, spec.problem(M=70, N=33, dtype=dtype, device=device))[0]:
            continue
        for kind in kinds:
            inputs = gated_activation_inputs((70, 33), kind, dtype=dtype)
            check_gated_activation(moved(inputs, device), backend)


def _rms_norm(backend: str) -> None:
    from lora_kernels.ops._registry import find
    from lora_kernels.testing import check_rms_norm, moved, rms_norm_inputs

    spec, device = find("rms_norm"), _device(backend)
    for dtype in (torch.float32, torch.bfloat16):
        if not spec.supports(backend, spec.problem(M=70, K=33, dtype=dtype, device=device))[0]:
            continue
        plain = rms_norm_inputs((70, 33), ranks=(8, 5), dtype=dtype)
        for inputs in (plain, rms_norm_inputs((3, 70, 96), offset=1.0, dtype=dtype)):
            check_rms_norm(moved(inputs, device), backend)


def _rope(backend: str) -> None:
    from lora_kernels.testing import check_rope, moved, rope_inputs

    for dtype in (torch.float32, torch.bfloat16):
        partial = rope_inputs((2, 70), R=12, tables="cache", dtype=dtype)
        for inputs in (partial, rope_inputs((70,), interleaved=True, dtype=dtype)):
            check_rope(moved(inputs, _device(backend)), backend)


def _lora_qkv(backend: str) -> None:
    from lora_kernels.testing import check_lora_qkv, lora_qkv_inputs, moved

    for dtype in (torch.float32, torch.bfloat16):
        partial = lora_qkv_inputs((2, 33), 40, R=6, tables="cache", dtype=dtype)
        for inputs in (partial, lora_qkv_inputs((37,), 64, joint=True, dtype=dtype)):
            check_lora_qkv(moved(inputs, _device(backend)), backend)


_CHECKS: dict[str, Callable[[str], None]] = {
    "attention": _attention,
    "dora_linear": _dora_linear,
    "gated_activation": _gated_activation,
    "linear_cross_entropy": _linear_cross_entropy,
    "lora_linear": _lora_linear,
    "lora_qkv": _lora_qkv,
    "quant_linear": _quant_linear,
    "rms_norm": _rms_norm,
    "rope": _rope,
}
