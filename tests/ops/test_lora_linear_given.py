"""lora_linear with S or dS given: the rest of the layer, its gradients, and what is not read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops import _registry, grouped_lora_linear, lora_linear
from lora_kernels.testing import (
    LoraLinearInputs,
    LoraLinearResults,
    compare,
    lora_linear_inputs,
    lora_linear_op,
    lora_linear_results,
    poisoned_empty,
    yardstick,
)

FWD = torch.ops.lora_kernels.lora_linear_fwd.default
BWD = torch.ops.lora_kernels.lora_linear_bwd.default
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture
def ready(backend):
    """Skips, with the backend's own reason, what it does not take with S or dS given."""

    def check(i: LoraLinearInputs) -> None:
        spec = _registry.find("lora_linear")
        problem = spec.problem(
            M=i.x.shape[:-1].numel(), K=i.x.shape[-1], N=tuple(w.shape[0] for w in i.weights),
            rank=tuple(a.shape[0] for a in i.lora_as), dtype=i.x.dtype, given=True,
        )  # fmt: skip
        able, why = spec.supports(backend, problem)
        if not able:
            pytest.skip(f"{backend}: {why}")

    return check


def forward(i: LoraLinearInputs, backend: str, shrunk: Tensor | None = None):
    with poisoned_empty():
        return FWD(
            i.x, i.weights, i.lora_as, i.lora_bs, i.biases, i.scalings, 0.0, None, backend,
            None, shrunk,
        )  # fmt: skip


def backward(i, backend: str, s: Tensor, needs=(True, True, True), ds: Tensor | None = None):
    with poisoned_empty():
        return BWD(
            i.dys, i.x, i.weights, i.lora_as, i.lora_bs, s, i.scalings, 0.0, None, *needs,
            backend, None, ds,
        )  # fmt: skip


def s_of(i: LoraLinearInputs) -> Tensor:
    flat = i.x.flatten(0, -2)
    return torch.cat([flat @ a.to(flat.dtype).t() for a in i.lora_as], 1)


def ds_of(i: LoraLinearInputs) -> Tensor:
    triples = zip(i.dys, i.lora_bs, i.scalings, strict=True)
    return torch.cat([s * (dy @ b.to(dy.dtype)) for dy, b, s in triples], 1)


def strided(t: Tensor, how: str, backend: str) -> Tensor:
    """The same values in columns, or in rows further apart with poison between them (a finite one
    for torch's bf16 GEMM, which multiplies what lies past a row by zero)."""
    if how == "contiguous":
        return t
    if how == "transposed":
        return t.t().contiguous().t()
    poison = 1e3 if backend in ("reference", "aten") else float("nan")
    wide = t.new_full((t.shape[0], t.shape[1] + 5), poison)
    wide[:, 3 : 3 + t.shape[1]] = t
    return wide[:, 3 : 3 + t.shape[1]]


def results(i, ys=(), dx=None, das=(), dbs=()) -> LoraLinearResults:
    dx = i.x.new_empty(0) if dx is None else dx
    return LoraLinearResults(list(ys), dx, [], list(das), list(dbs), [])


def judge(i: LoraLinearInputs, actual: LoraLinearResults) -> None:
    oracle = lora_linear_results(i, torch.float64, needs="xab")
    compare(actual, oracle, yardstick(i, oracle, "xab"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["contiguous", "sliced", "transposed"])
@pytest.mark.parametrize(
    ("m", "n", "r"), [(1, (7,), (1,)), (45, (45, 18, 130), (3, 16, 5)), (70, (64,), (40,))]
)
def test_its_own_s_gives_the_same_bits(backend, ready, dtype, how, m, n, r):
    i = lora_linear_inputs(m, 70, n, r, dtype, adapter_dtype=torch.float32, scaling=0.7)
    ready(i)
    ys, s = forward(i, backend)
    again, empty = forward(i, backend, strided(s, how, backend))
    assert empty.shape == (m, 0)
    for got, want in zip(again, ys, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_is_not_read_where_s_is_given(backend, ready, dtype):
    """S of one A beside another A, of NaN: Y is that of the first."""
    i = lora_linear_inputs(45, 70, (45, 18), (12, 5), dtype)
    ready(i)
    blind = replace(i, lora_as=[torch.full_like(a, float("nan")) for a in i.lora_as])
    ys, _ = forward(blind, backend, s_of(i))
    judge(i, results(i, ys))
    with pytest.raises(AssertionError, match=r"y\[0\]"):
        judge(i, results(i, forward(i, backend, s_of(i).roll(1, 1))[0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["contiguous", "sliced", "transposed"])
@pytest.mark.parametrize(
    "needs", [(True, True, False), (True, True, True), (False, True, False), (True, False, True)]
)
def test_given_ds(backend, ready, dtype, how, needs):
    adapter = torch.promote_types(dtype, torch.float32)
    i = lora_linear_inputs(45, 70, (45, 18), (8, 5), dtype, adapter_dtype=adapter)
    ready(i)
    blind = replace(i, lora_bs=[torch.full_like(b, float("nan")) for b in i.lora_bs])
    s, ds = (strided(t, how, backend) for t in (s_of(i), ds_of(i)))
    dx, das, dbs = backward(blind, backend, s, needs, ds)
    assert (len(das), len(dbs)) == (2 * needs[1], 2 * needs[2])
    judge(i, results(i, (), dx if needs[0] else None, das, dbs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("r", [1, 16, 40, 100])
def test_given_ds_of_one_layer(backend, ready, dtype, r):
    i = lora_linear_inputs(67, 33, 45, r, dtype)
    ready(i)
    dx, das, dbs = backward(i, backend, s_of(i), ds=ds_of(i))
    judge(i, results(i, (), dx, das, dbs))
    wrong, _, _ = backward(i, backend, s_of(i), ds=2.0 * ds_of(i))
    with pytest.raises(AssertionError, match="dx"):
        judge(i, results(i, (), wrong))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lead", [(), (2, 9), (0, 3)], ids=str)
def test_gradients_are_those_of_the_whole_layer(backend, ready, dtype, lead):
    i = lora_linear_inputs(lead, 40, (50, 18), (8, 3), dtype)
    ready(i)
    flat = replace(i, x=i.x.reshape(-1, 40))
    s = forward(flat, backend)[1].view(*lead, 11)
    leaves = [t.clone().requires_grad_() for t in (i.x, *i.lora_as, *i.lora_bs)]
    x, a, b = leaves[0], leaves[1:3], leaves[3:]
    ys = grouped_lora_linear(
        x, i.weights, a, b, i.scalings, biases=i.biases, shrunk=s, backend=backend
    )
    torch.autograd.backward(ys, i.dys)
    want = lora_linear_op(i, backend, "xab")
    for got, expected in zip(
        [*ys, *(t.grad for t in leaves)], [*want.ys, want.dx, *want.das, *want.dbs], strict=True
    ):
        assert torch.equal(got, expected)
    assert s.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_member_without_an_adapter_has_no_columns(backend, ready, dtype):
    i = lora_linear_inputs(45, 70, (45, 18, 9), (5, 0, 12), dtype)
    ready(i)
    ys, s = forward(i, backend)
    again, _ = forward(i, backend, s)
    assert all(torch.equal(p, q) for p, q in zip(again, ys, strict=True))
    dx, das, dbs = backward(i, backend, s, ds=ds_of(i))
    judge(i, results(i, again, dx, das, dbs))


def one_layer(i: LoraLinearInputs, backend: str, s: Tensor):
    leaves = [t.clone().requires_grad_() for t in (i.x, i.lora_as[0], i.lora_bs[0])]

    def call(x, a, b, s):
        return lora_linear(x, i.weights[0], a, b, 0.7, shrunk=s, backend=backend)

    return call, (*leaves, s)


def test_given_s_is_saved_as_it_is(backend, ready):
    i = lora_linear_inputs(9, 20, 33, 3, torch.float32, bias=False)
    ready(i)
    saved = []
    call, args = one_layer(i, backend, s_of(i))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(*args)
    assert args[-1].data_ptr() in [t.data_ptr() for t in saved]
    assert sum(t.shape == (9, 3) for t in saved) == 1


def test_writing_a_given_s_is_detected(backend, ready):
    i = lora_linear_inputs(9, 20, 33, 3, torch.float32, bias=False)
    ready(i)
    call, args = one_layer(i, backend, s_of(i))
    y = call(*args)
    args[-1].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(i.dys[0])


@pytest.mark.parametrize("how", ["checkpoint", "compile"])
def test_recomputed_and_compiled(backend, ready, how):
    i = lora_linear_inputs(9, 20, 33, 3, torch.float32, bias=False)
    ready(i)
    s = s_of(i)
    call, args = one_layer(i, backend, s)
    want = torch.autograd.grad(call(*args), args[:3], i.dys[0])
    if how == "checkpoint":
        y = checkpoint(call, *args, use_reentrant=False)
    else:
        torch._dynamo.reset()
        y = torch.compile(call, fullgraph=True, backend="aot_eager")(*args)
    got = torch.autograd.grad(y, args[:3], i.dys[0])
    assert all(torch.equal(p, q) for p, q in zip(got, want, strict=True))
    if how == "compile":  # without gradients it takes another path
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        plain = [t.detach() for t in args]
        assert torch.equal(compiled(*plain), call(*plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(backend, ready, dtype):
    i = lora_linear_inputs(9, 20, (33, 6), (3, 4), dtype)
    ready(i)
    torch.library.opcheck(
        FWD, (i.x, i.weights, i.lora_as, i.lora_bs, i.biases, i.scalings, 0.0, None, backend),
        {"shrunk": s_of(i)},
    )  # fmt: skip
    torch.library.opcheck(
        BWD,
        (
            i.dys, i.x, i.weights, i.lora_as, i.lora_bs, s_of(i), i.scalings, 0.0, None,
            True, True, False, backend,
        ),
        {"ds": ds_of(i)},
    )  # fmt: skip


def test_autocast_takes_s_in_its_own_dtype(backend, ready):
    i = lora_linear_inputs(9, 20, 33, 3, torch.float32, bias=False)
    low = lora_linear_inputs(9, 20, 33, 3, torch.bfloat16, adapter_dtype=torch.float32)
    ready(low)
    call, (x, a, b, _) = one_layer(i, backend, s_of(i))
    with torch.autocast("cpu", torch.bfloat16):
        s = x.detach().bfloat16() @ a.detach().bfloat16().t()
        assert torch.equal(call(x, a, b, s), call(x, a, b, s.clone()))
        with pytest.raises(InvalidArgumentError, match=r"shrunk has dtype torch\.float32"):
            call(x, a, b, s.float())


S = torch.zeros(2, 5, 4)
BAD = [
    ({"shrunk": [1.0]}, "shrunk is a list", "torch.Tensor or None"),
    ({"shrunk": S.to("meta")}, "shrunk is on meta", "x is on cpu"),
    ({"shrunk": S.bfloat16()}, "shrunk has dtype torch.bfloat16", "torch.float32"),
    ({"shrunk": S[:, :4]}, "shrunk has shape [2, 4, 4]", "[2, 5, 4]"),
    ({"shrunk": S.flatten(0, 1)}, "shrunk has shape [10, 4]", "[2, 5, 4]"),
    ({"shrunk": S[..., :3]}, "shrunk has shape [2, 5, 3]", "[2, 5, 4]"),
    ({"shrunk": S.clone().requires_grad_()}, "shrunk requires a gradient", "shrunk.detach()"),
    ({"shrunk": S, "dropout_p": 0.1}, "dropout_p=0.1", "dropout_p=0"),
]


@pytest.mark.parametrize(("changes", "given", "accepted"), BAD, ids=[b[1] for b in BAD])
def test_bad_s_is_refused_in_one_line(changes, given, accepted):
    z = torch.zeros
    with pytest.raises(InvalidArgumentError) as caught:
        lora_linear(z(2, 5, 20), z(33, 20), z(4, 20), z(33, 4), 0.5, **changes)
    message = str(caught.value)
    assert given in message
    assert accepted in message
    assert "\n" not in message


def test_the_operators_refuse_what_does_not_fit():
    i = lora_linear_inputs(9, 20, (33, 6), (3, 4), torch.float32)
    with pytest.raises(InvalidArgumentError, match=r"shrunk has shape \[9, 6\]; accepted: \[9, 7"):
        forward(i, "aten", s_of(i)[:, 1:])
    with pytest.raises(InvalidArgumentError, match=r"ds has shape \[8, 7\]; accepted: \[9, 7"):
        backward(i, "aten", s_of(i), ds=ds_of(i)[1:])
    with pytest.raises(InvalidArgumentError, match="ds has dtype"):
        backward(i, "aten", s_of(i), ds=ds_of(i).double())
    with pytest.raises(InvalidArgumentError, match="ds is given with dropout_p"):
        BWD(
            i.dys, i.x, i.weights, i.lora_as, i.lora_bs, s_of(i), i.scalings, 0.5,
            torch.tensor(3), True, True, False, "aten", None, ds_of(i),
        )  # fmt: skip
