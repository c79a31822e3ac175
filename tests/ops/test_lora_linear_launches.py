"""How many operators lora_linear over library GEMMs issues: on a GPU each is a launch.

The arrangement for GPUs is made of ordinary operators and runs on the CPU as well, where the
profiler counts them.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from lora_kernels.testing import check_lora_linear, lora_linear_inputs

aten = importlib.import_module("lora_kernels.ops.lora_linear.aten")
products = importlib.import_module("lora_kernels.ops.lora_linear.products")
# They describe memory or hand out uninitialised memory: no launch on a GPU.
FREE = {
    "aten::t", "aten::transpose", "aten::slice", "aten::as_strided", "aten::empty",
    "aten::new_empty", "aten::split_with_sizes", "aten::resize_", "aten::view", "aten::expand",
    "aten::empty_like", "aten::empty_strided", "aten::detach", "aten::select", "aten::narrow",
    "aten::resolve_conj", "aten::to", "aten::lift_fresh", "aten::reshape", "aten::alias",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _gpu_arrangement(monkeypatch):
    monkeypatch.setattr(products, "on_gpu", lambda t: True)


def launches(work) -> list[str]:
    """The outermost operators that do something, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    events = [e for e in profile.events() if e.name.startswith("aten::")]
    names = []
    for event in events:
        parent = event.cpu_parent
        while parent is not None and not parent.name.startswith("aten::"):
            parent = parent.cpu_parent  # a node of autograd
        if parent is not None:
            continue
        inner = [event]
        # matmul, linear and to are wrappers: what they call counts.
        while inner:
            e = inner.pop(0)
            children = [c for c in e.cpu_children if c.name.startswith("aten::")]
            if e.name in ("aten::matmul", "aten::linear", "aten::to", "aten::_to_copy"):
                inner = children + inner
            elif e.name not in FREE:
                names.append(e.name.removeprefix("aten::"))
    return names


def arguments(n: tuple[int, ...], adapter: torch.dtype, bias: bool):
    i = lora_linear_inputs(
        24, 40, n, (4, 6, 8)[: len(n)], torch.bfloat16, adapter_dtype=adapter, bias=bias
    )
    _, s = aten.lora_linear_fwd(
        i.x, i.weights, i.lora_as, i.lora_bs, i.biases, i.scalings, 0.0, None
    )
    return i, s


def forward(n, adapter=torch.bfloat16, bias=True, given=False) -> list[str]:
    i, s = arguments(n, adapter, bias)
    return launches(
        lambda: aten.lora_linear_fwd(
            i.x, i.weights, i.lora_as, i.lora_bs, i.biases, i.scalings, 0.0, None,
            s if given else None,
        )
    )  # fmt: skip


def backward(n, adapter=torch.bfloat16, needs=(True, True, True), given=False) -> list[str]:
    i, s = arguments(n, adapter, True)
    return launches(
        lambda: aten.lora_linear_bwd(
            i.dys, i.x, i.weights, i.lora_as, i.lora_bs, s, i.scalings, 0.0, None, *needs,
            s if given else None,
        )
    )  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_three_products(bias):
    base = "addmm" if bias else "mm"
    assert forward((33,), bias=bias) == ["mm", base, "addmm_"]


def test_forward_of_a_group_reads_x_once_for_the_shrink():
    assert forward((33, 20, 8)) == ["cat", "mm", *["addmm", "addmm_"] * 3]


def test_wider_adapters_cost_their_own_conversion_and_nothing_of_x():
    assert forward((33,), torch.float32) == ["copy_", "mm", "addmm", "copy_", "addmm_"]


def test_backward_is_five_products():
    assert backward((33,)) == ["addmm_", "mm", "addmm_", "addmm_", "addmm_"]


def test_backward_of_a_group():
    names = backward((33, 20, 8))
    assert len(names) == 1 + 3 * 3 + 2 + 1  # joined A, joined dA apart, one more than a single
    assert names.count("cat") == 1
    assert names.count("split_with_sizes_copy") == 1


@pytest.mark.parametrize(
    ("needs", "count"),
    [((True, False, False), 3), ((False, True, False), 2), ((False, False, True), 1)],
)
def test_what_is_not_needed_is_not_launched(needs, count):
    assert len(backward((33,), needs=needs)) == count


def test_given_products_are_not_launched():
    needs = (True, True, False)
    for n in ((33,), (33, 20, 8)):
        joins = 1 if len(n) > 1 else 0
        assert len(forward(n, given=True)) == len(forward(n)) - 1 - joins
        assert len(backward(n, needs=needs, given=True)) == len(backward(n, needs=needs)) - len(n)
    assert forward((33,), given=True) == ["addmm", "addmm_"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("n", [(33,), (33, 20, 8)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_arrangement_for_gpus_is_right(dtype, n, dropout_p):
    inputs = lora_linear_inputs(90, 70, n, 8, dtype, dropout_p=dropout_p)
    check_lora_linear(inputs, "aten")


def test_masked_rows_are_added_in_chunks(monkeypatch):
    """The chunks of dX see their own rows of the mask."""
    monkeypatch.setattr(products, "_MASKED_CHUNK", 70 * 7)
    check_lora_linear(lora_linear_inputs(90, 70, 33, 8, dropout_p=0.5), "aten")


def test_no_second_output_sized_tensor():
    """The largest allocation of a call beyond its results is smaller than Y and dX."""
    i, s = arguments((64,), torch.bfloat16, False)
    seen: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and not func.is_view and "_." not in str(func):
                seen.append(out.numel())
            return out

    with Sizes():
        aten.lora_linear_fwd(i.x, i.weights, i.lora_as, i.lora_bs, i.biases, i.scalings, 0.0, None)
        aten.lora_linear_bwd(
            i.dys, i.x, i.weights, i.lora_as, i.lora_bs, s, i.scalings, 0.0, None,
            True, True, True,
        )  # fmt: skip
    assert sum(n == 24 * 64 for n in seen) == 1, "Y"
    assert sum(n == 24 * 40 for n in seen) == 1, "dX"
