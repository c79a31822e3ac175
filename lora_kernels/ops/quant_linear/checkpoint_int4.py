"""GPTQ and AWQ checkpoints of four bits: which of the layouts, and whether the tensors fit it."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops.quant_linear.checkpoint_keys import Reader
from lora_kernels.ops.quant_linear.formats import AWQ, GPTQ, GPTQ_V1, PER_INT32, QuantSpec

_INT32 = (torch.int32,)
_SCALES = (torch.float16, torch.bfloat16, torch.float32)
# Every zero point 8, the middle of the range, as the two versions of GPTQ store it.
_SYMMETRIC = {-0x77777778: GPTQ, 0x77777777: GPTQ_V1}


def read(
    reader: Reader,
    dtype: torch.dtype | None,
    layout: str | None,
    bits: int | None,
    block_size: int | None,
) -> tuple[QuantSpec, dict[str, Tensor]]:
    """An int4 weight; what the arguments leave open has to follow from the tensors."""
    if bits not in (None, 4):
        reader.fail("qweight", f"is quantized to {bits} bits; accepted: 4")
    if layout not in (None, GPTQ, GPTQ_V1, AWQ):
        raise InvalidArgumentError(f"layout={layout!r}; accepted: {GPTQ}, {GPTQ_V1}, {AWQ}")
    qweight = reader.tensor("qweight", _INT32, 2)
    qzeros = reader.tensor("qzeros", _INT32, 2)
    scales = reader.tensor("scales", _SCALES, 2)
    reader.check_finite("scales", scales)
    groups, n = scales.shape
    g_idx = reader.tensor("g_idx", (torch.int32, torch.int64), 1) if reader.has("g_idx") else None
    awq = layout == AWQ
    if layout is None:
        awq = g_idx is None and qweight.shape[1] == -(-n // PER_INT32) != n
    # The number of columns is a fact of the tensors, whatever was claimed about groups.
    if awq:
        k = qweight.shape[0]
    else:
        k = qweight.shape[0] * PER_INT32 if g_idx is None else g_idx.numel()
        if g_idx is not None and -(-k // PER_INT32) != qweight.shape[0]:
            reader.fail(
                "qweight",
                f"has shape {list(qweight.shape)}; {k} entries of g_idx at 4 bits need "
                f"[{-(-k // PER_INT32)}, {n}] (other numbers of bits are not supported)",
            )
    width = -(-n // PER_INT32) if awq else n
    reader.check_shape("qweight", qweight, (qweight.shape[0], width), f"scales of {n} columns")
    why = f"scales of {list(scales.shape)}"
    reader.check_shape("qzeros", qzeros, (groups, -(-n // PER_INT32)), why)
    size = _block_size(reader, k, groups, block_size)
    if awq:
        spec = _spec(AWQ, (n, k), dtype or scales.dtype, size, False)
        return spec, {"qweight": qweight, "qzeros": qzeros, "scales": scales}
    trivial = torch.arange(k, dtype=torch.int32, device=qweight.device) // size
    act_order = False
    if g_idx is None:
        g_idx = trivial
    elif not g_idx.is_meta and k:
        low, high = int(g_idx.min()), int(g_idx.max())
        if low < 0 or high >= groups:
            reader.fail("g_idx", f"goes from {low} to {high}; scales of {groups} groups need 0 to "
                                 f"{groups - 1}")  # fmt: skip
        g_idx = trivial if high == 0 and groups > 1 else g_idx.int()  # all 0: never filled in
        act_order = not torch.equal(g_idx, trivial)
    spec = _spec(layout or _version(reader, qzeros), (n, k), dtype or scales.dtype, size, act_order)
    return spec, {"qweight": qweight, "qzeros": qzeros, "scales": scales, "g_idx": g_idx.int()}


def _spec(
    layout: str, shape: tuple[int, int], dtype: torch.dtype, size: int, act_order: bool
) -> QuantSpec:
    return QuantSpec("int4", layout, shape, dtype, size, 0, act_order, torch.int32)


def _block_size(reader: Reader, k: int, groups: int, given: int | None) -> int:
    if given is not None and given != -1 and given < 1:
        reader.fail("scales", f"has the group size {given}; accepted: -1 or an integer >= 1")
    size = max(1, k) if given == -1 else given
    if size is None:
        if groups == 0 or k % groups:
            reader.fail("scales", f"has {groups} groups for {k} columns; give the group size")
        size = max(1, k // groups)
    if -(-k // size) != groups:
        reader.fail("scales", f"has {groups} groups; {k} columns in groups of {size} need "
                              f"{-(-k // size)}")  # fmt: skip
    return min(size, max(1, k))


def _version(reader: Reader, qzeros: Tensor) -> str:
    """Which version a GPTQ weight without configuration is; only symmetric ones tell."""
    if not qzeros.is_meta and qzeros.numel():
        first = int(qzeros.reshape(-1)[0])
        if first in _SYMMETRIC and bool((qzeros == first).all()):
            return _SYMMETRIC[first]
    reader.fail(
        "qzeros", "does not tell which version it is; give layout='gptq' (zero points as they are)"
        " or 'gptq_v1' (stored less one: checkpoint_format 'gptq')",
    )  # fmt: skip
