"""The compiled gated_activation: every instruction set, kind, dtype and layout."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch
from torch.library import opcheck

import lora_kernels as lk
from lora_kernels._backends import cpu as library_loader
from lora_kernels.errors import BackendUnavailableError
from lora_kernels.ops import _registry, gated_activation
from lora_kernels.ops.gated_activation import cpu
from lora_kernels.testing import (
    BudgetExceededError,
    assert_within_budget,
    check_adapter_products,
    check_gated_activation,
    gated_activation_inputs,
    gated_activation_op,
    poisoned_empty,
)
from lora_kernels.testing.gated_activation import results

library, reason = library_loader.load()
if library is not None and not hasattr(library, "gated_activation_bwd_products"):
    library, reason = None, "lora_kernels._C predates products in gated_activation; rebuild it"
pytestmark = pytest.mark.skipif(library is None, reason=reason)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu_squared")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_isa(isa, kind, dtype):
    for shape in ((3, 7, 33), (1, 1), (5,), (0, 5), (3, 0), (2, 130)):
        for gated in (True, False):
            i = gated_activation_inputs(shape, kind, gated=gated, dtype=dtype)
            with poisoned_empty():
                check_gated_activation(i, "cpu")


@pytest.mark.parametrize("layout", ["sliced", "strided", "permuted", "misaligned"])
def test_layouts(isa, layout):
    i = gated_activation_inputs((17, 40), layout=layout)
    check_gated_activation(i, "cpu")
    assert gated_activation(i.gate, i.up, backend="cpu").is_contiguous()


def test_large_values_stay_finite(isa):
    for kind in KINDS:
        gate = torch.tensor([-1e30, -1e4, -90.0, 0.0, 90.0, 1e4], requires_grad=True)
        h = gated_activation(gate, torch.ones(6), kind, backend="cpu")
        h.sum().backward()
        assert (h.isfinite() | (gate.abs() > 1e18)).all() and gate.grad.isfinite().all()


def test_a_number_that_is_none_is_not_hidden(isa):
    for kind in KINDS:
        h = gated_activation(torch.tensor([1.0, torch.nan, 2.0]), kind=kind, backend="cpu")
        assert h.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("wrong", ["kind", "up", "sign"])
def test_a_planted_fault_is_found(isa, wrong):
    i = gated_activation_inputs(kind="silu", dtype=torch.bfloat16)
    changed = {
        "kind": {"kind": "gelu_tanh"},
        "up": {"up": i.up.roll(1, -1)},
        "sign": {"gate": -i.gate},
    }[wrong]
    oracle, low = results(i, torch.float64), results(i, torch.bfloat16)
    got = gated_activation_op(dataclasses.replace(i, **changed), "cpu")
    for name in ("h", "dgate"):
        with pytest.raises(BudgetExceededError):
            assert_within_budget(got[name], oracle[name], low[name])


def test_opcheck():
    i = gated_activation_inputs(layout="permuted", dtype=torch.bfloat16)
    ops = torch.ops.lora_kernels
    for up in (i.up, None):
        opcheck(ops.gated_activation_fwd.default, (i.gate, up, "silu", [], "cpu"))
        arguments = (i.gate, i.gate, up, "relu", [], None, [], "cpu")
        opcheck(ops.gated_activation_bwd.default, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_on_every_isa(isa, dtype):
    for shape, r in (((1, 1), 1), ((65, 33), 5), ((130, 128), 16), ((3, 300), 17)):
        i = gated_activation_inputs(
            shape, "gelu", dtype=dtype, layout="sliced", ranks=(r, 2), member_ranks=(r, 3),
            adapter_dtype=torch.float32,
        )  # fmt: skip
        with poisoned_empty():
            check_adapter_products(i, "cpu")
            check_adapter_products(i, "cpu", with_db=False)


def test_sums_over_many_rows(isa):
    """dB in fp32 of operands in bf16: the chain of sums must not grow with M."""
    i = gated_activation_inputs(
        (4097, 20), dtype=torch.bfloat16, member_ranks=(3, 3), adapter_dtype=torch.float32
    )
    check_adapter_products(i, "cpu")


def test_what_it_lacks_is_refused_and_left_to_aten():
    wide = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(BackendUnavailableError, match="float64"):
        gated_activation(wide, backend="cpu")
    assert lk.explain("gated_activation", M=2, N=3, dtype="float64")["backend"] == "aten"
    assert lk.explain("gated_activation", M=2, N=3, kind="gelu")["backend"] == "cpu"


@pytest.mark.parametrize("missing", ["gated_activation_bwd", "gated_activation_bwd_products"])
def test_an_older_library_is_told(monkeypatch, missing):
    older = types.SimpleNamespace(**{n: getattr(library, n) for n in dir(library) if n != missing})
    monkeypatch.setattr(cpu.backend, "load", lambda: (older, ""))
    able, why = cpu.supports(_registry.find("gated_activation").problem(M=2, N=3, rank=4))
    assert not able and "predates" in why and "rebuild it" in why
