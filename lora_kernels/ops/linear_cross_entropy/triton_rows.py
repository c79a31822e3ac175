# mypy: ignore-errors
"""A chunk of logits turned into losses and, in place, into their gradient, by a Triton kernel.

Work       one program per row. First walk: maximum and sum of exponentials as they come, and the
           plain sum where there is label smoothing. Second walk, where a gradient is wanted: the
           exponentials again, now against the log-sum-exp. Rows that do not count are not read.
Traffic    logits read once, for a gradient twice (the second time mostly from the cache), and
           written once; no fp32 copy.
Rounding   fp32 throughout; the gradient is rounded once to the dtype of the logits.
Limits     rows of any stride; a label out of range gives NaN, as a kernel cannot raise.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(u):
    """(e^2u - 1) / (e^2u + 1); its series where that would cancel."""
    e = tl.exp(2.0 * tl.minimum(u, 20.0))
    square = u * u
    series = 2.0 / 15.0 - square * (17.0 / 315.0 - square * (62.0 / 2835.0))
    series = u * (1.0 - square * (1.0 / 3.0 - square * series))
    return tl.where(tl.abs(u) < 0.3, series, (e - 1.0) / (e + 1.0))


@triton.jit
def _logits(row, at, V, cap, MASKED: tl.constexpr, SOFTCAP: tl.constexpr):
    """fp32 logits of columns `at`, -inf past V, and the slope of the softcap there."""
    if MASKED:
        v = tl.load(row + at, mask=at < V, other=0.0).to(tl.float32)
    else:
        v = tl.load(row + at).to(tl.float32)
    slope = v
    if SOFTCAP:
        t = _tanh(v / cap)
        v = cap * t
        slope = 1.0 - t * t
    if MASKED:
        v = tl.where(at < V, v, -float("inf"))
    return v, slope


@triton.jit
def _added(v, top, total):
    """(maximum, sum of exponentials below it) with the columns of v; a row may begin with -inf."""
    higher = tl.maximum(top, tl.max(v, 0))
    base = tl.where(higher == -float("inf"), 0.0, higher)
    return higher, total * tl.exp(top - base) + tl.sum(tl.exp(v - base), 0)


@triton.jit
def _write(
    row, at, V, label, cap, lse, scale, at_label, everywhere,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    v, slope = _logits(row, at, V, cap, MASKED, SOFTCAP)
    dz = scale * tl.exp(v - lse) - everywhere - tl.where(at == label, at_label, 0.0)
    if SOFTCAP:
        dz = dz * slope
    dz = dz.to(row.dtype.element_ty)
    if MASKED:
        tl.store(row + at, dz, mask=at < V)
    else:
        tl.store(row + at, dz)


@triton.jit(do_not_specialize=["V", "ignore_index"])
def rows_to_losses(
    z, labels, coefficients, losses, V, stride, ignore_index, smoothing, cap, z_loss,
    BLOCK: tl.constexpr, GRAD: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHED: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    row = z + place * stride
    label = tl.load(labels + place)
    lane = tl.arange(0, BLOCK)
    whole = V // BLOCK * BLOCK
    if label == ignore_index:
        tl.store(losses + place, 0.0)
        if GRAD:
            nothing = tl.zeros((BLOCK,), row.dtype.element_ty)
            for start in tl.range(0, whole, BLOCK):
                tl.store(row + start + lane, nothing)
            tl.store(row + whole + lane, nothing, mask=whole + lane < V)
    else:
        top = -float("inf")
        total = 0.0
        plain = 0.0
        for start in tl.range(0, whole, BLOCK):
            v, _ = _logits(row, start + lane, V, cap, False, SOFTCAP)
            top, total = _added(v, top, total)
            if SMOOTHED:
                plain += tl.sum(v, 0)
        if whole < V:
            v, _ = _logits(row, whole + lane, V, cap, True, SOFTCAP)
            top, total = _added(v, top, total)
            if SMOOTHED:
                plain += tl.sum(tl.where(whole + lane < V, v, 0.0), 0)
        lse = top + tl.log(total)
        known = (label >= 0) & (label < V)
        one = tl.load(row + tl.where(known, label, 0)).to(tl.float32)
        if SOFTCAP:
            one = cap * _tanh(one / cap)
        one = tl.where(known, one, float("nan"))
        loss = lse - (1.0 - smoothing) * one + z_loss * lse * lse
        if SMOOTHED:
            loss -= smoothing * (plain / V)
        tl.store(losses + place, loss)
        if GRAD:
            g = tl.load(coefficients + place)
            g = tl.where(known, g, float("nan"))
            scale = g * (1.0 + 2.0 * z_loss * lse)
            at_label = g * (1.0 - smoothing)
            everywhere = g * (smoothing / V)
            tl.debug_barrier()  # every thread has read its label's logit before one is overwritten
            for start in tl.range(0, whole, BLOCK):
                _write(
                    row, start + lane, V, label, cap, lse, scale, at_label, everywhere,
                    False, SOFTCAP,
                )  # fmt: skip
            if whole < V:
                _write(
                    row, whole + lane, V, label, cap, lse, scale, at_label, everywhere,
                    True, SOFTCAP,
                )  # fmt: skip
