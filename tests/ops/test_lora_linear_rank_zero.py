"""Members of a group that have no adapter: the frozen layer beside adapted ones."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.library import opcheck

from lora_kernels.errors import BackendUnavailableError, InvalidArgumentError
from lora_kernels.ops import grouped_lora_linear
from lora_kernels.ops.lora_linear import cuda
from lora_kernels.ops.lora_linear import problem as problems
from lora_kernels.testing import (
    BudgetExceededError,
    assert_within_budget,
    check_lora_linear,
    lora_linear_inputs,
    lora_linear_op,
    lora_linear_results,
    poisoned_empty,
    yardstick,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GROUPS = {
    "q-v": ((45, 19, 33), (4, 0, 7)), "k": ((45, 19, 33), (0, 5, 0)), "up": ((64, 64), (0, 16)),
    "gate": ((70, 70), (3, 0)),
}  # fmt: skip


def group(name: str, **options: object):
    n, ranks = GROUPS[name]
    return lora_linear_inputs(37, 70, n, ranks, **options)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GROUPS)
def test_outputs_and_gradients(backend, require, name, dtype, dropout_p):
    inputs = group(name, dtype=dtype, dropout_p=dropout_p)
    require(inputs)
    with poisoned_empty():
        check_lora_linear(inputs, backend)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("m", [0, 1, 513])
def test_rows_and_k_of_several_blocks(backend, require, m, dropout_p):
    inputs = lora_linear_inputs(
        m, 1090, (72, 40), (0, 12), torch.bfloat16, adapter_dtype=torch.float32,
        dropout_p=dropout_p,
    )  # fmt: skip
    require(inputs)
    check_lora_linear(inputs, backend, "xab")


def test_none_is_rank_zero():
    i = group("q-v", dtype=torch.bfloat16, dropout_p=0.3)
    absent = dataclasses.replace(
        i,
        lora_as=[a if len(a) else None for a in i.lora_as],
        lora_bs=[b if len(a) else None for a, b in zip(i.lora_as, i.lora_bs, strict=True)],
    )
    ys = [
        grouped_lora_linear(
            j.x, j.weights, j.lora_as, j.lora_bs, j.scalings, biases=j.biases,
            dropout_p=j.dropout_p, seed=j.seed,
        )
        for j in (i, absent)
    ]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*ys, strict=True))


def test_a_dropped_bias_of_such_a_member_is_found():
    i = group("q-v")
    oracle = lora_linear_results(i, torch.float64)
    low = yardstick(i, oracle)
    got = lora_linear_op(dataclasses.replace(i, biases=[i.biases[0], None, i.biases[2]]), "aten")
    assert_within_budget(got.ys[0], oracle.ys[0], low.ys[0])
    with pytest.raises(BudgetExceededError):
        assert_within_budget(got.ys[1], oracle.ys[1], low.ys[1])


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("name", ["aten", "cpu", "reference"])
def test_opcheck(name, dropout_p):
    i = group("q-v", dropout_p=dropout_p)
    shapes = {"M": 37, "K": 70, "N": (45, 19, 33), "rank": (4, 0, 7), "dropout_p": dropout_p}
    able, why = problems.supports(name, problems.LoraLinearProblem.from_shapes(**shapes))
    if not able:
        pytest.skip(why)
    seed = torch.tensor(3) if dropout_p else None
    args = (i.weights, i.lora_as, i.lora_bs)
    fwd = torch.ops.lora_kernels.lora_linear_fwd.default
    opcheck(fwd, (i.x, *args, i.biases, i.scalings, dropout_p, seed, name))
    _, s = fwd(i.x, *args, i.biases, i.scalings, dropout_p, seed, name)
    opcheck(
        torch.ops.lora_kernels.lora_linear_bwd.default,
        (i.dys, i.x, *args, s, i.scalings, dropout_p, seed, True, True, True, name),
    )


def test_compiled():
    i = group("up", dtype=torch.bfloat16)
    x = i.x.requires_grad_()

    def call(x: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            grouped_lora_linear(
                x, i.weights, [None, i.lora_as[1]], [None, i.lora_bs[1]], [1.0, 0.7]
            ),
            -1,
        )

    graph = torch.compile(call, fullgraph=True, backend="aot_eager")
    want, got = call(x), graph(x)
    assert torch.equal(want, got)
    grads = [torch.autograd.grad(y.float().square().sum(), x)[0] for y in (want, got)]
    assert torch.equal(*grads)


def test_other_kernels_say_that_they_want_an_adapter():
    with pytest.raises(BackendUnavailableError, match=r"a member has no adapter \(rank 0\)"):
        lora_linear_op(group("up"), "triton")
    shapes = {"M": 4, "K": 8, "N": (8, 8), "rank": (0, 4), "dtype": torch.bfloat16}
    problem = problems.LoraLinearProblem.from_shapes(**shapes, device="cuda", dropout_p=0.1)
    able, why = cuda.supports(problem)
    assert not able and "take without dropout" in why


def test_messages():
    t = torch.zeros
    x, w = t(3, 8), [t(5, 8), t(6, 8)]
    a, b = t(2, 8), t(5, 2)
    for lora_as, lora_bs, message in (
        ([None, None], [None, None], "no member has an adapter; accepted: r >= 1"),
        ([t(0, 8), None], [t(5, 0), None], "no member has an adapter; accepted: r >= 1"),
        ([a, None], [b, t(6, 2)], r"lora_a\[1\] is a NoneType; accepted: torch.Tensor"),
        ([a, t(1, 8)], [b, None], r"lora_b\[1\] is a NoneType; accepted: torch.Tensor"),
        ([a, t(0, 7)], [b, t(6, 0)], r"lora_a\[1\] has shape \[0, 7\]; accepted: \[r >= 0, 8\]"),
        ([a, t(0, 8)], [b, t(6, 1)], r"lora_b\[1\] has shape \[6, 1\]; accepted: \[6, 0\]"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            grouped_lora_linear(x, w, lora_as, lora_bs, [1.0, 1.0])
    with pytest.raises(InvalidArgumentError, match="lora_a is a NoneType"):
        grouped_lora_linear(x, w[:1], [None], [None], [1.0])
