"""gated_activation against the fp64 formula, on every backend."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.library import opcheck

import lora_kernels as lk
from lora_kernels.errors import BackendUnavailableError, InvalidArgumentError
from lora_kernels.ops import _registry, gated_activation
from lora_kernels.ops.gated_activation import aten
from lora_kernels.ops.gated_activation.problem import KINDS
from lora_kernels.testing import (
    BudgetExceededError,
    assert_within_budget,
    check_gated_activation,
    gated_activation_inputs,
    gated_activation_op,
)
from lora_kernels.testing.gated_activation import results

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FWD = torch.ops.lora_kernels.gated_activation_fwd.default
BWD = torch.ops.lora_kernels.gated_activation_bwd.default


# cpu covers fewer dtypes: test_gated_activation_cpu.py
@pytest.fixture(params=["reference", "aten"])  # those of GPUs: tests/triton, the emulator
def backend(request) -> str:
    return request.param


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_oracle(backend, dtype, kind, gated):
    check_gated_activation(
        gated_activation_inputs((3, 7, 33), kind, gated=gated, dtype=dtype), backend
    )


@pytest.mark.parametrize("shape", [(5,), (0, 5), (3, 0), (1, 1), (2, 3, 4, 5)], ids=str)
def test_shapes(backend, shape):
    for gated in (True, False):
        check_gated_activation(gated_activation_inputs(shape, gated=gated), backend)


@pytest.mark.parametrize("layout", ["sliced", "strided", "permuted", "misaligned"])
def test_layouts(backend, layout):
    i = gated_activation_inputs((17, 40), layout=layout)
    check_gated_activation(i, backend)
    assert gated_activation(i.gate, i.up, backend=backend).is_contiguous()


def test_halves_of_one_tensor(backend):
    both = torch.randn(2, 9, 24, dtype=torch.float64, requires_grad=True)
    gate, up = both.chunk(2, -1)
    h = gated_activation(gate, up, backend=backend)
    (got,) = torch.autograd.grad(h.sum(), both)
    (want,) = torch.autograd.grad((torch.nn.functional.silu(gate) * up).sum(), both)
    assert_within_budget(got, want, want)


@pytest.mark.parametrize("kind", KINDS)
def test_several_pieces(monkeypatch, kind):
    monkeypatch.setattr(aten, "_ELEMENTS", 100)
    for gated in (True, False):
        i = gated_activation_inputs((17, 40), kind, gated=gated, dtype=torch.bfloat16)
        check_gated_activation(i, "aten")


def test_large_values_stay_finite(backend):
    for kind in KINDS:
        gate = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4], requires_grad=True)
        h = gated_activation(gate, torch.ones(5), kind, backend=backend)
        h.sum().backward()
        assert h.isfinite().all() and gate.grad.isfinite().all()


@pytest.mark.parametrize("needs", [("gate",), ("up",), ()])
def test_subsets_of_gradients(backend, needs):
    found = check_gated_activation(gated_activation_inputs(), backend, needs)
    assert set(found) == {"h", *(f"d{n}" for n in needs)}


@pytest.mark.parametrize("wrong", ["kind", "up", "sign"])
def test_a_planted_fault_is_found(wrong, backend):
    i = gated_activation_inputs(kind="gelu", dtype=torch.bfloat16)
    changed = {
        "kind": {"kind": "gelu_tanh"},
        "up": {"up": i.up.roll(1, -1)},
        "sign": {"gate": -i.gate},
    }[wrong]
    dtype = torch.float32 if wrong == "kind" else torch.bfloat16  # GELU's forms are close
    i = dataclasses.replace(i, gate=i.gate.to(dtype), up=i.up.to(dtype))
    changed = {n: t.to(dtype) if isinstance(t, torch.Tensor) else t for n, t in changed.items()}
    oracle, low = results(i, torch.float64), results(i, dtype)
    got = gated_activation_op(dataclasses.replace(i, **changed), backend)
    for name in ("h", "dgate"):
        with pytest.raises(BudgetExceededError):
            assert_within_budget(got[name], oracle[name], low[name])


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(backend, kind):
    i = gated_activation_inputs((3, 4), kind, dtype=torch.float64)
    leaves = (i.gate.requires_grad_(), i.up.requires_grad_())

    def run(g, u):
        return gated_activation(g, u, kind, backend=backend)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradcheck(lambda g: run(g, None), leaves[:1])


def test_second_derivatives_are_refused(backend):
    i = gated_activation_inputs()
    gate = i.gate.requires_grad_()
    h = gated_activation(gate, i.up, backend=backend)
    (grad,) = torch.autograd.grad(h.sum(), gate, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()


def test_only_the_operands_are_saved(backend):
    i = gated_activation_inputs()
    gate, up = i.gate.requires_grad_(), i.up.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gated_activation(gate, up, backend=backend)
    assert {t.data_ptr() for t in saved} == {gate.data_ptr(), up.data_ptr()}


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_opcheck(backend, layout):
    for gated in (True, False):
        i = gated_activation_inputs(gated=gated, layout=layout, dtype=torch.bfloat16)
        opcheck(FWD, (i.gate, i.up, "silu", [], backend))
        opcheck(BWD, (i.gate, i.gate, i.up, "gelu", [], None, [], backend))
    assert _registry.find("gated_activation").schemas == (FWD.name(), BWD.name())


def test_compile_with_dynamic_rows():
    compiled = torch.compile(gated_activation, fullgraph=True, dynamic=True, backend="eager")
    for rows in (5, 9, 12):
        i = gated_activation_inputs((2, rows, 8))
        gate = i.gate.requires_grad_()
        pair = [run(gate, i.up) for run in (compiled, gated_activation)]
        assert torch.equal(*pair)
        assert torch.equal(*(torch.autograd.grad(h.sum(), gate)[0] for h in pair))
        assert torch.equal(compiled(gate, gate), gated_activation(gate, gate))
        with torch.no_grad():
            assert torch.equal(compiled(gate, None), gated_activation(gate))


def test_autocast_leaves_the_dtype(backend):
    i = gated_activation_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        h = gated_activation(i.gate, i.up, backend=backend)
    assert torch.equal(h, gated_activation(i.gate, i.up, backend=backend))


def test_explain():
    told = lk.explain("gated_activation", M=64, N=16, dtype="float64")
    assert told["backend"] == "aten"
    spec = _registry.find("gated_activation")
    assert spec.min_bytes(spec.problem(M=2, N=3), "bwd") == 4 * 2 * 3 * 5
    with pytest.raises(InvalidArgumentError, match="argument 'N' is missing"):
        lk.explain("gated_activation", M=1)
    with pytest.raises(InvalidArgumentError, match="kind='swish'"):
        lk.explain("gated_activation", M=1, N=1, kind="swish")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": [1.0]}, "gate is a list"),
        ({"gate": torch.zeros(())}, "gate is a scalar"),
        ({"gate": torch.zeros(2, 3, dtype=torch.int64)}, "gate has dtype"),
        ({"up": torch.zeros(2, 4)}, "up has shape"),
        ({"up": torch.zeros(2, 3).half()}, "up is torch.float16"),
        ({"up": torch.zeros(2, 3, device="meta")}, "up is on meta"),
        ({"up": 2.0}, "up is a float"),
        ({"kind": "swish"}, "kind='swish'"),
        ({"backend": "best"}, "backend='best'"),
    ],
)
def test_messages(change, message):
    arguments = {"gate": torch.zeros(2, 3), "up": torch.zeros(2, 3), **change}
    if "gate" in change:
        arguments["up"] = None
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        gated_activation(**arguments)
    assert "\n" not in str(caught.value)


def test_a_backend_by_name_never_falls_back():
    with pytest.raises(BackendUnavailableError, match="backend='triton' cannot run"):
        gated_activation(torch.zeros(2, 2), backend="triton")
