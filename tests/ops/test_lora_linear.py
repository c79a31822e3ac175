"""lora_linear against an fp64 oracle: every output, every gradient, every backend."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from lora_kernels.ops import grouped_lora_linear, lora_linear
from lora_kernels.testing import (
    LAYOUTS,
    assert_within_budget,
    check_lora_linear,
    lora_linear_inputs,
    lora_linear_op,
    lora_linear_results,
    poisoned_empty,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RANKS = (1, 3, 4, 8, 12, 16, 24, 64, 100, 128, 256)


def check(inputs, backend, require, needs="xwabc"):
    require(inputs)
    with poisoned_empty():
        return check_lora_linear(inputs, backend, needs)


def test_signal_of_the_adapter_is_as_large_as_the_base():
    i = lora_linear_inputs(64, 96, 80, 8)
    base = i.x @ i.weights[0].t()
    update = i.scalings[0] * (i.x @ i.lora_as[0].t() @ i.lora_bs[0].t())
    assert 0.5 < (update.norm() / base.norm()).item() < 2.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", RANKS)
def test_ranks(backend, require, dtype, rank):
    check(lora_linear_inputs(37, 70, 45, rank, dtype), backend, require)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [0, 1, 7, 127, 129])
def test_rows(backend, require, dtype, m):
    check(lora_linear_inputs(m, 65, 131, 12, dtype), backend, require)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows(backend, require, dtype):
    check(lora_linear_inputs(4097, 96, 72, 16, dtype), backend, require)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("k", "n"), [(1, 1), (1, 67), (67, 1), (2, 3), (31, 33), (129, 257), (255, 63), (520, 136)]
)
def test_features_that_fit_no_tile(backend, require, dtype, k, n):
    check(lora_linear_inputs(33, k, n, 5, dtype), backend, require)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_features(backend, require, dtype):
    check(lora_linear_inputs(70, 1537, 1025, 16, dtype), backend, require)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_fp32_adapter_over_low_precision_base(backend, require, dtype, dropout_p):
    inputs = lora_linear_inputs(
        130, 70, 45, 12, dtype, adapter_dtype=torch.float32, dropout_p=dropout_p
    )
    check(inputs, backend, require)
    result = lora_linear_op(inputs, backend)
    for grad in (result.das[0], result.dbs[0]):
        assert grad.dtype == torch.float32
        if backend != "reference":  # its formulas stay in the dtype of x
            rounded = grad.to(dtype).float()
            assert not torch.equal(grad, rounded), "a sum over rows was rounded to the base dtype"
    assert result.ys[0].dtype == result.dx.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_bias(backend, require, dtype):
    check(lora_linear_inputs(33, 40, 50, 8, dtype, bias=False), backend, require)


@pytest.mark.parametrize("scaling", [0.0, -1.5, 16.0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scaling(backend, require, dtype, scaling):
    check(lora_linear_inputs(33, 40, 50, 8, dtype, scaling=scaling), backend, require)


@pytest.mark.parametrize("lead", [(), (5,), (2, 9), (2, 3, 4), (2, 0, 3), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_leading_shapes(backend, require, dtype, lead):
    inputs = lora_linear_inputs(lead, 40, 50, 8, dtype)
    check(inputs, backend, require)
    result = lora_linear_op(inputs, backend)
    assert result.ys[0].shape == (*lead, 50)
    assert result.dx.shape == (*lead, 40)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_layouts(backend, require, dtype, layout, dropout_p):
    inputs = lora_linear_inputs((3, 11), 70, 45, 12, dtype, layout=layout, dropout_p=dropout_p)
    check(inputs, backend, require)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_around_a_slice_stays_outside(backend, require, dtype):
    if backend in ("reference", "aten"):
        pytest.skip("torch's bf16 GEMM on the CPU multiplies what lies past a row by zero")
    inputs = lora_linear_inputs(33, 45, 46, 5, dtype).with_layout("sliced", float("nan"))
    check(inputs, backend, require, "xab")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_expanded_output_gradient(backend, require, dtype):
    """The gradient of a sum has stride 0 in every axis."""
    inputs = lora_linear_inputs(33, 40, 50, 8, dtype)
    require(inputs)
    x = inputs.x.clone().requires_grad_()
    lora_linear(
        x, inputs.weights[0], inputs.lora_as[0], inputs.lora_bs[0], 0.7, backend=backend
    ).sum().backward()
    ones = replace(inputs, biases=[None], dys=[torch.ones_like(inputs.dys[0])])
    assert torch.equal(x.grad, lora_linear_op(ones, backend).dx)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_of_different_sizes_and_ranks(backend, require, dtype, dropout_p):
    inputs = lora_linear_inputs(
        (2, 33), 70, (45, 16, 130), (8, 3, 24), dtype,
        scaling=(0.5, -2.0, 1.25), dropout_p=dropout_p,
    )  # fmt: skip
    check(inputs, backend, require)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_groups_with_some_biases(backend, require, dtype):
    inputs = lora_linear_inputs(33, 40, (50, 50, 50), 8, dtype)
    inputs.biases[1] = None
    check(inputs, backend, require)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout(backend, require, dtype, dropout_p):
    check(lora_linear_inputs((3, 45), 190, 45, 12, dtype, dropout_p=dropout_p), backend, require)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropping_everything_leaves_the_frozen_layer(backend, require, dtype):
    inputs = lora_linear_inputs(33, 40, 50, 8, dtype, dropout_p=1.0)
    require(inputs)
    result = lora_linear_op(inputs, backend)
    without = lora_linear_op(
        lora_linear_inputs(33, 40, 50, 8, dtype, scaling=0.0, dropout_p=0.0), backend
    )
    assert torch.equal(result.ys[0], without.ys[0])
    assert not result.das[0].any()
    assert not result.dbs[0].any()


SUBSETS = [
    "".join(key for bit, key in enumerate("xwabc") if number >> bit & 1) for number in range(32)
]


@pytest.mark.parametrize("needs", SUBSETS, ids=lambda s: s or "none")
def test_subsets_of_gradients(backend, require, needs):
    inputs = lora_linear_inputs(33, 40, (50, 18), (8, 3), torch.float32, dropout_p=0.2)
    margins = check(inputs, backend, require, needs)
    stems = {name.split("[")[0] for name in margins} - {"y"}
    names = {"x": "dx", "w": "dw", "a": "da", "b": "db", "c": "dbias"}
    assert stems == {names[key] for key in needs}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frozen_b_of_one_member(backend, require, dtype):
    """needs_input_grad may differ from member to member of a group."""
    i = lora_linear_inputs(33, 40, (50, 18), (8, 3), dtype)
    require(i)
    full = lora_linear_op(i, backend)
    a = [t.clone().requires_grad_(g == 0) for g, t in enumerate(i.lora_as)]
    b = [t.clone().requires_grad_(g == 1) for g, t in enumerate(i.lora_bs)]
    ys = grouped_lora_linear(i.x, i.weights, a, b, i.scalings, biases=i.biases, backend=backend)
    torch.autograd.backward(ys, i.dys)
    assert a[1].grad is None
    assert b[0].grad is None
    assert torch.equal(a[0].grad, full.das[0])
    assert torch.equal(b[1].grad, full.dbs[1])


def test_unused_member_of_a_group(backend, require):
    """A member whose output does not reach the loss contributes zero, not an error."""
    i = lora_linear_inputs(33, 40, (50, 18), (8, 3), torch.float32)
    require(i)
    a = [t.clone().requires_grad_() for t in i.lora_as]
    ys = grouped_lora_linear(i.x, i.weights, a, i.lora_bs, i.scalings, backend=backend)
    ys[0].backward(i.dys[0])
    assert a[0].grad.any()
    assert a[1].grad is None or not a[1].grad.any()


def test_random_shapes(backend, require):
    draw = random.Random(7)
    for case in range(24):
        groups = draw.choice([1, 1, 2, 3])
        inputs = lora_linear_inputs(
            tuple(draw.randint(1, 30) for _ in range(draw.randint(0, 3))),
            draw.randint(1, 300),
            tuple(draw.randint(1, 300) for _ in range(groups)),
            tuple(draw.choice(RANKS[:8]) for _ in range(groups)),
            draw.choice(DTYPES),
            bias=draw.random() < 0.5,
            scaling=draw.uniform(-4, 4),
            dropout_p=draw.choice([0.0, 0.0, 0.1, 0.6]),
            layout=draw.choice(LAYOUTS),
            generator_seed=case,
            seed=draw.randrange(2**62),
        )
        check(inputs, backend, require)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("m", "k", "n"), [(513, 2048, 2048), (1024, 1536, 576), (300, 2048, 5632)])
def test_sizes_of_real_layers(backend, require, dtype, m, k, n):
    check(lora_linear_inputs(m, k, n, 16, dtype, dropout_p=0.1), backend, require, "xab")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_run_to_run_bitwise(backend, require, dtype):
    inputs = lora_linear_inputs(257, 130, (67, 40), (16, 5), dtype, dropout_p=0.1)
    require(inputs)
    first, second = (lora_linear_op(inputs, backend).named() for _ in range(2))
    for name, t in first.items():
        assert torch.equal(t, second[name]), name


def test_single_and_grouped_forms_agree(backend, require):
    i = lora_linear_inputs(33, 40, 50, 8, torch.float32, dropout_p=0.3)
    require(i)
    one = lora_linear(
        i.x, i.weights[0], i.lora_as[0], i.lora_bs[0], i.scalings[0],
        bias=i.biases[0], dropout_p=0.3, seed=i.seed, backend=backend,
    )  # fmt: skip
    assert torch.equal(one, lora_linear_op(i, backend).ys[0])


def test_oracle_without_adapter_is_the_frozen_layer():
    i = lora_linear_inputs(33, 40, 50, 8, torch.float64, scaling=0.0)
    want = torch.nn.functional.linear(i.x, i.weights[0], i.biases[0])
    low = lora_linear_results(i, torch.float64, reverse=True)
    assert_within_budget(lora_linear_results(i, torch.float64).ys[0], want, low.ys[0], "y")
