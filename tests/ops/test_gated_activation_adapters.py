"""S, dS and dB that gated_activation makes for the layers around it, against fp64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.library import opcheck

import lora_kernels as lk
from lora_kernels.errors import BackendUnavailableError, InvalidArgumentError
from lora_kernels.ops import _registry, gated_activation
from lora_kernels.testing import (
    BudgetExceededError,
    assert_within_budget,
    check_adapter_products,
    gated_activation_inputs,
)

SPEC = _registry.find("gated_activation")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FWD = torch.ops.lora_kernels.gated_activation_fwd.default
BWD = torch.ops.lora_kernels.gated_activation_bwd.default


@pytest.fixture(params=[b for b in SPEC.backends if b in ("reference", "aten", "cpu")])
def backend(request) -> str:
    able, why = SPEC.supports(request.param, SPEC.problem(M=2, N=8, rank=4, member_ranks=(4, 4)))
    if not able:
        pytest.skip(why)
    return request.param


def inputs(shape=(37, 72), ranks=(5, 3), member_ranks=(4, 9), **more):
    return gated_activation_inputs(shape, ranks=ranks, member_ranks=member_ranks, **more)


def skip_unless_supported(backend: str, i, **more) -> None:
    rows, columns = i.gate.flatten(0, -2).shape
    problem = SPEC.problem(M=rows, N=columns, kind=i.kind, dtype=i.gate.dtype, **more)
    able, why = SPEC.supports(backend, problem)
    if not able:
        pytest.skip(why)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["silu", "gelu"])
def test_products(backend, kind, dtype):
    i = inputs(kind=kind, dtype=dtype)
    skip_unless_supported(backend, i)
    for with_db in (True, False):
        check_adapter_products(i, backend, with_db)
    check_adapter_products(inputs(kind=kind, dtype=dtype, gated=False, member_ranks=(6,)), backend)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_wider_adapters(backend, dtype):
    i = inputs(dtype=dtype, adapter_dtype=torch.float32)
    check_adapter_products(i, backend)
    *_, dbs = BWD(i.gate, i.gate, i.up, i.kind, i.lora_bs, i.s, i.scalings, backend)
    assert {t.dtype for t in dbs} == {torch.float32}


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (2, 3, 17), (130, 33)], ids=str)
def test_shapes(backend, shape):
    check_adapter_products(inputs(shape), backend)


@pytest.mark.parametrize("r", [1, 16, 17, 64, 100])
def test_ranks(backend, r):
    for dtype in (torch.float32, torch.bfloat16):
        check_adapter_products(inputs(ranks=(r,), member_ranks=(r, 3), dtype=dtype), backend)


@pytest.mark.parametrize("layout", ["sliced", "strided", "permuted", "misaligned"])
def test_layouts(backend, layout):
    check_adapter_products(inputs(layout=layout), backend)


def test_only_one_side(backend):
    check_adapter_products(inputs(ranks=()), backend)
    check_adapter_products(inputs(member_ranks=()), backend)


@pytest.mark.parametrize("wrong", ["lora_as", "lora_bs", "s", "scalings"])
def test_a_planted_fault_is_found(backend, wrong):
    i = inputs(dtype=torch.bfloat16)
    changed = {
        "lora_as": [i.lora_as[0], i.lora_as[1].roll(1, -1)],
        "lora_bs": [i.lora_bs[0], i.lora_bs[1].roll(1, 0)],
        "s": i.s.roll(1, 0),
        "scalings": (1.0, *i.scalings[1:]),
    }[wrong]
    j = dataclasses.replace(i, **{wrong: changed})
    named = {}
    for name, case in (("right", i), ("wrong", j)):
        _, s = FWD(case.gate, case.up, case.kind, case.lora_as, backend)
        operands = (case.gate, case.gate, case.up, case.kind)
        *_, ds, dbs = BWD(*operands, case.lora_bs, case.s, case.scalings, backend)
        named[name] = {"s": s, "ds": ds, "db0": dbs[0], "db1": dbs[1]}
    affected = {"lora_as": ["s"], "lora_bs": ["ds"], "s": ["db0", "db1"],
                "scalings": ["ds", "db0"]}[wrong]  # fmt: skip
    for name in affected:
        right = named["right"][name]
        with pytest.raises(BudgetExceededError):
            assert_within_budget(named["wrong"][name], right.double(), right)


def test_bitwise_from_run_to_run(backend):
    i = inputs((300, 72), dtype=torch.bfloat16)
    runs = [
        (*FWD(i.gate, i.up, i.kind, i.lora_as, backend),
         *BWD(i.gate, i.gate, i.up, i.kind, i.lora_bs, i.s, i.scalings, backend)[2:])
        for _ in range(2)
    ]  # fmt: skip
    for a, b in zip(*runs, strict=True):
        pairs = zip(a, b, strict=True) if isinstance(a, list) else [(a, b)]
        assert all(torch.equal(*pair) for pair in pairs)


def test_public_form(backend):
    i = inputs((2, 9, 24))
    gate = i.gate.requires_grad_()
    h, s = gated_activation(gate, i.up, lora_as=i.lora_as, backend=backend)
    assert torch.equal(h, gated_activation(gate, i.up, backend=backend))
    assert s.shape == (2, 9, 8) and not s.requires_grad and s.is_contiguous()
    want = h.detach().double() @ torch.cat(i.lora_as).double().t()
    assert_within_budget(s, want, h.detach() @ torch.cat(i.lora_as).t())
    with torch.no_grad():
        again = gated_activation(gate, i.up, lora_as=i.lora_as, backend=backend)
    assert torch.equal(again[0], h) and torch.equal(again[1], s)
    (h.sum() + s.sum()).backward()  # s counts as a value
    (dgate,) = torch.autograd.grad(gated_activation(gate, i.up, backend=backend).sum(), gate)
    assert torch.equal(gate.grad, dgate)
    trained = [a.detach().requires_grad_() for a in i.lora_as]
    assert not gated_activation(gate.detach(), i.up, lora_as=trained, backend=backend)[
        1
    ].requires_grad


def test_opcheck(backend):
    for gated, member_ranks in ((True, (4, 9)), (False, (4,))):
        i = inputs(gated=gated, member_ranks=member_ranks, layout="permuted", dtype=torch.bfloat16)
        opcheck(FWD, (i.gate, i.up, "silu", i.lora_as, backend))
        for s in (i.s, None):
            arguments = (i.gate, i.gate, i.up, "silu", i.lora_bs, s, i.scalings, backend)
            opcheck(BWD, arguments)


def test_compiles():
    compiled = torch.compile(gated_activation, fullgraph=True, dynamic=True, backend="eager")
    for rows in (5, 9):
        i = inputs((2, rows, 8))
        gate = i.gate.requires_grad_()
        got, want = compiled(gate, i.up, lora_as=i.lora_as), gated_activation(
            gate, i.up, lora_as=i.lora_as
        )  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(1, 3), "lora_as is a Tensor"),
        ([torch.zeros(2, 4)], "accepted: \\[r >= 1, 3\\]"),
        ([torch.zeros(0, 3)], "accepted: \\[r >= 1, 3\\]"),
        ([torch.zeros(3)], "accepted: \\[r >= 1, 3\\]"),
        ([None], "lora_as\\[0\\] is a NoneType"),
        ([torch.zeros(1, 3, device="meta")], "lora_as\\[0\\] is on meta"),
        ([torch.zeros(1, 3, dtype=torch.int8)], "lora_as\\[0\\] has dtype"),
    ],
)
def test_messages(given, message):
    with pytest.raises(InvalidArgumentError, match=message):
        gated_activation(torch.zeros(2, 3), lora_as=given)


def test_explain_counts_the_products():
    plain, made = (SPEC.problem(M=4, N=8, rank=r) for r in (0, 2))
    assert SPEC.flops(made, "fwd") - SPEC.flops(plain, "fwd") == 2 * 4 * 8 * 2
    assert SPEC.min_bytes(made, "fwd") - SPEC.min_bytes(plain, "fwd") == 4 * (4 * 2 + 2 * 8)
    assert lk.explain("gated_activation", M=4, N=8, rank=2)["op"] == "gated_activation"
    with pytest.raises(BackendUnavailableError):
        gated_activation(torch.zeros(2, 3, dtype=torch.float64), backend="cpu")
