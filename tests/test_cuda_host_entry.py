"""The cuda backend from autograd to kernels on CPU tensors: the host entry that is compiled into
_cuda.so, here with the kernels in the emulator. Nothing runs on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import emulated_host_entry
import pytest
import torch

from lora_kernels._backends import cuda as loader
from lora_kernels.ops.lora_linear import cuda, problem
from lora_kernels.testing import (
    BudgetExceededError,
    check_lora_linear,
    lora_linear_inputs,
    lora_linear_op,
    poisoned_empty,
)

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def emulated() -> object:
    """torch.ops of the host entry, linked against the emulated kernels."""
    return emulated_host_entry.load("lora_linear")[0]


@pytest.fixture(autouse=True)
def on_the_emulator(emulated: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(loader, "load", lambda: (emulated, ""))
    monkeypatch.setattr(cuda, "supports", lambda _: (True, "emulated"))
    problem._choose.cache_clear()
    yield
    problem._choose.cache_clear()


def check(*args, needs: str = "xwabc", **kwargs) -> None:
    with poisoned_empty():
        check_lora_linear(lora_linear_inputs(*args, **kwargs), "cuda", needs)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("shape", [(1, 8, 8, 8), (33, 40, 56, 5), (70, 72, 45, 16)], ids=str)
def test_oracle(dtype, dropout_p, shape):
    check(*shape, dtype, dropout_p=dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("ranks", [(8, 8, 8), (3, 16, 1)], ids=str)
def test_groups(dropout_p, ranks):
    """Columns of the members in S, in the padded S and in dS; some need a copy, some do not."""
    check((2, 17), 48, (40, 16, 33), ranks, BF16, dropout_p=dropout_p, scaling=(0.5, -2.0, 1.25))


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.float64], ids=str)
def test_wider_adapters(adapter_dtype):
    check(40, 48, (40, 24), (8, 3), BF16, adapter_dtype=adapter_dtype)
    result = lora_linear_op(
        lora_linear_inputs(40, 48, 24, 8, BF16, adapter_dtype=adapter_dtype), "cuda", "ab"
    )
    assert {t.dtype for t in (*result.das, *result.dbs)} == {adapter_dtype}


@pytest.mark.parametrize("layout", ["sliced", "strided", "permuted", "misaligned"])
def test_layouts(layout):
    check(35, 48, (40, 24), (8, 3), BF16, layout=layout, dropout_p=0.25)


@pytest.mark.parametrize("needs", ["x", "a", "b", "ab", "xa", "xb", "c"])
def test_subsets_of_gradients(needs):
    check(35, 48, (40, 24), 8, BF16, needs=needs)


def test_expanded_output_gradient():
    i = lora_linear_inputs(33, 40, 48, 8, BF16)
    x = i.x.clone().requires_grad_()
    args = (i.weights[0], i.lora_as[0], i.lora_bs[0], 0.7)
    from lora_kernels.ops import lora_linear

    lora_linear(x, *args, backend="cuda").sum().backward()
    i.dys[0] = torch.ones_like(i.dys[0])
    want = lora_linear_op(i, "cuda", "x").dx
    assert torch.equal(x.grad, want)


def test_bias_in_fp32():
    i = lora_linear_inputs(33, 40, 48, 8, BF16)
    want = lora_linear_op(i, "cuda", "").ys[0]
    i.biases[0] = i.biases[0].float()
    assert torch.equal(lora_linear_op(i, "cuda", "").ys[0], want)


def test_what_the_entry_refuses(emulated, monkeypatch):
    i = lora_linear_inputs(33, 40, 48, 8, BF16)
    args = [i.x, i.weights, i.lora_as, i.lora_bs, i.biases, i.scalings, 1.0, 0, None, "auto"]

    def refused(position: int, value: object, message: str) -> None:
        changed = [*args[:position], value, *args[position + 1 :]]
        with pytest.raises(RuntimeError, match=message):
            emulated.lora_linear_fwd(*changed)

    refused(2, [i.lora_as[0][:, :-1]], "do not fit")
    refused(1, [i.weights[0].float()], "weight and x differ in dtype")
    refused(5, [1.0, 1.0], "the lists differ in length")
    refused(0, i.x[0], "x is not two-dimensional")
    refused(7, 100, "dropout needs a seed")
    refused(7, 70000, "threshold is not in")
    refused(9, "sm70", "gemm='sm70' is unknown")
    refused(9, "sm90", "needs compute capability 9.0")
    refused(2, [torch.zeros(300, 40, dtype=BF16)], "do not fit")
    big = [torch.zeros(300, 40, dtype=BF16)], [torch.zeros(48, 300, dtype=BF16)]
    with pytest.raises(RuntimeError, match=r"a rank is not in 1\.\.256"):
        emulated.lora_linear_fwd(i.x, i.weights, *big, *args[4:])


@pytest.mark.parametrize("what", ["scale", "term"])
def test_a_wrong_entry_is_noticed(monkeypatch, emulated, what):
    """The control: another scaling, or an adapter of zeros, must exceed the budget."""
    right = emulated.lora_linear_fwd

    class Wrong:
        lora_linear_bwd = emulated.lora_linear_bwd

        @staticmethod
        def lora_linear_fwd(x, w, a, b, bias, scalings, *rest):
            if what == "scale":
                return right(x, w, a, b, bias, [1.1 * s for s in scalings], *rest)
            return right(x, w, a, [torch.zeros_like(t) for t in b], bias, scalings, *rest)

    monkeypatch.setattr(loader, "load", lambda: (Wrong, ""))
    with pytest.raises(BudgetExceededError):
        check(33, 40, 48, 8, BF16)
