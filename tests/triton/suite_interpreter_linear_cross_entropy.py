"""The Triton kernel of linear_cross_entropy in Triton's interpreter, against the fp64 formula.

Not collected by itself: suite_runner.py runs this file in a process of its own.
"""

from __future__ import annotations

import pytest
import torch

import lora_kernels as lk
from lora_kernels.errors import BackendUnavailableError
from lora_kernels.ops.linear_cross_entropy import aten, chunks
from lora_kernels.ops.linear_cross_entropy import triton as host
from lora_kernels.testing import (
    BudgetExceededError,
    assert_within_budget,
    check_linear_cross_entropy,
    linear_cross_entropy_inputs,
    linear_cross_entropy_op,
    poisoned_empty,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "capped": {"softcap": 2.0},
    "z_loss": {"z_loss": 0.05},
    "everything": {"label_smoothing": 0.3, "softcap": 1.5, "z_loss": 0.02, "shift": True},
}


def check(*args, needs=None, **kwargs) -> None:
    i = linear_cross_entropy_inputs(*args, **kwargs)
    with poisoned_empty():
        check_linear_cross_entropy(i, "triton", needs)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_oracle(dtype, options):
    for reduction in ("mean", "none"):
        check(dtype=dtype, reduction=reduction, weighted=True, **options)


@pytest.mark.parametrize("V", [1, 2, 16, 17, 1000, 4096, 4097])
def test_vocabularies(V):
    check((5,), 20, V, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("V", "block"), [(130, 32), (128, 32), (31, 32)], ids=["with a tail", "whole", "tail alone"]
)
def test_several_blocks_of_a_row(monkeypatch, V, block):
    monkeypatch.setattr(host, "_BLOCK", block)
    check((7,), 20, V, **OPTIONS["everything"] | {"shift": False})
    check((7,), 20, V, needs=("hidden",))


def test_several_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "_CHUNK_ELEMENTS", 0)
    monkeypatch.setattr(chunks, "_LEAST_ROWS", 4)
    check((13,), 20, 67, dtype=torch.bfloat16, weighted=True)


def test_rows_that_begin_at_cache_lines(monkeypatch):
    """As buffers are on a GPU: the stride of a row is more than the vocabulary."""

    def buffer(hidden, rows, vocabulary):
        return hidden.new_full((rows, 128), float("nan"))[:, :vocabulary]

    monkeypatch.setattr(chunks, "_buffer", buffer)
    check((9,), 20, 67, dtype=torch.bfloat16, label_smoothing=0.1)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, None])
def test_adapters(adapter_dtype):
    check(rank=5, dtype=torch.bfloat16, adapter_dtype=adapter_dtype, needs=("lora_a", "lora_b"))
    check(rank=0, bias=False, dtype=torch.bfloat16)


def test_nothing_counts():
    check(ignored=1.0, reduction="sum")
    i = linear_cross_entropy_inputs(ignored=1.0, ignore_index=3)
    assert bool(linear_cross_entropy_op(i, "triton")["loss"].isnan())


def rows(z, labels, g=None, ignore=-100, **changes):
    options = {"label_smoothing": 0.0, "softcap": 0.0, "z_loss": 0.0, **changes}
    return host._Rows(ignore, **options)(z, labels, g)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0, 1e4])
def test_softcap_of_small_and_large_logits(scale):
    """tanh is made of exponentials, and must not cancel where it is close to its argument."""
    torch.manual_seed(3)
    z = torch.randn(4, 300, dtype=torch.float64) * scale
    labels, g = torch.tensor([3, 299, 0, 7]), torch.rand(4)
    low = aten._Rows(-100, 0.0, 30.0, 0.0)(z.float(), labels, g)
    oracle = aten._Rows(-100, 0.0, 30.0, 0.0)(z.clone(), labels, g.double())
    got = rows(z.float(), labels, g, softcap=30.0)
    for mine, exact, other in zip(got, oracle, low, strict=True):
        assert_within_budget(mine, exact, other)


def test_words_that_cannot_be_chosen():
    """-inf before, among and after the others, in whole blocks: torch's own answer."""
    z = torch.randn(3, 9000)
    z[0, :5000] = -torch.inf
    z[1, 4096:] = -torch.inf
    z[2, ::3] = -torch.inf
    labels, g = torch.tensor([6000, 7, 4]), torch.rand(3)
    want = aten._Rows(-100, 0.0, 0.0, 0.0)(z.double(), labels, g.double())
    low = aten._Rows(-100, 0.0, 0.0, 0.0)(z.clone(), labels, g)
    for mine, exact, other in zip(rows(z.clone(), labels, g), want, low, strict=True):
        assert_within_budget(mine, exact, other)


def test_large_logits_do_not_overflow():
    z, labels = torch.full((2, 40), 60000.0).half(), torch.tensor([1, 39])
    losses, _ = rows(z, labels)
    low, _ = aten._Rows(-100, 0.0, 0.0, 0.0)(z, labels, None)
    assert_within_budget(losses, torch.full((2,), 40.0).double().log(), low)


def test_a_label_out_of_range_gives_nan_and_leaves_the_other_rows():
    """The check before the launch reads labels on the CPU only; the kernel has its own."""
    for wrong in (40, -1, 1 << 40):
        z = torch.randn(3, 40)
        losses, dz = rows(z.clone(), torch.tensor([1, wrong, 39]), torch.ones(3))
        assert losses.isnan().tolist() == [False, True, False]
        assert dz.isnan().any(1).tolist() == [False, True, False]


def test_rows_that_do_not_count_have_no_gradient():
    z = torch.full((2, 5000), float("nan"))
    z[1] = 1.0
    losses, dz = rows(z, torch.tensor([-100, 3]), torch.ones(2))
    assert float(losses[0]) == 0.0
    assert not bool(dz[0].any())
    assert bool(dz[1].any())


@pytest.mark.parametrize("option", ["smoothing", "z_loss", "softcap"])
def test_a_planted_fault_is_found(monkeypatch, option):
    """An option that does not reach the kernel."""
    real = host._Rows.__init__

    def lame(self, *args):
        real(self, *args)
        setattr(self, option, 0.0)

    monkeypatch.setattr(host._Rows, "__init__", lame)
    with pytest.raises(BudgetExceededError, match="triton: loss"):
        check(label_smoothing=0.3, softcap=1.5, z_loss=0.1)


def test_a_gradient_of_another_row_is_found(monkeypatch):
    real = host._Rows.__call__

    def shifted(self, z, labels, coefficients):
        return real(self, z, labels, None if coefficients is None else coefficients.roll(1))

    monkeypatch.setattr(host._Rows, "__call__", shifted)
    with pytest.raises(BudgetExceededError, match="triton: d"):
        check(weighted=True)


def test_explain_and_refusals():
    told = lk.explain("linear_cross_entropy", backend="triton", M=4, K=8, V=10)
    assert told["backend"] == "triton"
    assert lk.explain("linear_cross_entropy", M=4, K=8, V=10)["backend"] != "triton"
    with pytest.raises(BackendUnavailableError, match="float64 is not supported"):
        lk.explain("linear_cross_entropy", backend="triton", M=4, K=8, V=10, dtype="float64")
