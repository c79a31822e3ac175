"""Public functions of the op: validation, autocast, flattening."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.ops import _dispatch
from lora_kernels.ops._eager import apply_function, library_call
from lora_kernels.ops.lora_linear import autograd, contract, validate


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    shrunk: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``x W^T + bias + scaling * dropout(x) A^T B^T``, fused, with all gradients.

    Args:
        x: ``[..., in_features]``, any strides, zero rows allowed; fp32, bf16, fp16 or fp64.
        weight: ``[out_features, in_features]`` in the dtype of x. Usually frozen.
        lora_a: ``[r, in_features]``, any r >= 1, any floating dtype (fp32 adapters over a bf16
            base get fp32 gradients from fp32 accumulators; x is never converted).
        lora_b: ``[out_features, r]``, as lora_a.
        scaling: a finite number, read at run time (``alpha / r``, say).
        bias: ``[out_features]`` or None.
        dropout_p: probability of dropping an element of x on the adapter path, 0 to 1. Counter
            based (Philox4x32-7 on seed, row, column): nothing is stored, a recomputed forward
            drops the same elements. Resolution 1/65536.
        seed: int or int64 tensor of one element; None draws one from torch's generator.
        shrunk: ``[..., r]``, the product x A^T where somebody has it already (a norm or an
            activation that made x), in the (autocast) dtype of x, any strides; without dropout
            only. It is taken as a value and has no gradient of its own: those of x, A and B are
            the whole layer's. It is not checked against x.
        backend: None or ``auto``, ``reference``, ``aten``, ``cpu``, ``triton``, ``cuda``. A
            backend asked for by name never falls back.

    Under ``torch.autocast`` x is converted to the autocast dtype, as nn.Linear would.

    Returns:
        ``[..., out_features]`` in the (autocast) dtype of x.

    Raises:
        InvalidArgumentError: shape, dtype, device or value of an argument; the message names it.
            Also a `shrunk` that requires a gradient.
        BackendUnavailableError: `backend` was given and cannot run this problem.

    Source: Hu et al. 2021, arXiv 2106.09685; formulas and gradients in reference.py.
    """
    return grouped_lora_linear(
        x, (weight,), (lora_a,), (lora_b,), (scaling,),
        biases=(bias,), dropout_p=dropout_p, seed=seed, shrunk=shrunk, backend=backend,
    )[0]  # fmt: skip


def grouped_lora_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor | None],
    lora_bs: Sequence[Tensor | None],
    scalings: Sequence[float],
    *,
    biases: Sequence[Tensor | None] | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    shrunk: Tensor | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """Several LoRA linears of one input (q/k/v, gate/up): x is read once, dX summed once.

    Args and errors as :func:`lora_linear`, one list entry per member; out_features and r may
    differ between members. Each member drops its own elements of x, as separate layers would.
    A member without an adapter has None in lora_as and lora_bs (or a rank of 0); one at least has
    an adapter. The kernels of triton want one for every member, cuda where there is dropout.
    `shrunk` is ``[..., sum of ranks]``, the members' products side by side.

    Returns:
        One ``[..., out_features_g]`` per member.
    """
    biases = [None] * len(weights) if biases is None else list(biases)
    if backend is None and shrunk is None and seed is None and dropout_p == 0.0:
        ys = _eager(x, weights, lora_as, lora_bs, scalings, biases)
        if ys is not None:
            return ys
    validate.check_dropout(dropout_p)
    validate.check_lengths(
        weights=weights, lora_as=lora_as, lora_bs=lora_bs, scalings=scalings, biases=biases
    )
    lora_as, lora_bs = validate.with_empty_adapters(weights, lora_as, lora_bs)
    for scaling in scalings:
        validate.check_scaling(scaling)
    autocast = (
        isinstance(x, Tensor)
        and x.device.type != "meta"
        and torch.is_autocast_enabled(x.device.type)
    )
    validate.check_tensors(x, weights, lora_as, lora_bs, biases, autocast)
    if autocast and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    name = _dispatch.requested_backend(backend)
    if shrunk is not None:
        rank = sum(a.shape[0] for a in lora_as)
        validate.check_given("shrunk", shrunk, x, x.shape[:-1], rank, dropout_p)
        shrunk = _rows(shrunk)
    rows = _rows(x)
    seed = validate.make_seed(seed, dropout_p, x.device)
    run_time_scalings = None
    if torch.compiler.is_compiling():
        if x.device.type == "cpu":
            run_time_scalings = _scaling_tensor(scalings)
            scalings = (1.0,) * len(weights)
        tensors = (x, *weights, *lora_as, *lora_bs, *biases)
        if not any(t is not None and t.requires_grad for t in tensors):
            # Dynamo mistakes the arguments of an autograd.Function that nothing differentiates.
            ys, _ = contract.fwd(
                rows, list(weights), list(lora_as), list(lora_bs), biases, list(scalings),
                float(dropout_p), seed, name, run_time_scalings, shrunk,
            )  # fmt: skip
            return [_unflatten(y, x) for y in ys]
    outputs = apply_function(
        autograd.LoraLinearFunction,
        rows,
        seed,
        tuple(scalings),
        float(dropout_p),
        name,
        run_time_scalings,
        shrunk,
        *weights, *lora_as, *lora_bs, *biases,
    )  # fmt: skip
    return [_unflatten(y, x) for y in outputs[:-1]]


def _eager(
    x: Tensor, weights: Sequence[Tensor], lora_as: Sequence[Tensor | None],
    lora_bs: Sequence[Tensor | None], scalings: Sequence[float], biases: Sequence[Tensor | None],
) -> list[Tensor] | None:  # fmt: skip
    """What `auto` computes without gradients on the CPU, in one step of the library; None: the
    library declines. The long way costs more than a token takes to compute."""
    if torch.compiler.is_compiling():
        return None
    call = library_call("lora_linear_eager")
    if call is None:
        return None
    ys: list[Tensor] | None = call(
        x, tuple(weights), tuple(lora_as), tuple(lora_bs), tuple(scalings), tuple(biases)
    )
    return ys


def _rows(t: Tensor) -> Tensor:
    return t.flatten(0, -2) if t.dim() > 1 else t.unsqueeze(0)


def _unflatten(y: Tensor, x: Tensor) -> Tensor:
    """y [M, N] with the leading shape of x. Never a view to autograd, as the result of nn.Linear is
    none: FSDP2 loses its hook on a view that is then changed in place."""
    if x.dim() == 2:
        return y
    return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[-1]))


def _scaling_tensor(scalings: Sequence[float]) -> Tensor:
    """[n] fp64 on the CPU. Products of ones: the form that keeps a traced float symbolic."""
    return torch.stack([torch.ones((), dtype=torch.float64) * s for s in scalings])
