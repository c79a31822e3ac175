"""The compiled attention kernels: every instruction set, threads, chunks, passes, memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import lora_kernels as lk
from lora_kernels._backends import cpu as library_loader
from lora_kernels.ops import attention
from lora_kernels.ops.attention import problem
from lora_kernels.testing import (
    BudgetExceededError,
    attention_inputs,
    attention_op,
    check_attention,
    poisoned_empty,
)
from lora_kernels.testing.attention import compare_attention

library, reason = library_loader.load()
if library is not None and not hasattr(library, "attention_bwd"):
    library, reason = None, "lora_kernels._C was built without attention"
pytestmark = pytest.mark.skipif(library is None, reason=reason)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Edges of blocks (64 rows, 128 keys), of strips (8 to 32 keys) and of vectors.
CASES = {
    "one": {"B": 1, "S": 1, "H": 1, "D": 1, "Sk": 2},
    "causal": {"S": 65, "causal": True, "Hk": 2},
    "tall": {"B": 1, "S": 131, "Sk": 33, "causal": True, "sinks": True},
    "wide": {"B": 1, "S": 33, "Sk": 261, "D": 80, "Dv": 40, "causal": True, "Hk": 1},
    "window": {"B": 1, "S": 300, "H": 2, "window": (37, 5), "Dv": 72},
    "band": {"B": 1, "S": 40, "Sk": 290, "H": 2, "window": (0, 3)},
    "packed": {"lengths": (3, 0, 130, 1), "Hk": 2, "causal": True, "sinks": True},
    "everything": {
        "S": 70, "Sk": 150, "causal": True, "window": (60, 0), "softcap": 2.0, "sinks": True,
        "mask": "additive", "alibi": True, "dropout_p": 0.2, "seed": 3, "Hk": 2, "Dv": 8,
        "return_lse": True,
    },
    "hidden": {"S": 40, "Sk": 50, "mask": "bool", "mask_shape": (2, 1, 40, 50), "alibi": True},
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_isa(isa, case, dtype):
    assert library.isa() == isa
    with poisoned_empty():
        check_attention(attention_inputs(dtype=dtype, **CASES[case]), "cpu")


@pytest.mark.parametrize("D", [7, 40, 96, 112, 192, 256, 300])
def test_head_dims_on_every_isa(isa, D):
    for dtype in (torch.float32, torch.bfloat16):
        i = attention_inputs(1, 20, 2, D, Sk=35, Dv=max(1, D - 17), causal=True, dtype=dtype)
        check_attention(i, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("S", [1, 15, 17, 31, 63, 64, 65, 96, 127, 128, 129, 200, 257])
@pytest.mark.parametrize("window", [None, (0, 40), (17, -1), (-1, 5), (130, 40)])
def test_many_lengths_on_every_isa(isa, S, window):
    for Sk in (2, 31, 33, 128, 129, 300):
        for dtype in (torch.float32, torch.bfloat16):
            i = attention_inputs(
                1, S, 2, 24, Sk=Sk, Hk=1, window=window, sinks=True, softcap=4.0, dtype=dtype
            )
            check_attention(i, "cpu", None if dtype == torch.bfloat16 else ("v", "sinks"))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("mask_shape", [None, (1, 1, 150, 300), (2, 1, 1, 300), (1, 2, 150, 1)])
def test_chunks_of_rows_and_of_keys(threads, count, mask_shape):
    """Few heads and several threads: rows, then keys are shared out, and dQ summed over slots. A
    broadcast mask makes one task of all that share its gradient."""
    torch.set_num_threads(count)
    mask = {} if mask_shape is None else {"mask": "additive", "mask_shape": mask_shape}
    for Hk in (1, 2):
        i = attention_inputs(2, 150, 2, 16, Sk=300, Hk=Hk, causal=True, sinks=True, **mask)
        needs = ("q", "k", "v", "sinks") if mask_shape and mask_shape[3] == 1 else None
        check_attention(i, "cpu", needs)


def test_keys_in_several_passes():
    """Wide heads: what the backward keeps of the keys is visited part by part."""
    for dtype in (torch.float32, torch.bfloat16):
        i = attention_inputs(1, 70, 1, 256, Sk=900, causal=True, dtype=dtype)
        check_attention(i, "cpu")
        check_attention(attention_inputs(1, 9, 2, 256, lengths=(40, 0, 700), dtype=dtype), "cpu")


@pytest.mark.parametrize("lengths", [None, (300, 0, 1, 40)])
def test_same_bits_from_run_to_run_and_in_the_forward_from_any_threads(threads, lengths):
    i = attention_inputs(
        1, 300, 4, 32, Hk=1, lengths=lengths, dtype=torch.bfloat16, causal=True, sinks=True
    )
    torch.set_num_threads(3)
    first, second = (attention_op(i, "cpu") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.set_num_threads(1)
    alone = attention_op(i, "cpu")
    assert torch.equal(first["out"], alone["out"]) and torch.equal(first["lse"], alone["lse"])


def test_keys_that_nobody_sees_are_not_read():
    """Tiles outside of the window hold NaN, and nothing of it arrives anywhere."""
    i = attention_inputs(1, 520, 2, 32, causal=True, window=(20, 0))
    late = attention(i.q[:, 400:], i.k, i.v, backend="cpu", **i.options)
    for t in (i.k, i.v):
        t[:, :256] = torch.nan
    assert torch.equal(attention(i.q[:, 400:], i.k, i.v, backend="cpu", **i.options), late)


@pytest.mark.parametrize("mask", ["bool", "additive"])
def test_masks_are_read_in_place(mask):
    """Strided, broadcast and transposed masks, none of them copied to queries x keys."""
    i = attention_inputs(1, 40, 2, 16, Sk=70, mask=mask)
    for view in (
        i.attn_mask.transpose(2, 3).contiguous().transpose(2, 3),
        i.attn_mask[:, :1, :1].expand(1, 2, 40, 70),
        i.attn_mask.repeat_interleave(2, 3)[..., ::2],
    ):
        check_attention(dataclasses.replace(i, attn_mask=view), "cpu", ("q", "k", "v"))


@pytest.mark.parametrize("wrong", ["mask", "alignment", "seed", "window"])
def test_a_planted_fault_is_found(isa, wrong):
    arguments = {
        "causal": True, "window": (30, 0), "mask": "additive", "dropout_p": 0.2, "seed": 3,
    }  # fmt: skip
    i = attention_inputs(1, 70, 2, Sk=140, dtype=torch.bfloat16, **arguments)
    changed = {
        "mask": {"attn_mask": i.attn_mask.roll(1, -1)},
        "alignment": {"options": {**i.options, "causal": False, "window": (30, 1)}},
        "seed": {"options": {**i.options, "seed": 4}},
        "window": {"options": {**i.options, "window": (29, 0)}},
    }[wrong]
    right = attention_op(i, "cpu")
    assert compare_attention(i, dict(right), "right")
    got = attention_op(dataclasses.replace(i, **changed), "cpu")
    for only in ("out", "dq", "dk"):
        with pytest.raises(BudgetExceededError):
            compare_attention(i, {"lse": right["lse"].clone(), only: got[only]}, wrong)


def test_auto_takes_the_kernels_where_they_were_measured_to_win():
    shapes = {"B": 4, "S": 256, "H": 9, "Hk": 3, "D": 64, "causal": True, "dtype": "bfloat16"}
    told = lk.explain("attention", **shapes)
    if library.isa() in ("amx", "avx512"):
        assert told["backend"] == "cpu"
    few = lk.explain("attention", **{**shapes, "S": 1}, Sk=256)
    assert few["backend"] == "aten" and "rows share a key head" in few["reason"]
    full = lk.explain("attention", **{**shapes, "dtype": "float32", "causal": False})
    assert full["backend"] == "aten"
    wide = lk.explain("attention", **{**shapes, "dtype": "float64"})
    assert wide["backend"] == "aten" and "fp32" in wide["reason"]
    assert problem.supports("cpu", problem.AttentionProblem.from_shapes(**shapes))[0]


def test_no_mask_of_queries_by_keys_is_made():
    """Peak memory of a long window stays far below one head's scores."""
    from torch.profiler import ProfilerActivity, profile

    i = attention_inputs(1, 3000, 1, 16, causal=True, window=(50, 0), sinks=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        attention_op(i, "cpu")
    largest = max(event.self_cpu_memory_usage for event in watched.key_averages())
    assert largest < 3000 * 3000
