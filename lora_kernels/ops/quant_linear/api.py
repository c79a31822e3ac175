"""Public functions of the op: quantize, dequantize, and the linear layer on a quantized weight."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from lora_kernels.ops import _dispatch
from lora_kernels.ops._eager import apply_function
from lora_kernels.ops.quant_linear import autograd, contract, cpu, encode, validate
from lora_kernels.ops.quant_linear.formats import QuantSpec
from lora_kernels.ops.quant_linear.problem import QuantLinearProblem, choose
from lora_kernels.ops.quant_linear.quant_tensor import QuantTensor


def quantize(
    w: Tensor,
    format: str = "nf4",
    block_size: int | None = None,
    double_quant: bool | None = None,
    *,
    quant_storage: torch.dtype | None = None,
    name: str | None = None,
) -> QuantTensor:
    """`w` rounded to the nearest codes of a format. On the device of `w`, deterministic.

    Args:
        w: ``[out_features, in_features]`` (nf4 and fp4: any shape), fp32, bf16, fp16 or fp64.
        format: ``nf4``, ``fp4`` (bitsandbytes 4-bit), ``int8`` (row-wise, as Linear8bitLt),
            ``int4`` (GPTQ layout), ``int4_awq``, ``fp8`` or ``fp8_row`` (e4m3fn, one scale per
            row), ``fp8_tensor``, ``fp8_block``. int4 is plain rounding to nearest: it has the
            layout of GPTQ and AWQ, not their calibration.
        block_size: elements per scale. nf4, fp4: 32 to 4096, a power of two (None: 64). int4:
            any >= 1 along K, -1 for all of K (None: 128). fp8_block: side of a square (None: 128).
        double_quant: nf4 and fp4 only: 8-bit statistics (None: yes).
        quant_storage: nf4 and fp4 only: dtype under which :meth:`QuantTensor.state_dict` gives the
            packed bytes, as bitsandbytes' bnb_4bit_quant_storage. None: uint8.
        name: what messages call the tensor.

    Raises:
        InvalidArgumentError: an argument out of range, one that the format does not have, or NaN or
            infinity in `w`.

    Source: formats.py.
    """
    what = "w" if name is None else f"tensor {name!r}"
    validate.check_weight(w, what)
    spec = validate.make_spec(
        tuple(w.shape), w.dtype, format, block_size, double_quant, quant_storage, what
    )
    parts = _kernel_parts(w.detach(), spec)
    return QuantTensor(spec, encode.quantize(w.detach(), spec) if parts is None else parts)


def _kernel_parts(w: Tensor, spec: QuantSpec) -> tuple[Tensor, ...] | None:
    """The same bytes, sooner: by the CPU library, or by the GPU kernels that would dequantize
    them, which need evidence to be chosen. None where there are none for this format."""
    if w.device.type != "cuda":
        return None if _dispatch.disabled("quant_linear", "cpu") else cpu.quantize(w, spec)
    name, _ = choose(QuantLinearProblem.of_dequantize(spec, w.dtype, w.device.type), "auto")
    if name not in ("cuda", "triton"):
        return None
    backend = importlib.import_module(f"lora_kernels.ops.quant_linear.{name}")
    parts: tuple[Tensor, ...] | None = backend.quantize(w, spec)
    return parts


def dequantize(
    q: QuantTensor, *, dtype: torch.dtype | None = None, backend: str | None = None
) -> Tensor:
    """The values of `q` in `dtype` (None: that of `q`), contiguous; fp32 math, one rounding.

    Raises:
        InvalidArgumentError: `q` is no QuantTensor, or `dtype` no floating dtype.
        BackendUnavailableError: `backend` was given and cannot run this.
    """
    q = validate.check_quant_tensor("dequantize", q)
    dtype = q.dtype if dtype is None else dtype
    validate.check_dtype("dequantize", dtype)
    name = _dispatch.requested_backend(backend)
    return contract.dequantize(list(q.parts), q.spec.key, dtype, name)


def quant_linear(
    x: Tensor, q: QuantTensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """``x W^T + bias`` with W the weight that `q` stands for, differentiable in x and bias.

    Args:
        x: ``[..., in_features]``, any strides, zero rows allowed; fp32, bf16, fp16 or fp64. It
            decides the dtype of the computation: W is dequantized to it, sums are fp32.
        q: ``[out_features, in_features]``.
        bias: ``[out_features]``, any floating dtype, or None.
        backend: None or ``auto``, ``reference``, ``aten``, ``cpu``, ``triton``, ``cuda``. A
            backend asked for by name never falls back.

    Under ``torch.autocast`` x is converted to the autocast dtype, as nn.Linear would.

    Returns:
        ``[..., out_features]`` in the (autocast) dtype of x.

    Raises:
        InvalidArgumentError: shape, dtype, device or value of an argument; the message names it.
        BackendUnavailableError: `backend` was given and cannot run this problem.
    """
    return _linear("quant_linear", x, q, bias, None, None, 1.0, 0.0, None, backend)


def quant_lora_linear(
    x: Tensor,
    q: QuantTensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``x W^T + bias + scaling * dropout(x) A^T B^T`` on a quantized W, with all gradients.

    Args:
        x, q, bias, backend: as :func:`quant_linear`.
        lora_a: ``[r, in_features]``, any r >= 1, any floating dtype (fp32 adapters get fp32
            gradients; x is never converted).
        lora_b: ``[out_features, r]``, as lora_a.
        scaling: a finite number, read at run time (``alpha / r``, say).
        dropout_p, seed: dropout of x on the adapter's path; the same draws as
            :func:`lora_kernels.ops.lora_linear` makes of the same seed.

    Returns, raises:
        As :func:`quant_linear`.

    Source: Dettmers et al. 2023, arXiv 2305.14314 (QLoRA); formulas in reference.py.
    """
    for argument, t in (("lora_a", lora_a), ("lora_b", lora_b)):
        validate.check_present("quant_lora_linear", argument, t)
    return _linear(
        "quant_lora_linear", x, q, bias, lora_a, lora_b, scaling, dropout_p, seed, backend
    )


def _linear(
    op: str,
    x: Tensor,
    q: QuantTensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: int | Tensor | None,
    backend: str | None,
) -> Tensor:
    q = validate.check_quant_tensor(op, q)
    validate.check_dropout(op, dropout_p)
    validate.check_scaling(op, scaling)
    validate.check_tensors(op, x, q, bias, lora_a, lora_b)
    device = x.device.type
    if device != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    name = _dispatch.requested_backend(backend)
    rows = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    drawn = validate.make_seed(op, seed, dropout_p, x.device)
    run_time = None
    spec, parts = q.spec.key, q.parts
    if torch.compiler.is_compiling():
        if device == "cpu" and lora_a is not None:
            # A product of ones: the form that keeps a traced float symbolic.
            run_time, scaling = torch.ones((), dtype=torch.float64) * scaling, 1.0
        if not any(t is not None and t.requires_grad for t in (x, bias, lora_a, lora_b)):
            # Dynamo mistakes the arguments of an autograd.Function that nothing differentiates.
            y, _ = contract.fwd(
                rows, list(parts), spec, bias, lora_a, lora_b, scaling, float(dropout_p), drawn,
                name, run_time,
            )  # fmt: skip
            return _unflatten(y, x)
    y, _ = apply_function(
        autograd.QuantLinearFunction,
        rows,
        bias,
        lora_a,
        lora_b,
        spec,
        scaling,
        float(dropout_p),
        drawn,
        name,
        run_time,
        *parts,
    )
    return _unflatten(y, x)


def _unflatten(y: Tensor, x: Tensor) -> Tensor:
    """y [M, N] with the leading shape of x. Not a view to autograd, as the result of nn.Linear is
    none: FSDP2 loses its hook on a view that is then changed in place."""
    return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[-1]))
