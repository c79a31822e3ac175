"""lora_qkv against the fp64 formula; its Triton kernel: triton/suite_interpreter_lora_qkv.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.library import opcheck

import lora_kernels as lk
from lora_kernels.errors import BackendUnavailableError, InvalidArgumentError
from lora_kernels.ops import _registry, grouped_lora_linear, lora_qkv, rope
from lora_kernels.testing import (
    BudgetExceededError,
    assert_within_budget,
    check_lora_qkv,
    lora_qkv_inputs,
    lora_qkv_op,
    poisoned_empty,
)
from lora_kernels.testing.lora_qkv import results

FWD = torch.ops.lora_kernels.lora_qkv_fwd.default
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(params=["reference", "aten", None], ids=str)
def backend(request) -> str | None:
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])
def test_against_the_oracle(backend, joint, dtype):
    for changes in ({}, {"R": 6, "tables": "cache"}, {"interleaved": True, "tables": "batch"}):
        with poisoned_empty():
            check_lora_qkv(lora_qkv_inputs(joint=joint, dtype=dtype, **changes), backend)


@pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])
def test_dropout_ranks_and_adapters_of_another_dtype(backend, joint):
    check_lora_qkv(lora_qkv_inputs(joint=joint, dropout_p=0.4), backend)
    check_lora_qkv(lora_qkv_inputs(rank=(1, 17, 3), bias=False, lead=(7,)), backend)
    i = lora_qkv_inputs(joint=joint, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    check_lora_qkv(i, backend)


def test_projections_without_an_adapter(backend):
    for rank in ((4, 0, 7), (0, 8, 0)):
        for dropout_p in (0.0, 0.3):
            i = lora_qkv_inputs(rank=rank, dropout_p=dropout_p, dtype=torch.bfloat16)
            check_lora_qkv(i, backend)
    n = i.linear
    absent = dataclasses.replace(
        i,
        linear=dataclasses.replace(
            n,
            lora_as=[a if len(a) else None for a in n.lora_as],
            lora_bs=[b if len(a) else None for a, b in zip(n.lora_as, n.lora_bs, strict=True)],
        ),
    )
    pairs = zip(_call(i, backend=backend), _call(absent, backend=backend), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(BackendUnavailableError, match=r"cpu|no adapter"):
        lora_qkv_op(i, "triton", "")


@pytest.mark.parametrize("layout", ["sliced", "strided", "permuted", "misaligned"])
def test_layouts(backend, layout):
    check_lora_qkv(lora_qkv_inputs(layout=layout), backend)


@pytest.mark.parametrize("lead", [(1, 1), (0,), (0, 3), (2, 0), (1, 70)], ids=str)
def test_lengths(backend, lead):
    for joint in (False, True):
        check_lora_qkv(lora_qkv_inputs(lead, joint=joint), backend)


def test_the_bits_of_the_two_ops_one_after_the_other():
    """Every backend on the CPU rounds between them."""
    for dtype in (torch.float32, torch.bfloat16):
        i = lora_qkv_inputs((2, 33), 64, 4, 2, 16, dtype=dtype)
        n, t = i.linear, i.tables
        ys = grouped_lora_linear(n.x, n.weights, n.lora_as, n.lora_bs, n.scalings, biases=n.biases)
        q, k, v = (y.unflatten(-1, (-1, 16)) for y in ys)
        want = (*rope(q, k, t.cos, t.sin), v)
        got = lora_qkv_op(i, None, "")
        assert all(torch.equal(got[f"z[{g}]"], w) for g, w in enumerate(want))


@pytest.mark.parametrize("needs", ["a", "b", "x", "ab", "c", ""])
def test_subsets_of_gradients(backend, needs):
    check_lora_qkv(lora_qkv_inputs(), backend, needs)


@pytest.mark.parametrize("wrong", ["sign", "layout", "position", "v", "k", "adapter", "scaling"])
def test_a_planted_fault_is_found(backend, wrong):
    i = lora_qkv_inputs(tables="cache", dtype=torch.bfloat16)
    n, t = i.linear, i.tables
    changed = {
        "sign": {"tables": dataclasses.replace(t, sin=-t.sin)},
        "layout": {"tables": dataclasses.replace(t, interleaved=True)},
        "position": {"tables": dataclasses.replace(t, position_ids=t.position_ids.roll(1, -1))},
        "v": {"rotated": (3, 2, 2)},
        "k": {"rotated": (3, 0, 0)},
        "adapter": {
            "linear": dataclasses.replace(n, lora_bs=[torch.zeros_like(b) for b in n.lora_bs])
        },
        "scaling": {"linear": dataclasses.replace(n, scalings=[1.2 * s for s in n.scalings])},
    }[wrong]
    oracle, low = results(i, torch.float64), results(i, torch.bfloat16)
    got = lora_qkv_op(dataclasses.replace(i, **changed), backend)
    member = {"v": 2, "k": 1}.get(wrong, 0)
    for name in (f"z[{member}]", f"da[{member}]"):
        with pytest.raises(BudgetExceededError):
            assert_within_budget(got[name], oracle[name], low[name], name, 3.0)


def _call(i, **changes):
    n, t = i.linear, i.tables
    given = {
        "x": n.x, "weights": n.weights, "lora_as": n.lora_as, "lora_bs": n.lora_bs,
        "scalings": n.scalings, "cos": t.cos, "sin": t.sin, "head_dim": i.head_dim,
        "rotated": i.rotated, "position_ids": t.position_ids, **changes,
    }  # fmt: skip
    return lora_qkv(**given)


@pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])
def test_gradcheck(joint):
    i = lora_qkv_inputs((1, 3), 5, 2, 1, 4, joint=joint, R=2, dtype=torch.float64, rank=2)
    n = i.linear
    x, a, b = n.x.requires_grad_(), n.lora_as[0].requires_grad_(), n.lora_bs[0].requires_grad_()

    def run(x, a, b):
        lists = {"lora_as": [a, *n.lora_as[1:]], "lora_bs": [b, *n.lora_bs[1:]]}
        return tuple(_call(i, x=x, backend="aten", **lists))

    assert torch.autograd.gradcheck(run, (x, a, b))
    with pytest.raises(RuntimeError, match="lora_qkv"):
        grad = torch.autograd.grad(run(x, a, b)[0].sum(), x, create_graph=True)[0]
        grad.sum().backward()


def test_opcheck():
    for joint in (False, True):
        i = lora_qkv_inputs(joint=joint, tables="cache", dtype=torch.bfloat16)
        n, t = i.linear, i.tables
        opcheck(
            FWD,
            (n.x.flatten(0, 1), n.weights, n.lora_as, n.lora_bs, n.biases, n.scalings, 0.0, None,
             t.cos, t.sin, t.position_ids, 5, 8, list(i.rotated), False, "aten"),
        )  # fmt: skip
    assert _registry.find("lora_qkv").schemas == (FWD.name(),)


def test_compile_with_dynamic_lengths():
    compiled = torch.compile(_call, fullgraph=True, backend="aot_eager")
    for S in (5, 9, 12):
        i = lora_qkv_inputs((2, S))
        a = i.linear.lora_as[0].requires_grad_()
        pairs = [run(i) for run in (compiled, _call)]
        assert all(torch.equal(x, y) for x, y in zip(*pairs, strict=True))
        grads = [torch.autograd.grad(outs[0].sum(), a)[0] for outs in pairs]
        assert torch.equal(*grads)


def test_nothing_that_comes_in_is_changed(backend):
    i = lora_qkv_inputs()
    n = i.linear
    before = [t.clone() for t in (n.x, *n.weights, *n.dys, i.tables.cos)]
    lora_qkv_op(i, backend)
    after = (n.x, *n.weights, *n.dys, i.tables.cos)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_autocast(backend):
    i = lora_qkv_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        q, _, _ = _call(i, backend=backend)
    n = i.linear
    low = dataclasses.replace(
        i,
        linear=dataclasses.replace(n, x=n.x.bfloat16(), weights=[w.bfloat16() for w in n.weights]),
    )
    assert q.dtype == torch.bfloat16 and torch.equal(q, _call(low, backend=backend)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(24)}, "x has shape"),
        ({"x": [1.0]}, "x is a list"),
        ({"scalings": [1.0]}, "one entry per projection"),
        ({"scalings": [float("nan"), 1.0, 1.0]}, r"scalings\[0\]=nan"),
        ({"head_dim": 7}, r"weights\[0\] has shape"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"rotated": (4, 2, 0)}, r"rotated\[0\]=4"),
        ({"rotated": (3, 2, True)}, r"rotated\[2\]=True"),
        ({"biases": [torch.zeros(3), None, None]}, r"biases\[0\] has shape"),
        ({"cos": torch.zeros(5, 6)}, "sin has shape"),
        ({"cos": torch.zeros(5, 10), "sin": torch.zeros(5, 10)}, "even number of channels"),
        ({"cos": torch.zeros(4, 8), "sin": torch.zeros(4, 8)}, "a cache and position_ids"),
        ({"position_ids": torch.full((5,), 5)}, "position_ids holds 5"),
        ({"position_ids": torch.zeros(2, 4, dtype=torch.int64)}, "position_ids has shape"),
        ({"dropout_p": 1.5}, "not a probability"),
        ({"lora_as": [None] * 3, "lora_bs": [None] * 3}, r"lora_as\[0\] is a NoneType"),
        (
            {
                "lora_as": [torch.zeros(0, 24)] * 3,
                "lora_bs": [torch.zeros(8 * n, 0) for n in (3, 2, 2)],
            },
            "no projection has an adapter",
        ),
        ({"seed": -1, "dropout_p": 0.5}, "seed=-1"),
        ({"interleaved": 1}, "interleaved=1"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(InvalidArgumentError, match=message) as error:
        _call(lora_qkv_inputs(), **change)
    assert "\n" not in str(error.value)


def test_choice_and_refusals(monkeypatch):
    told = lk.explain("lora_qkv", M=64, K=32, H=4, D=16, Hk=2)
    assert told["backend"] == "aten" and "in place" in told["reason"]
    with pytest.raises(BackendUnavailableError, match="x is on cpu"):
        lora_qkv_op(lora_qkv_inputs(), "cuda")
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "reference")
    assert lk.explain("lora_qkv", M=64, K=32, H=4, D=16)["backend"] == "reference"
    problem = _registry.find("lora_qkv").problem(M=10, K=8, H=2, D=4, Hk=1, rank=3)
    flops = _registry.find("lora_qkv").flops(problem, "fwd")
    assert flops == 2 * 10 * 8 * 16 + 2 * 10 * 3 * (24 + 16) + 3 * 10 * 3 * 4
