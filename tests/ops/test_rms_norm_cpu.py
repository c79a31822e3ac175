"""The compiled rms_norm: every instruction set, dtype and layout."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.library import opcheck

from lora_kernels._backends import cpu as library_loader
from lora_kernels.ops import lora_linear, rms_norm
from lora_kernels.testing import (
    BudgetExceededError,
    assert_within_budget,
    check_rms_norm,
    poisoned_empty,
    rms_norm_inputs,
    rms_norm_op,
)
from lora_kernels.testing.rms_norm import results

library, reason = library_loader.load()
if library is not None and not hasattr(library, "rms_norm_bwd"):
    library, reason = None, "lora_kernels._C was built without rms_norm"
pytestmark = pytest.mark.skipif(library is None, reason=reason)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_isa(isa, dtype):
    for shape in ((3, 7, 33), (1, 1), (5,), (0, 5), (2, 130), (70, 64)):
        for ranks, offset in (((), 1.0), ((4,), 0.0), ((3, 50, 1), 1.0)):
            i = rms_norm_inputs(shape, ranks=ranks, offset=offset, dtype=dtype)
            with poisoned_empty():
                check_rms_norm(i, "cpu")
    check_rms_norm(rms_norm_inputs((5, 33), weighted=False, ranks=(2,), dtype=dtype), "cpu")


@pytest.mark.parametrize("layout", ["sliced", "strided", "permuted", "misaligned"])
def test_layouts(isa, layout):
    for dtype in (torch.float32, torch.bfloat16):
        i = rms_norm_inputs((17, 40), ranks=(3,), layout=layout, dtype=dtype)
        check_rms_norm(i, "cpu")
        y, s = rms_norm(i.x, i.weight, lora_as=i.lora_as, backend="cpu")
        assert y.is_contiguous() and s.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_of_another_dtype(isa, dtype):
    for other in {*DTYPES, torch.float64} - {dtype}:
        i = rms_norm_inputs(dtype=dtype, weight_dtype=other, adapter_dtype=other, ranks=(3,))
        check_rms_norm(i, "cpu")
        found = rms_norm_op(i, "cpu")
        assert (found["y"].dtype, found["s"].dtype, found["dweight"].dtype) == (dtype, dtype, other)


def test_rows_that_are_no_numbers(isa):
    x = torch.ones(4, 20)
    x[1, 2], x[2, 19] = math.nan, -math.inf
    w = torch.full((20,), 0.5)
    want = torch.nn.functional.rms_norm(x, (20,), w, 1e-6)
    y = rms_norm(x, w, backend="cpu")
    assert torch.equal(y.isnan(), want.isnan()) and y[[0, 3]].isfinite().all()
    zero = torch.zeros(2, 20)
    assert torch.equal(rms_norm(zero, w, backend="cpu"), zero)
    assert rms_norm(zero, w, 0.0, backend="cpu").isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_and_small_values(isa, dtype):
    for size in (6e4 if dtype == torch.float16 else 1e18, 1e-7, 0.0):
        i = rms_norm_inputs((3, 40), dtype=dtype, eps=1e-6)
        i = dataclasses.replace(i, x=(i.x.sign() * size).to(dtype))
        check_rms_norm(i, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_see_the_others(isa, dtype, threads):
    i = rms_norm_inputs((67, 1000), ranks=(5, 20), dtype=dtype)
    x = i.x.requires_grad_()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        y, s = rms_norm(x, i.weight, lora_as=i.lora_as, backend="cpu")
        found.append((y.detach(), s, torch.autograd.grad(y, x, x.detach())[0]))
    for some in (slice(0, 1), slice(5, 38), slice(66, 67)):
        part = i.x[some].detach().requires_grad_()
        y, s = rms_norm(part, i.weight, lora_as=i.lora_as, backend="cpu")
        alone = (y.detach(), s, torch.autograd.grad(y, part, part.detach())[0])
        for whole in found:
            assert all(torch.equal(a, b[some]) for a, b in zip(alone, whole, strict=True))


def test_the_gradient_of_the_weight_does_not_see_the_threads(isa, threads):
    for rows in (1, 33, 300, 9000):
        i = rms_norm_inputs((rows, 72), dtype=torch.bfloat16)
        check_rms_norm(i, "cpu")
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(rms_norm_op(i, "cpu")["dweight"])
        assert torch.equal(*found)


def test_s_is_that_of_lora_linear(isa):
    """With W = 0 and B of ones and zeros, lora_linear gives S itself."""
    for dtype in (torch.float32, torch.bfloat16):
        i = rms_norm_inputs((70, 96), ranks=(5,), dtype=dtype)
        y, s = rms_norm(i.x, i.weight, lora_as=i.lora_as, backend="cpu")
        w, b = torch.zeros(5, 96, dtype=dtype), torch.eye(5, dtype=dtype)
        whole = lora_linear(y, w, i.lora_as[0], b, 1.0, backend="cpu")
        assert_within_budget(s, whole.double(), whole)


@pytest.mark.parametrize("wrong", ["eps", "offset", "weight", "adapter"])
def test_a_planted_fault_is_found(isa, wrong):
    i = rms_norm_inputs(ranks=(4, 2), dtype=torch.bfloat16)
    changed = {
        "eps": {"eps": 1e-6},
        "offset": {"offset": 1.0},
        "weight": {"weight": i.weight.roll(1)},
        "adapter": {"lora_as": i.lora_as[::-1]},
    }[wrong]
    oracle, low = results(i, wide=True), results(i, wide=False)
    got = rms_norm_op(dataclasses.replace(i, **changed), "cpu")
    for name in ("s",) if wrong == "adapter" else ("y", "s", "dx"):
        with pytest.raises(BudgetExceededError):
            assert_within_budget(got[name], oracle[name], low[name])


def test_opcheck():
    i = rms_norm_inputs(ranks=(3, 2), layout="permuted", dtype=torch.bfloat16)
    fwd = torch.ops.lora_kernels.rms_norm_fwd.default
    bwd = torch.ops.lora_kernels.rms_norm_bwd.default
    for weight in (i.weight, None):
        for lora_as in (i.lora_as, []):
            opcheck(fwd, (i.x, weight, lora_as, 1e-6, 1.0, "cpu"))
        opcheck(bwd, (i.x, i.x, weight, torch.ones(17), 1.0, True, "cpu"))
