"""The Triton kernel of rope in Triton's interpreter, against the fp64 formula.

Not collected by itself: suite_runner.py runs this file in a process of its own.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

import lora_kernels as lk
from lora_kernels.errors import BackendUnavailableError
from lora_kernels.ops import rope
from lora_kernels.ops.rope import triton as host
from lora_kernels.testing import (
    BudgetExceededError,
    assert_within_budget,
    check_rope,
    poisoned_empty,
    rope_inputs,
    rope_op,
)
from lora_kernels.testing.rope import results

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TABLES = ("shared", "batch", "cache")
WHOLE = [(dtype, tables, R) for dtype in DTYPES for tables in TABLES for R in (None, 6)]
FEW = [(torch.bfloat16, "cache", 6), (torch.float64, "batch", None), (torch.float16, "shared", 6)]


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize(("dtype", "tables", "R"), FEW, ids=str)
def test_against_the_oracle(dtype, tables, R, interleaved):
    i = rope_inputs((2, 3), R=R, interleaved=interleaved, tables=tables, dtype=dtype)
    check_rope(i, "triton")


@pytest.mark.slow
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize(("dtype", "tables", "R"), WHOLE, ids=str)
def test_every_kind_against_the_oracle(dtype, tables, R, interleaved):
    i = rope_inputs((2, 9), R=R, interleaved=interleaved, tables=tables, dtype=dtype)
    check_rope(i, "triton")


@pytest.mark.parametrize("D", [2, 80, 256])
def test_head_dims(D):
    for interleaved in (False, True):
        check_rope(rope_inputs((1, 2), 3, D, Hk=1, interleaved=interleaved), "triton")


@pytest.mark.parametrize("lead", [(1, 1), (7,), (2, 0)], ids=str)
def test_lengths_and_packed_heads(lead):
    for Hk, tables in ((0, "shared"), (3, "cache")):
        check_rope(rope_inputs(lead, tables=tables, Hk=Hk, R=10), "triton")


@pytest.mark.parametrize("layout", ["strided", "permuted", "misaligned"])
def test_layouts(layout):
    for interleaved in (False, True):
        i = rope_inputs((1, 3), layout=layout, interleaved=interleaved, R=8, tables="cache")
        with poisoned_empty():
            check_rope(i, "triton")


def test_many_heads_take_several_programs(monkeypatch):
    monkeypatch.setattr(host, "_CHANNELS", 64)
    for interleaved in (False, True):
        check_rope(rope_inputs((2, 2), 11, 16, Hk=5, interleaved=interleaved), "triton")


def test_shapes_of_positions():
    i = rope_inputs((2, 3), tables="cache")
    one = i.position_ids[:1]
    base = rope(i.q, i.k, i.cos, i.sin, position_ids=one.expand(2, 3), backend="triton")
    for positions in (one, one[0], one.int()):
        again = rope(i.q, i.k, i.cos, i.sin, position_ids=positions, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(base, again, strict=True))
    rows = rope(i.q, i.k, i.cos[one], i.sin[one], backend="triton")  # tables [1, S, R]
    assert all(torch.equal(a, b) for a, b in zip(base, rows, strict=True))


def test_a_position_outside_of_the_cache_gives_nan():
    """The check before the launch reads positions on the CPU only; the kernel has its own."""
    i = rope_inputs((1, 3), tables="cache")
    for wrong in (50, -1, 1 << 40):
        ids = torch.tensor([[3, wrong, 4]])
        q, k = host.rope_fwd([i.q, i.k], i.cos, i.sin, ids, False)
        for out in (q, k):
            assert bool(out[:, 1].isnan().all())
            assert not bool(out[:, ::2].isnan().any())


def test_the_rest_of_a_head_passes_bit_for_bit():
    i = rope_inputs((1, 3), R=6, dtype=torch.bfloat16)
    q, k = rope(i.q, i.k, i.cos, i.sin, backend="triton")
    assert torch.equal(q[..., 6:], i.q[..., 6:]) and torch.equal(k[..., 6:], i.k[..., 6:])


def test_one_rounding():
    """The result is that of fp64 rounded, but for ties that fp32 decides the other way."""
    i = rope_inputs((1, 32), dtype=torch.bfloat16)
    exact = results(i, torch.float64)["q"].bfloat16()
    q, _ = rope(i.q, i.k, i.cos, i.sin, backend="triton")
    assert (q != exact).float().mean() < 0.002


@pytest.mark.slow
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_of_any_order(interleaved):
    """Also with cos and sin that differ within a pair."""
    i = rope_inputs((1, 2), 1, 6, Hk=1, R=4, interleaved=interleaved, dtype=torch.float64)
    cos, sin = torch.rand(2, 4), torch.rand(2, 4)

    def both(q, k):
        return rope(q, k, cos, sin, interleaved=interleaved, backend="triton")

    leaves = [i.q.requires_grad_(), i.k.requires_grad_()]
    assert torch.autograd.gradcheck(both, leaves)
    assert torch.autograd.gradgradcheck(both, leaves)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_backward_is_the_transpose(interleaved):
    """<rotate(x), y> = <x, rotate back(y)>, also with cos and sin that differ within a pair."""
    x, y = (torch.randn(3, 2, 6, dtype=torch.float64) for _ in range(2))
    cos, sin = torch.rand(3, 4), torch.rand(3, 4)
    (turned,) = host.rope_fwd([x], cos, sin, None, interleaved)
    (back,) = host.rope_bwd([y], cos, sin, None, interleaved)
    assert_within_budget((turned * y).sum(), (x * back).sum(), (x * back).sum())


@pytest.mark.parametrize("wrong", ["sign", "layout", "position", "channels"])
def test_a_planted_fault_is_found(wrong):
    i = rope_inputs((2, 5), tables="cache", dtype=torch.bfloat16)
    changed = {
        "sign": {"sin": -i.sin},
        "layout": {"interleaved": True},
        "position": {"position_ids": i.position_ids.roll(1, -1)},
        "channels": {"cos": i.cos[:, :14], "sin": i.sin[:, :14]},
    }[wrong]
    oracle, low = results(i, torch.float64), results(i, i.q.dtype)
    got = rope_op(dataclasses.replace(i, **changed), "triton")
    for name in ("q", "dk"):
        with pytest.raises(BudgetExceededError):
            assert_within_budget(got[name], oracle[name], low[name])


def test_a_backward_that_rotates_on_is_found(monkeypatch):
    monkeypatch.setattr(host, "rope_bwd", host.rope_fwd)
    with pytest.raises(BudgetExceededError, match="dq"):
        check_rope(rope_inputs((1, 3)), "triton")


def test_one_launch_for_q_and_k(monkeypatch):
    launches = []
    real = host._kernel()

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return real[grid]

    monkeypatch.setattr(host, "_kernel", Counted)
    monkeypatch.setattr(host.backend, "arithmetic", lambda kernel: real_arithmetic(real))
    i = rope_inputs((2, 3), 4, 16, Hk=2)
    rope(i.q, i.k, i.cos, i.sin, backend="triton")
    assert launches == [(6, 2)]


real_arithmetic = host.backend.arithmetic


def test_explain_and_refusals():
    told = lk.explain("rope", backend="triton", B=1, S=4, H=2, D=16)
    assert told["backend"] == "triton"
    assert "interpreter" in told["backends"]["triton"]["reason"]
    assert lk.explain("rope", B=1, S=4, H=2, D=16)["backend"] in ("aten", "cpu")
    with pytest.raises(BackendUnavailableError, match="a head of 5000 is too large"):
        lk.explain("rope", backend="triton", B=1, S=4, H=2, D=5000)
