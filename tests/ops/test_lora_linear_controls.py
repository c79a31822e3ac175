"""Negative controls: each planted mistake must break the budget, or the tests prove nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from lora_kernels.testing import (
    BudgetExceededError,
    LoraLinearInputs,
    LoraLinearResults,
    assert_within_budget,
    compare,
    lora_linear_inputs,
    lora_linear_op,
    lora_linear_results,
    poisoned_empty,
    yardstick,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def judge(inputs: LoraLinearInputs, actual: LoraLinearResults) -> None:
    oracle = lora_linear_results(inputs, torch.float64)
    compare(actual, oracle, yardstick(inputs, oracle))


def make(dtype: torch.dtype) -> LoraLinearInputs:
    return lora_linear_inputs(65, 70, (45, 45), (8, 8), dtype, dropout_p=0.1, scaling=(0.7, 1.3))


MISTAKES: dict[str, Callable[[LoraLinearInputs], LoraLinearInputs]] = {
    "dropped LoRA term": lambda i: replace(i, scalings=[0.0, 0.0]),
    "dropped LoRA term of one member": lambda i: replace(i, scalings=[0.7, 0.0]),
    "scale wrong by 5 %": lambda i: replace(i, scalings=[1.05 * s for s in i.scalings]),
    "wrong sign of the scale": lambda i: replace(i, scalings=[-s for s in i.scalings]),
    "swapped scales": lambda i: replace(i, scalings=i.scalings[::-1]),
    "mask shifted to the next seed": lambda i: replace(i, seed=i.seed + 1),
    "no dropout": lambda i: replace(i, dropout_p=0.0),
    "dropout with another rate": lambda i: replace(i, dropout_p=0.11),
    "dropped bias": lambda i: replace(i, biases=[None, None]),
    "swapped biases": lambda i: replace(i, biases=i.biases[::-1]),
    "swapped A": lambda i: replace(i, lora_as=i.lora_as[::-1]),
    "swapped B": lambda i: replace(i, lora_bs=i.lora_bs[::-1]),
    "swapped members": lambda i: replace(i, weights=i.weights[::-1]),
    "last rank left out": lambda i: replace(
        i, lora_as=[torch.cat([a[:-1], torch.zeros_like(a[-1:])]) for a in i.lora_as]
    ),
    "last column of x left out": lambda i: replace(
        i, x=torch.cat([i.x[:, :-1], torch.zeros_like(i.x[:, -1:])], 1)
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_unspoilt_op_passes(dtype):
    judge(make(dtype), lora_linear_op(make(dtype), "aten"))


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mistake_is_noticed_in_the_output(dtype, mistake):
    inputs = make(dtype)
    wrong = lora_linear_op(MISTAKES[mistake](inputs), "aten")
    with pytest.raises(BudgetExceededError, match=r"y\[[01]\]: error max"):
        judge(inputs, replace(wrong, dx=wrong.dx.new_empty(0)))


@pytest.mark.parametrize(
    "mistake", [m for m in MISTAKES if "bias" not in m and "column of x" not in m]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mistake_is_noticed_in_a_gradient(dtype, mistake):
    inputs = make(dtype)
    wrong = lora_linear_op(MISTAKES[mistake](inputs), "aten", "xab")
    with pytest.raises(BudgetExceededError, match=r"(dx|d[ab]\[[01]\]): error max"):
        judge(inputs, replace(wrong, ys=[]))


def test_mask_shifted_by_one_column_is_noticed():
    """The mask of column k + 1 used for column k: the whole update has the right statistics."""
    inputs = lora_linear_inputs(65, 70, 45, 8, torch.bfloat16, dropout_p=0.1)
    rolled = replace(
        inputs,
        x=inputs.x.roll(1, 1),
        weights=[w.roll(1, 1) for w in inputs.weights],
        lora_as=[a.roll(1, 1) for a in inputs.lora_as],
    )
    wrong = lora_linear_op(rolled, "aten", "")
    with pytest.raises(BudgetExceededError, match=r"y\[0\]: error max"):
        judge(inputs, wrong)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_wrong_element_is_noticed(dtype):
    inputs = lora_linear_inputs(129, 70, 45, 8, dtype)
    result = lora_linear_op(inputs, "aten", "")
    result.ys[0][128, 44] += 1.0
    with pytest.raises(BudgetExceededError, match=r"worst at \(128, 44\)"):
        judge(inputs, result)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_error_everywhere_is_noticed(dtype):
    """Ten roundings more than plain PyTorch makes, in every element, none of them an outlier."""
    want = torch.randn(500, 50, dtype=torch.float64)
    low = want.to(dtype)
    step = torch.where(torch.rand_like(want) < 0.5, -1.0, 1.0)
    wrong = want * (1 + 5 * torch.finfo(dtype).eps * step)
    with pytest.raises(BudgetExceededError, match="rms"):
        assert_within_budget(wrong, want, low, "y")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_is_noticed(value):
    want = torch.zeros(3, 4, dtype=torch.float64)
    actual = want.float()
    actual[1, 2] = value
    with pytest.raises(BudgetExceededError, match=r"1 of 12 elements are not finite, first \(1, 2"):
        assert_within_budget(actual, want, want.float(), "y")


def test_wrong_shape_and_oracle_are_refused():
    want = torch.zeros(3, 4, dtype=torch.float64)
    with pytest.raises(BudgetExceededError, match=r"shape \[4, 3\]"):
        assert_within_budget(torch.zeros(4, 3), want, want.float(), "y")
    with pytest.raises(BudgetExceededError, match="not float64"):
        assert_within_budget(want.float(), want.float(), want.float(), "y")


def test_unwritten_memory_is_noticed():
    def forgets_a_row(x: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x)
        y[:-1] = x[:-1]
        return y

    x = torch.randn(5, 4)
    with poisoned_empty():
        y = forgets_a_row(x)
    with pytest.raises(BudgetExceededError, match="not finite"):
        assert_within_budget(y, x.double(), x, "y")
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("make_empty", ["empty", "empty_like", "new_empty", "empty_strided", "at"])
def test_every_way_to_allocate_is_poisoned(make_empty):
    like = torch.zeros(3, 5, dtype=torch.bfloat16)
    with poisoned_empty():
        made = {
            "empty": lambda: torch.empty(3, 5, dtype=torch.bfloat16),
            "empty_like": lambda: torch.empty_like(like),
            "new_empty": lambda: like.new_empty(3, 5),
            "empty_strided": lambda: torch.empty_strided((3, 5), (1, 3), dtype=torch.bfloat16),
            "at": lambda: torch.ops.aten.empty.memory_format([3, 5], dtype=torch.bfloat16),
        }[make_empty]()
    assert made.isnan().all()
