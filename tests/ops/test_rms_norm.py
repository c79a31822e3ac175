"""rms_norm against the fp64 formula, on every backend."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.library import opcheck

import lora_kernels as lk
from lora_kernels._backends import cpu as library_loader
from lora_kernels.errors import BackendUnavailableError, InvalidArgumentError
from lora_kernels.ops import _registry, lora_linear, rms_norm
from lora_kernels.ops.rms_norm import aten
from lora_kernels.testing import (
    BudgetExceededError,
    assert_within_budget,
    check_rms_norm,
    rms_norm_inputs,
    rms_norm_op,
)
from lora_kernels.testing.rms_norm import results

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FWD = torch.ops.lora_kernels.rms_norm_fwd.default
BWD = torch.ops.lora_kernels.rms_norm_bwd.default


# The GPU's kernels run elsewhere, the compiled ones on every instruction set in test_rms_norm_cpu.
@pytest.fixture(params=["reference", "aten"])
def backend(request) -> str:
    return request.param


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_oracle(backend, dtype, offset):
    for ranks in ((), (4,), (3, 8, 1)):
        i = rms_norm_inputs((3, 7, 33), ranks=ranks, dtype=dtype, offset=offset)
        check_rms_norm(i, backend)
    check_rms_norm(rms_norm_inputs((3, 7, 33), weighted=False, dtype=dtype), backend)


@pytest.mark.parametrize("shape", [(5,), (0, 5), (1, 1), (2, 3, 4, 5), (3, 0, 4)], ids=str)
def test_shapes(backend, shape):
    for ranks in ((), (2, 3)):
        i = rms_norm_inputs(shape, ranks=ranks)
        check_rms_norm(i, backend)
        if ranks:
            _, s = rms_norm(i.x, i.weight, lora_as=i.lora_as, backend=backend)
            assert s.shape == (*shape[:-1], 5)


def test_no_rows_give_a_zero_gradient(backend):
    found = rms_norm_op(rms_norm_inputs((0, 5)), backend)
    assert torch.equal(found["dweight"], torch.zeros(5))


@pytest.mark.parametrize("layout", ["sliced", "strided", "permuted", "misaligned"])
def test_layouts(backend, layout):
    i = rms_norm_inputs((17, 40), ranks=(3,), layout=layout)
    check_rms_norm(i, backend)
    y, s = rms_norm(i.x, i.weight, lora_as=i.lora_as, backend=backend)
    assert y.is_contiguous() and s.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_of_another_dtype(backend, dtype):
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    i = rms_norm_inputs(dtype=dtype, weight_dtype=other, adapter_dtype=other, ranks=(3,))
    check_rms_norm(i, backend)
    found = rms_norm_op(i, backend)
    assert (found["y"].dtype, found["s"].dtype, found["dweight"].dtype) == (dtype, dtype, other)


def test_several_pieces(monkeypatch):
    monkeypatch.setattr(aten, "_ELEMENTS", 100)
    for options in ({}, {"offset": 1.0}, {"weighted": False}):
        check_rms_norm(rms_norm_inputs((17, 40), dtype=torch.bfloat16, **options), "aten")


@pytest.mark.parametrize("needs", [("x",), ("weight",), ()])
def test_subsets_of_gradients(backend, needs):
    found = check_rms_norm(rms_norm_inputs(), backend, needs)
    assert set(found) == {"y", *(f"d{n}" for n in needs)}


def test_rows_that_are_no_numbers(backend):
    x = torch.ones(4, 6)
    x[1, 2], x[2, 3] = math.nan, math.inf
    w = torch.full((6,), 0.5)
    want = torch.nn.functional.rms_norm(x, (6,), w, 1e-6)
    y = rms_norm(x, w, backend=backend)
    assert torch.equal(y.isnan(), want.isnan()) and y[[0, 3]].isfinite().all()
    assert torch.equal(y[~want.isnan()] == 0.0, want[~want.isnan()] == 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_and_small_values(backend, dtype):
    """Squares in fp32 at both ends of what they hold, and zero rows."""
    largest = 6e4 if dtype == torch.float16 else 1e18
    for size in (largest, 1e-7, 0.0):
        i = rms_norm_inputs((3, 40), dtype=dtype, eps=1e-6)
        i = dataclasses.replace(i, x=(i.x.sign() * size).to(dtype))
        check_rms_norm(i, backend)


def test_a_row_does_not_see_the_others(backend):
    i = rms_norm_inputs((33, 72), ranks=(5,), dtype=torch.bfloat16)
    y, s = rms_norm(i.x, i.weight, lora_as=i.lora_as, backend=backend)
    alone = [rms_norm(r[None], i.weight, lora_as=i.lora_as, backend=backend) for r in i.x]
    assert torch.equal(y, torch.cat([a for a, _ in alone]))
    assert_within_budget(torch.cat([b for _, b in alone]), s.double(), s)  # a library's product


@pytest.mark.parametrize("wrong", ["eps", "offset", "mean", "term", "adapter"])
def test_a_planted_fault_is_found(wrong, backend):
    # One element too many under the mean is a per cent: less than what bf16 is allowed.
    dtype = torch.float32 if wrong == "mean" else torch.bfloat16
    i = rms_norm_inputs(ranks=(4, 2), dtype=dtype)
    oracle, low = results(i, wide=True), results(i, wide=False)
    if wrong == "eps":
        got = rms_norm_op(dataclasses.replace(i, eps=1e-6), backend)
    elif wrong == "offset":
        got = rms_norm_op(dataclasses.replace(i, offset=1.0), backend)
    elif wrong == "mean":
        got = {"y": rms_norm(i.x, i.weight, i.eps, backend=backend) * math.sqrt(39 / 40)}
    elif wrong == "term":  # rstd taken for a constant
        n = i.x.double() * torch.rsqrt(i.x.double().square().mean(-1, keepdim=True) + i.eps)
        leaf = i.x.double().requires_grad_()
        y = leaf * (n / i.x.double()) * i.weight.double()
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        y.backward(dy.bfloat16().double())
        got = {"dx": leaf.grad}
    else:
        got = rms_norm_op(dataclasses.replace(i, lora_as=i.lora_as[::-1]), backend)
        got = {"s": got["s"]}
    with pytest.raises(BudgetExceededError):
        for name, t in got.items():
            assert_within_budget(t, oracle[name], low[name])


def test_gradcheck(backend):
    i = rms_norm_inputs((3, 4), dtype=torch.float64, offset=1.0)
    x, w = i.x.requires_grad_(), i.weight.requires_grad_()

    def run(x, w):
        return rms_norm(x, w, i.eps, i.offset, backend=backend)

    assert torch.autograd.gradcheck(run, (x, w))
    assert torch.autograd.gradcheck(lambda x: run(x, None), (x,))


def test_s_is_a_value(backend):
    """lora_linear(shrunk=s) gives the gradients of the whole; none flows through s."""
    i = rms_norm_inputs(ranks=(4,))
    x, a = i.x.requires_grad_(), i.lora_as[0].requires_grad_()
    y, s = rms_norm(x, i.weight, lora_as=[a], backend=backend)
    assert y.requires_grad and not s.requires_grad
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, torch.autograd.grad(rms_norm(x, i.weight, backend=backend).sum(), x)[0])
    with torch.no_grad():
        w, b = torch.zeros(3, 40), torch.eye(3, 4)
        whole = lora_linear(y, w, a, b, 1.0, backend="reference")
    assert_within_budget(s[:, :3], whole.double(), whole)
    y, s = rms_norm(x.detach(), None, lora_as=[a], backend=backend)
    assert not y.requires_grad and not s.requires_grad


def test_second_derivatives_are_refused(backend):
    i = rms_norm_inputs()
    x = i.x.requires_grad_()
    y = rms_norm(x, i.weight, backend=backend)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()


def test_what_is_saved(backend):
    i = rms_norm_inputs(ranks=(3,), dtype=torch.bfloat16)
    x, w = i.x.requires_grad_(), i.weight.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms_norm(x, w, lora_as=i.lora_as, backend=backend)
    assert [t.numel() for t in saved] == [x.numel(), w.numel(), len(x)]
    assert saved[0].data_ptr() == x.data_ptr() and saved[2].dtype == torch.float32


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_opcheck(backend, layout):
    i = rms_norm_inputs(ranks=(3, 2), layout=layout, dtype=torch.bfloat16)
    rstd = torch.ones(17)
    for weight in (i.weight, None):
        for lora_as in (i.lora_as, []):
            opcheck(FWD, (i.x, weight, lora_as, 1e-6, 1.0, backend))
        for needed in (True, False):
            opcheck(BWD, (i.x, i.x, weight, rstd, 1.0, needed, backend))
    assert _registry.find("rms_norm").schemas == (FWD.name(), BWD.name())


def test_compile_with_dynamic_rows():
    def run(x, w, a):
        return rms_norm(x, w, 1e-5, 1.0), rms_norm(x, w, 1e-5, 1.0, lora_as=[a])

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="eager")
    for rows in (5, 9, 12):
        i = rms_norm_inputs((2, rows, 8), ranks=(3,))
        x, w = i.x.requires_grad_(), i.weight.requires_grad_()
        found = []
        for call in (compiled, run):
            plain, (y, s) = call(x, w, i.lora_as[0])
            assert not s.requires_grad
            found.append((plain, y, s, *torch.autograd.grad((plain * y).sum(), (x, w))))
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
        with torch.no_grad():
            assert torch.equal(compiled(x, w, i.lora_as[0])[0], run(x, w, i.lora_as[0])[0])


def test_autocast_leaves_the_dtype(backend):
    i = rms_norm_inputs(ranks=(3,))
    with torch.autocast("cpu", torch.bfloat16):
        y, s = rms_norm(i.x, i.weight, lora_as=i.lora_as, backend=backend)
    want = rms_norm(i.x, i.weight, lora_as=i.lora_as, backend=backend)
    assert torch.equal(y, want[0]) and torch.equal(s, want[1])


def test_explain():
    told = lk.explain("rms_norm", M=64, K=16, dtype="float64")
    assert told["backend"] == "aten"
    library, _ = library_loader.load()
    if hasattr(library, "rms_norm_bwd"):
        assert lk.explain("rms_norm", M=64, K=16, dtype="bfloat16")["backend"] == "cpu"
    spec = _registry.find("rms_norm")
    assert spec.min_bytes(spec.problem(M=2, K=3), "bwd") == 4 * (3 * 2 * 3 + 2 + 2 * 3)
    assert spec.problem(M=2, K=3, weight_dtype=None).weight_dtype is None
    with pytest.raises(InvalidArgumentError, match="argument 'K' is missing"):
        lk.explain("rms_norm", M=1)
    with pytest.raises(InvalidArgumentError, match="unknown argument 'N'"):
        lk.explain("rms_norm", M=1, N=1)
    with pytest.raises(InvalidArgumentError, match="weight_dtype='int8'"):
        lk.explain("rms_norm", M=1, K=1, weight_dtype="int8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [1.0]}, "x is a list"),
        ({"x": torch.zeros(())}, r"x has shape \[\]"),
        ({"x": torch.zeros(2, 0)}, r"x has shape \[2, 0\]"),
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, "x has dtype"),
        ({"weight": torch.zeros(4)}, r"weight has shape \[4\]"),
        ({"weight": torch.zeros(1, 3)}, r"weight has shape \[1, 3\]"),
        ({"weight": torch.zeros(3).to(torch.int8)}, "weight has dtype"),
        ({"weight": torch.zeros(3, device="meta")}, "weight is on meta"),
        ({"weight": 2.0}, "weight is a float"),
        ({"eps": -1.0}, "eps=-1.0"),
        ({"eps": math.nan}, "eps=nan"),
        ({"eps": torch.ones(())}, "eps is a Tensor"),
        ({"offset": True}, "offset is a bool"),
        ({"offset": math.inf}, "offset=inf"),
        ({"lora_as": torch.zeros(2, 3)}, "lora_as is a Tensor"),
        ({"lora_as": [torch.zeros(2, 4)]}, r"lora_as\[0\] has shape \[2, 4\]"),
        ({"lora_as": [torch.zeros(2, 3), None]}, r"lora_as\[1\] is a NoneType"),
        ({"backend": "best"}, "backend='best'"),
    ],
)
def test_messages(change, message):
    arguments = {"x": torch.zeros(2, 3), "weight": torch.zeros(3), **change}
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        rms_norm(**arguments)
    assert "\n" not in str(caught.value)


def test_a_backend_by_name_never_falls_back(monkeypatch):
    with pytest.raises(BackendUnavailableError, match="cannot run this problem"):
        rms_norm(torch.zeros(2, 2, dtype=torch.float64), backend="cpu")
    monkeypatch.setenv("LORA_KERNELS_DISABLE", "rms_norm:cpu")
    assert lk.explain("rms_norm", M=2, K=2)["backend"] == "aten"
