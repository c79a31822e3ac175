"""Dropout of lora_linear: one mask for every backend, replayed by a recomputed forward."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lora_kernels.ops import grouped_lora_linear, lora_linear
from lora_kernels.ops._philox import keep_mask, keep_scale
from lora_kernels.testing import LoraLinearInputs, lora_linear_inputs, lora_linear_op

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def exposing(m: int, k: int, dtype: torch.dtype, p: float, seed: int) -> LoraLinearInputs:
    """W = 0 and A = B = I: the output of a row of ones is its mask."""
    eye, zero = torch.eye(k, dtype=dtype), torch.zeros(k, k, dtype=dtype)
    ones = torch.ones(m, k, dtype=dtype)
    return LoraLinearInputs(
        x=ones, weights=[zero, zero], lora_as=[eye, eye], lora_bs=[eye, eye],
        biases=[None, None], scalings=[1.0, 1.0], dropout_p=p, seed=seed, dys=[ones, ones],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize(("m", "k"), [(1, 1), (5, 31), (67, 200)])
@pytest.mark.parametrize("seed", [0, 2**31 + 5, 2**62 + 12345])
def test_every_backend_draws_the_documented_mask(backend, require, dtype, p, m, k, seed):
    inputs = exposing(m, k, dtype, p, seed)
    require(inputs)
    result = lora_linear_op(inputs, backend, "xab")
    masks = [keep_mask(torch.tensor(seed), m, k, p, g) for g in (0, 1)]
    kept = torch.tensor(keep_scale(p)).to(dtype)
    for g in (0, 1):
        assert torch.equal(result.ys[g] != 0, masks[g]), f"forward, member {g}"
        assert ((result.ys[g] == 0) | ((result.ys[g] - kept).abs() <= 0.02 * kept)).all()
    assert torch.equal(result.dx != 0, masks[0] | masks[1]), "dX"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_a_sees_the_same_mask(backend, require, dtype):
    """With dY = I the rows of dA and of dB are the rows of x * mask."""
    m = k = 90
    inputs = exposing(m, k, dtype, 0.3, 77)
    require(inputs)
    inputs.dys[:] = [torch.eye(m, dtype=dtype)] * 2
    result = lora_linear_op(inputs, backend, "ab")
    for g in (0, 1):
        mask = keep_mask(torch.tensor(77), m, k, 0.3, g)
        assert torch.equal(result.das[g] != 0, mask)
        assert torch.equal(result.dbs[g] != 0, mask)


@pytest.mark.parametrize("m", [700, 2049])
def test_mask_does_not_depend_on_the_blocking(backend, require, m):
    """Row m of a large problem drops what row m of a small one drops."""
    big, small = (exposing(rows, 140, torch.float32, 0.2, 9) for rows in (m, 33))
    require(big)
    y_big, y_small = (lora_linear_op(i, backend, "").ys[0] for i in (big, small))
    assert torch.equal(y_big[:33] != 0, y_small != 0)
    assert torch.equal(y_big != 0, keep_mask(torch.tensor(9), m, 140, 0.2))


def args(i: LoraLinearInputs) -> tuple[torch.Tensor, ...]:
    return i.x, i.weights[0], i.lora_as[0], i.lora_bs[0]


def test_seed_comes_from_the_generator_of_torch(backend, require):
    i = lora_linear_inputs(33, 40, 50, 8, torch.float32)
    require(i)

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return lora_linear(*args(i), 0.7, dropout_p=0.5, backend=backend)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    torch.manual_seed(1)
    first = lora_linear(*args(i), 0.7, dropout_p=0.5, backend=backend)
    assert not torch.equal(first, lora_linear(*args(i), 0.7, dropout_p=0.5, backend=backend))


def test_no_dropout_leaves_the_generator_alone():
    i = lora_linear_inputs(3, 40, 50, 8, torch.float32)
    before = torch.get_rng_state()
    lora_linear(*args(i), 0.7)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("form", ["int", "tensor", "tensor of one"])
def test_forms_of_a_seed(backend, require, form):
    i = lora_linear_inputs(33, 40, 50, 8, torch.float32)
    require(i)
    seed = {"int": 5, "tensor": torch.tensor(5), "tensor of one": torch.tensor([5])}[form]
    want = lora_linear(*args(i), 0.7, dropout_p=0.5, seed=5, backend=backend)
    assert torch.equal(want, lora_linear(*args(i), 0.7, dropout_p=0.5, seed=seed, backend=backend))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpointing_replays_the_mask(backend, require, dtype, use_reentrant):
    i = lora_linear_inputs(33, 70, (50, 20), 8, dtype, dropout_p=0.5)
    require(i)

    def gradients(recompute: bool) -> list[torch.Tensor]:
        torch.manual_seed(11)
        leaves = [t.clone().requires_grad_() for t in (i.x, *i.lora_as, *i.lora_bs)]

        def layer(x, a0, a1, b0, b1):
            ys = grouped_lora_linear(
                x, i.weights, (a0, a1), (b0, b1), i.scalings, dropout_p=0.5, backend=backend
            )
            return tuple(ys)

        ys = (
            checkpoint(layer, *leaves, use_reentrant=use_reentrant) if recompute else layer(*leaves)
        )
        torch.autograd.backward(list(ys), i.dys)
        return [*(y.detach() for y in ys), *(t.grad for t in leaves)]

    for stored, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(stored, recomputed)


def test_expectation_is_the_layer_without_dropout():
    """The mean over many masks tends to the undropped update, within 6 standard errors."""
    i = lora_linear_inputs(1, 60, 4, 3, torch.float64, bias=False)
    want = lora_linear(*args(i), 0.7)
    draws = torch.stack(
        [lora_linear(*args(i), 0.7, dropout_p=0.5, seed=s, backend="aten") for s in range(600)]
    )
    error = (draws.mean(0) - want).abs()
    assert (error < 6 * draws.std(0) / 600**0.5).all()
