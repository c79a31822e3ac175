"""The cuda backend from autograd to kernels on CPU tensors: the host entry that is compiled into
_cuda.so, here with the kernels in the emulator. Nothing runs on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import emulated_host_entry
import pytest
import torch

from lora_kernels._backends import cuda as loader
from lora_kernels.ops.lora_linear import cuda, problem
from lora_kernels.testing import (
    BudgetExceededError,
    check_lora_linear,
    compare,
    lora_linear_inputs,
    lora_linear_op,
    lora_linear_results,
    poisoned_empty,
    yardstick,
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


@pytest.mark.parametrize("ranks", [(4, 0, 7), (0, 8, 0), (0, 0, 3)], ids=str)
def test_members_without_an_adapter(ranks):
    """S, dS and their padded columns are those of the adapted members."""
    for needs in ("xwabc", "x", "a", "b"):
        check((2, 17), 48, (40, 16, 33), ranks, BF16, needs=needs, scaling=(0.5, -2.0, 1.25))
    with pytest.raises(RuntimeError, match=r"no adapter \(rank 0\), and there is dropout"):
        check((2, 17), 48, (40, 16, 33), ranks, BF16, needs="", dropout_p=0.25)


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


def given_products(i) -> tuple[torch.Tensor, torch.Tensor]:
    """S and dS of every member side by side."""
    triples = zip(i.dys, i.lora_bs, i.scalings, strict=True)
    ds = [s * (dy @ b.to(dy.dtype)) for dy, b, s in triples]
    return torch.cat([i.x @ a.to(i.x.dtype).t() for a in i.lora_as], 1), torch.cat(ds, 1)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("ranks", [(8, 16), (3, 16)], ids=str)
@pytest.mark.parametrize("slack", [0, 5, 8])
def test_given_products(dtype, ranks, slack):
    """S gives the very bits of the kernels' own S; what it and dS replace is not read. With `slack`
    they are columns of something wider, which the kernels read in place or copy."""
    i = lora_linear_inputs(37, 48, (40, 24), ranks, dtype, scaling=(0.7, -1.3))
    args = [i.x, i.weights, i.lora_as, i.lora_bs, i.biases, i.scalings, 0.0, None]
    ys, s = cuda.lora_linear_fwd(*args)

    def inside(t: torch.Tensor) -> torch.Tensor:
        wide = t.new_full((t.shape[0], t.shape[1] + slack), float("nan"))
        return wide[:, slack:].copy_(t)

    nan = [[torch.full_like(t, float("nan")) for t in ts] for ts in (i.lora_as, i.lora_bs)]
    again, _ = cuda.lora_linear_fwd(*args[:2], nan[0], *args[3:], inside(s))
    assert all(torch.equal(p, q) for p, q in zip(again, ys, strict=True))

    s, ds = map(inside, given_products(i))
    oracle = lora_linear_results(i, torch.float64, needs="xab")
    low = yardstick(i, oracle, "xab")
    args = [i.dys, i.x, i.weights, i.lora_as, nan[1], s, i.scalings, 0.0, None]
    for needs in ((True, True, False), (True, True, True), (False, True, False)):
        with poisoned_empty():
            dx, das, dbs = cuda.lora_linear_bwd(*args, *needs, ds)
        assert len(dbs) == 2 * needs[2]
        compare(replace(oracle, ys=[], dws=[], dbiases=[], dx=dx, das=das, dbs=dbs), oracle, low)
    dx, _, _ = cuda.lora_linear_bwd(*args, True, False, False, ds.roll(1, 0))
    with pytest.raises(BudgetExceededError, match="dx"):
        compare(replace(oracle, ys=[], dws=[], dbiases=[], dx=dx, das=[], dbs=[]), oracle, low)


def test_given_products_that_do_not_fit(emulated):
    i = lora_linear_inputs(9, 48, 40, 8, BF16)
    s, ds = given_products(i)
    forward = [i.x, i.weights, i.lora_as, i.lora_bs, i.biases, i.scalings, 1.0, 0, None, "auto"]
    backward = [
        i.dys, i.x, i.weights, i.lora_as, i.lora_bs, s, i.scalings, 1.0, 0, None,
        True, True, False, "auto",
    ]  # fmt: skip
    for wrong in (s[:, :7], s[:8], s.float()):
        with pytest.raises(RuntimeError, match="shrunk has another shape, dtype or device"):
            emulated.lora_linear_fwd(*forward, wrong)
    with pytest.raises(RuntimeError, match="ds has another shape, dtype or device"):
        emulated.lora_linear_bwd(*backward, ds[:, :7])
    forward[7:9] = [100, torch.tensor(3)]
    with pytest.raises(RuntimeError, match="shrunk is given with dropout"):
        emulated.lora_linear_fwd(*forward, s)


def test_a_library_without_given_products_says_so(monkeypatch):
    """An older _cuda.so: a given S is a reason against it, not a call that fails."""
    monkeypatch.undo()
    monkeypatch.setattr(loader, "device_reason", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    shapes = {"M": 64, "K": 128, "N": 128, "dtype": "bfloat16", "device": "cuda"}
    schema = "lora_linear_fwd(Tensor x) -> (Tensor[] ys, Tensor s)"
    older = SimpleNamespace(
        lora_linear_fwd=SimpleNamespace(
            default=SimpleNamespace(_schema=torch._C.parse_schema(schema))
        )
    )
    monkeypatch.setattr(loader, "load", lambda: (older, ""))
    cuda._given_reason.cache_clear()
    try:
        able, why = cuda.supports(problem.LoraLinearProblem.from_shapes(**shapes, given=True))
        assert (able, why) == (
            False, "the CUDA library predates a given S or dS; rebuild it"
        )  # fmt: skip
        assert cuda.supports(problem.LoraLinearProblem.from_shapes(**shapes))[0]
    finally:
        cuda._given_reason.cache_clear()


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
