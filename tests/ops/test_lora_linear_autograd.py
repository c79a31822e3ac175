"""lora_linear under autograd and autocast: what is saved, replayed, refused."""

from __future__ import annotations

import copy

import pytest
import torch

from lora_kernels.ops import grouped_lora_linear, lora_linear
from lora_kernels.testing import (
    LoraLinearInputs,
    LoraLinearResults,
    compare,
    lora_linear_inputs,
    lora_linear_op,
    lora_linear_results,
    poisoned_empty,
)


def leaves_of(i: LoraLinearInputs) -> list[torch.Tensor]:
    ts = (i.x, i.weights[0], i.lora_as[0], i.lora_bs[0], i.biases[0])
    return [t.clone().requires_grad_() for t in ts]


def call(i: LoraLinearInputs, backend: str, x, w, a, b, bias) -> torch.Tensor:
    return lora_linear(
        x, w, a, b, i.scalings[0],
        bias=bias, dropout_p=i.dropout_p, seed=i.seed, backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("dy_requires_grad", [False, True])
def test_double_backward_is_refused(backend, require, dy_requires_grad):
    """Also where the incoming gradient is a constant: a penalty must not lose its gradient."""
    i = lora_linear_inputs(9, 20, 33, 3, torch.float32)
    require(i)
    leaves = leaves_of(i)
    y = call(i, backend, *leaves)
    dy = i.dys[0].requires_grad_(dy_requires_grad)
    (dx,) = torch.autograd.grad(y, leaves[0], dy, create_graph=True)
    penalty = (leaves[2] ** 2).sum() + dx.square().sum()
    with pytest.raises(NotImplementedError, match="second derivatives are not implemented") as e:
        penalty.backward()
    assert "\n" not in str(e.value)


def test_create_graph_alone_is_allowed(backend, require):
    i = lora_linear_inputs(9, 20, 33, 3, torch.float32)
    require(i)
    leaves = leaves_of(i)
    got = torch.autograd.grad(call(i, backend, *leaves), leaves, i.dys[0], create_graph=True)
    want = torch.autograd.grad(call(i, backend, *leaves), leaves, i.dys[0])
    assert all(torch.equal(p, q) for p, q in zip(got, want, strict=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_tensors_are_never_written(backend, require, dtype, dropout_p):
    i = lora_linear_inputs((3, 11), 40, (50, 18), (8, 3), dtype, dropout_p=dropout_p)
    require(i)
    saved: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved.append((t, t.detach().clone(), t._version))
        return t

    leaves = [t.requires_grad_() for t in (i.x, *i.lora_as, *i.lora_bs)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ys = grouped_lora_linear(
            i.x, i.weights, i.lora_as, i.lora_bs, i.scalings,
            biases=i.biases, dropout_p=dropout_p, seed=i.seed, backend=backend,
        )  # fmt: skip
    dys = [dy.clone() for dy in i.dys]
    assert saved
    first = torch.autograd.grad(ys, leaves, dys, retain_graph=True)
    second = torch.autograd.grad(ys, leaves, dys)
    for t, before, version in saved:
        assert t._version == version
        assert torch.equal(t, before)
    for got, given in zip(dys, i.dys, strict=True):
        assert torch.equal(got, given), "the incoming gradient was written"
    for p, q in zip(first, second, strict=True):
        assert torch.equal(p, q), "the second backward differs"


def test_nothing_of_the_size_of_the_output_is_saved(backend, require):
    """Kept for backward: x, S and the parameters; no mask, no dropped x, no [M, N]."""
    m, k, n, r = 64, 40, 50, 8
    i = lora_linear_inputs(m, k, n, r, torch.float32, dropout_p=0.2)
    require(i)
    sizes = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(i, backend, *leaves_of(i))
    assert sorted(sizes) == sorted([m * k, n * k, r * k, n * r, m * r, 1])


def test_writing_a_saved_tensor_is_detected(backend, require):
    i = lora_linear_inputs(9, 20, 33, 3, torch.float32)
    require(i)
    leaves = leaves_of(i)
    x = leaves[0] * 1.0
    y = call(i, backend, x, *leaves[1:])
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(i.dys[0])


def test_gradients_accumulate(backend, require):
    i = lora_linear_inputs(9, 20, 33, 3, torch.float32)
    require(i)
    leaves = leaves_of(i)
    for _ in range(2):
        call(i, backend, *leaves).backward(i.dys[0])
    once = lora_linear_op(i, backend)
    assert torch.equal(leaves[2].grad, 2 * once.das[0])
    assert torch.equal(leaves[3].grad, 2 * once.dbs[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(backend, require, mode):
    i = lora_linear_inputs(9, 20, 33, 3, torch.float32)
    require(i)
    leaves = leaves_of(i)
    with mode():
        y = call(i, backend, *leaves)
    assert not y.requires_grad
    assert torch.equal(y, call(i, backend, *leaves).detach())


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_autocast(backend, require, adapter_dtype, dropout_p):
    """fp32 parameters in a bf16 region: bf16 output, every gradient in the dtype of its leaf."""
    inputs = lora_linear_inputs(33, 40, 50, 8, torch.float32, dropout_p=dropout_p)
    low = lora_linear_inputs(33, 40, 50, 8, torch.bfloat16, dropout_p=dropout_p)
    require(low)
    i = copy.copy(inputs)
    i.lora_as[0], i.lora_bs[0] = (t.to(adapter_dtype) for t in (i.lora_as[0], i.lora_bs[0]))
    leaves = leaves_of(i)
    with poisoned_empty():
        with torch.autocast("cpu", torch.bfloat16):
            y = call(i, backend, *leaves)
        y.backward(i.dys[0].bfloat16())
    assert y.dtype == torch.bfloat16
    assert [t.grad.dtype for t in leaves] == [t.dtype for t in leaves]
    x, w, a, b, bias = leaves
    actual = LoraLinearResults(
        ys=[y.detach()], dx=x.grad, dws=[w.grad], das=[a.grad], dbs=[b.grad], dbiases=[bias.grad]
    )
    i.dys[0] = i.dys[0].bfloat16()
    oracle = lora_linear_results(i, torch.float64)
    compare(actual, oracle, lora_linear_results(i, torch.bfloat16))


def test_autocast_leaves_fp64_alone(backend, require):
    i = lora_linear_inputs(9, 20, 33, 3, torch.float64)
    require(i)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(i, backend, *leaves_of(i))
    assert y.dtype == torch.float64
    assert torch.equal(y.detach(), lora_linear_op(i, backend, "").ys[0])


def test_backward_outside_of_the_autocast_region_equals_inside(backend, require):
    i = lora_linear_inputs(33, 40, 50, 8, torch.float32)
    require(lora_linear_inputs(33, 40, 50, 8, torch.bfloat16))
    grads = []
    for inside in (True, False):
        leaves = leaves_of(i)
        with torch.autocast("cpu", torch.bfloat16):
            y = call(i, backend, *leaves)
            if inside:
                y.backward(i.dys[0].bfloat16())
        if not inside:
            y.backward(i.dys[0].bfloat16())
        grads.append([t.grad for t in leaves])
    for p, q in zip(*grads, strict=True):
        assert torch.equal(p, q)


def test_fp32_gradient_for_a_low_precision_output(backend, require):
    """A loss in fp32 may hand back dY in a wider dtype through a custom hook."""
    i = lora_linear_inputs(9, 20, 33, 3, torch.bfloat16)
    require(i)
    leaves = leaves_of(i)
    y = call(i, backend, *leaves)
    (y.float() * i.dys[0].float()).sum().backward()
    want = lora_linear_op(i, backend)
    assert torch.equal(leaves[0].grad, want.dx)


def test_deepcopied_parameters_give_the_same(backend, require):
    i = lora_linear_inputs(9, 20, 33, 3, torch.float32)
    require(i)
    other = copy.deepcopy(i)
    first, second = (lora_linear_op(j, backend).named() for j in (i, other))
    assert all(torch.equal(t, second[name]) for name, t in first.items())
