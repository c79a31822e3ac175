"""attention: capability table, registration, compilation, autocast, derivatives, bad input."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels.errors import BackendUnavailableError, InvalidArgumentError
from lora_kernels.ops import _registry, attention
from lora_kernels.ops.attention import bands, blocked, capabilities, sdpa
from lora_kernels.testing import (
    assert_within_budget,
    attention_inputs,
    attention_op,
    check_attention,
)
from tests.ops.attention_cases import CASES, ON_GPU, force_path, needs_library

ROOT = Path(__file__).resolve().parents[2]
FWD = torch.ops.lora_kernels.attention_fwd.default
BWD = torch.ops.lora_kernels.attention_bwd.default


@pytest.fixture(params=[b for b in _registry.find("attention").backends if b not in ON_GPU])
def backend(request) -> str:
    if request.param == "cpu":
        needs_library()
    return request.param


def test_every_feature_has_a_case():
    assert set(CASES) == set(capabilities.FEATURES)
    assert all(set(CASES) <= set(column) for column in capabilities.TABLE.values())


@pytest.mark.parametrize("feature", CASES)
@pytest.mark.parametrize("column", [c for c in capabilities.COLUMNS if c not in ON_GPU])
def test_every_answer_of_the_table(column, feature, monkeypatch):
    """A yes runs there, forward and backward, within the budget; a no goes elsewhere."""
    i = attention_inputs(**CASES[feature])
    if column == "cpu":
        needs_library()
        if capabilities.TABLE[column][feature] is not True:
            with pytest.raises(BackendUnavailableError, match=capabilities.TABLE[column][feature]):
                attention_op(i, column)
            return
    if column in ("reference", "cpu"):
        check_attention(i, column)
        return
    force_path(monkeypatch, column)
    took = set()
    for module in (sdpa, bands, blocked):
        for step in ("forward", "backward"):
            real, stem = getattr(module, step), module.__name__.rpartition(".")[2]

            def spy(*arguments, real=real, stem=stem, step=step):
                took.add((stem, step))
                return real(*arguments)

            monkeypatch.setattr(module, step, spy)
    # The gradient of the mask is a feature of its own.
    needs = ("q", "k", "v") if feature == "additive_mask" else None
    check_attention(i, "aten", needs)
    if capabilities.TABLE[column][feature] is True:
        assert {(column, "forward"), (column, "backward")} <= took
    else:
        assert (column, "backward") not in took and ("blocked", "backward") in took


def test_the_page_has_the_table_of_the_code():
    spec = importlib.util.spec_from_file_location("table", ROOT / "tools" / "attention_table.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    page = tool.PAGE.read_text(encoding="utf-8")
    assert tool.updated(page) == page
    assert tool.updated(page.replace("| bf16 | yes |", "| bf16 | no |")) == page


def test_explain_says_which_path(monkeypatch):
    shapes = {"B": 1, "S": 64, "H": 4, "D": 16, "dtype": "bfloat16"}

    def of_aten(**problem):
        return lk.explain("attention", **{**shapes, **problem})["backends"]["aten"]["reason"]

    assert "SDPA kernel covers" in of_aten(causal=True)
    capped = of_aten(softcap=30.0, window=(8, 0))
    assert "SDPA has no softcap" in capped and "online softmax" in capped
    assert "some queries and their keys" in of_aten(window=(8, 0))
    # What a window or causal does not exclude is not held against SDPA.
    assert "SDPA kernel covers" in of_aten(S=1, Sk=64, causal=True, window=(63, 0))
    monkeypatch.setenv("LORA_KERNELS_DISABLE", "attention:cpu")
    chosen = lk.explain("attention", **shapes, causal=True)
    assert chosen["backend"] == "aten" and "disabled" in chosen["reason"]
    with pytest.raises(InvalidArgumentError, match="argument 'D' is missing"):
        lk.explain("attention", B=1, S=2, H=2)
    with pytest.raises(InvalidArgumentError, match="'T'"):
        lk.explain("attention", **shapes, T=3)


def _arguments(i, seed=None):
    window = [12, 0]
    return (
        i.q, i.k, i.v, i.sinks, i.attn_mask, i.cu_seqlens, i.cu_seqlens, i.alibi_slopes,
        seed, 0.3, window, 2.0, 0.25 if seed is not None else 0.0, True,
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("lengths", [None, (4, 0, 6)], ids=["dense", "packed"])
def test_opcheck(backend, lengths, layout):
    mask = "" if lengths else "additive"
    i = attention_inputs(
        lengths=lengths, sinks=True, Hk=2, Dv=8, dtype=torch.bfloat16, mask=mask, layout=layout
    )
    arguments = _arguments(i, torch.tensor(5))
    opcheck(FWD, (*arguments, backend))
    out, lse = FWD(*arguments, backend)
    for needs in ([True] * 5, [True, False, True, False, False]):
        needs[4] = needs[4] and mask != ""
        for dlse in (None, torch.randn_like(lse)):
            opcheck(BWD, (torch.randn_like(out), dlse, out, lse, *arguments, needs, backend))
    assert _registry.find("attention").schemas[:2] == (FWD.name(), BWD.name())


GRADCHECK = {
    "plain": {}, "causal": {"causal": True, "Sk": 6, "Hk": 1}, "sinks": {"sinks": True},
    "packed": {"lengths": (3, 0, 2), "key_lengths": (2, 4, 1), "causal": True, "sinks": True},
    "everything": {
        "window": (3, 0), "softcap": 1.0, "sinks": True, "mask": "additive", "alibi": True,
        "dropout_p": 0.3, "seed": 4, "Hk": 1, "Dv": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("arguments", GRADCHECK.values(), ids=GRADCHECK)
def test_gradcheck(backend, arguments):
    if backend == "cpu":
        pytest.skip(capabilities.TABLE["cpu"]["float64"])
    i = attention_inputs(1, 4, 2, 3, dtype=torch.float64, **arguments)
    names, leaves = zip(*i.leaves().items(), strict=True)
    if i.attn_mask is not None:  # without -inf, which cannot be moved by a little
        leaves = [t.masked_fill(t == -torch.inf, -1.0) for t in leaves]

    def both(*moved):
        named = dict(zip(names, moved, strict=True))
        constants = {n: t for n, t in i.constants().items() if n not in named}
        out, lse = attention(**named, **constants, **i.options, return_lse=True, backend=backend)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(both, [t.detach().requires_grad_() for t in leaves])


def test_second_derivatives_are_refused():
    i = attention_inputs()
    q = i.q.requires_grad_()
    (gradient,) = torch.autograd.grad(attention(q, i.k, i.v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize("arguments", [{"causal": True}, {"softcap": 2.0, "window": (3, 0)}])
def test_compile_with_dynamic_lengths(arguments):
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="eager")
    for S in (5, 9, 12):
        i = attention_inputs(1, S)
        q = i.q.requires_grad_()
        outs = [run(q, i.k, i.v, **arguments) for run in (compiled, attention)]
        assert torch.equal(*outs)
        assert torch.equal(*(torch.autograd.grad(out.sum(), q)[0] for out in outs))
        with torch.no_grad():
            assert torch.equal(compiled(q, i.k, i.v, **arguments), outs[1])


def test_compile_of_one_tensor_for_all_three():
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    x = attention_inputs().q.requires_grad_()
    got, low = (torch.autograd.grad(run(x, x, x).sum(), x)[0] for run in (compiled, attention))
    exact = x.double()
    (oracle,) = torch.autograd.grad(attention(exact, exact, exact).sum(), x)
    assert_within_budget(got, oracle.double(), low)


def test_compile_of_packed_sequences_with_dropout():
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    i = attention_inputs(lengths=(5, 3), sinks=True)
    options = {"cu_seqlens": i.cu_seqlens, "dropout_p": 0.3, "seed": torch.tensor(9)}
    sinks = i.sinks.requires_grad_()
    pairs = [
        run(i.q, i.k, i.v, sinks=sinks, return_lse=True, **options) for run in (compiled, attention)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))
    assert torch.equal(*(torch.autograd.grad(out.sum(), sinks)[0] for out, _ in pairs))


def test_autocast():
    i = attention_inputs(sinks=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = attention(i.q, i.k.bfloat16(), i.v, sinks=i.sinks, return_lse=True)
    low = (t.bfloat16() for t in (i.q, i.k, i.v))
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert torch.equal(out, attention(*low, sinks=i.sinks))


def test_shapes_on_the_meta_device():
    i = attention_inputs(Hk=2, Dv=24)
    q, k, v = (t.to("meta").requires_grad_() for t in (i.q, i.k, i.v))
    out, lse = attention(q, k, v, return_lse=True)
    assert out.shape == (2, 9, 4, 24) and lse.shape == (2, 4, 9)
    out.sum().backward()
    assert k.grad.shape == k.shape


def test_a_recomputed_forward_drops_the_same(backend):
    i = attention_inputs(S=30)
    q = i.q.requires_grad_()

    def run(x):
        return attention(x, i.k, i.v, dropout_p=0.5, backend=backend)

    torch.manual_seed(1)
    (plain,) = torch.autograd.grad(run(q).sum(), q)
    torch.manual_seed(1)
    (again,) = torch.autograd.grad(checkpoint(run, q, use_reentrant=False).sum(), q)
    assert torch.equal(plain, again)


def test_nothing_saved_is_written(backend):
    i = attention_inputs(sinks=True, mask="additive", softcap=2.0)
    before = {n: t.clone() for n, t in i.leaves().items()}
    attention_op(i, backend)
    assert all(torch.equal(t, before[n]) for n, t in i.leaves().items())


def test_only_the_log_sum_exp_is_used(backend):
    i = attention_inputs()
    q = i.q.requires_grad_()
    _, lse = attention(q, i.k, i.v, return_lse=True, backend=backend)
    assert torch.autograd.grad(lse.sum(), q)[0].any()


CU = torch.tensor([0, 9])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": [1.0]}, "q is a list"),
        ({"q": torch.zeros(9, 4, 16)}, "packed q needs cu_seqlens"),
        ({"q": torch.zeros(2, 9, 3, 16)}, "k has 4 heads"),
        ({"q": torch.zeros(1, 9, 4, 16)}, "k has shape"),
        ({"k": torch.zeros(2, 9, 4, 8)}, "k has shape"),
        ({"v": torch.zeros(2, 8, 4, 16)}, "v has shape"),
        ({"k": torch.zeros(2, 9, 4, 16).half()}, "k is torch.float16"),
        ({"q": torch.zeros(2, 9, 4, 16, dtype=torch.int32)}, "q has dtype"),
        ({"causal": 1}, "causal=1"),
        ({"scale": float("inf")}, "scale=inf"),
        ({"window": 4}, "window=4"),
        ({"window": (4, -2)}, "holds -2"),
        ({"softcap": 0.0}, "softcap=0.0"),
        ({"dropout_p": 1.5}, "dropout_p=1.5"),
        ({"dropout_p": 0.5, "seed": -1}, "seed=-1"),
        ({"seed": 1.0}, "seed=1.0"),
        ({"sinks": torch.zeros(3)}, "sinks has shape"),
        ({"alibi_slopes": torch.zeros(3, 4)}, "alibi_slopes has shape"),
        ({"alibi_slopes": torch.zeros(4, requires_grad=True)}, "detach it"),
        ({"attn_mask": torch.zeros(2, 4, 9, 8)}, "attn_mask has shape"),
        ({"attn_mask": torch.zeros(1, 2, 4, 9, 9)}, "attn_mask has shape"),
        ({"attn_mask": torch.zeros(9, 9, dtype=torch.int64)}, "attn_mask has dtype"),
        ({"cu_seqlens": CU}, "q has shape"),
        ({"cu_seqlens_k": CU}, "without cu_seqlens"),
        ({"cu_seqlens": CU, "attn_mask": torch.zeros(9, 9)}, "cannot be used with"),
        ({"deterministic": None}, "deterministic=None"),
        ({"backend": "fast"}, "backend='fast'"),
    ],
)
def test_bad_input(change, message):
    i = attention_inputs()
    with pytest.raises(InvalidArgumentError, match=message) as error:
        attention(**{"q": i.q, "k": i.k, "v": i.v, **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 4, 8])}, r"is \[0, 4, 8\]; accepted: from 0"),
        ({"cu_seqlens": torch.tensor([1, 9])}, "from 0"),
        ({"cu_seqlens": torch.tensor([0, 5, 4, 9])}, "never falling"),
        ({"cu_seqlens": torch.tensor([0, *range(1, 9), 10])}, r"\[0, ..., 10\]"),
        ({"cu_seqlens": torch.tensor([0.0, 9.0])}, "int32 or int64"),
        ({"cu_seqlens": torch.tensor([9])}, "at least"),
        ({"cu_seqlens_k": torch.tensor([0, 3, 9])}, "as cu_seqlens"),
        ({"k": torch.zeros(7, 4, 16), "v": torch.zeros(7, 4, 16)}, "give cu_seqlens_k"),
    ],
)
def test_bad_packing(backend, change, message):
    i = attention_inputs(lengths=(9,))
    with pytest.raises(InvalidArgumentError, match=message) as error:
        attention(**{"q": i.q, "k": i.k, "v": i.v, "cu_seqlens": CU, "backend": backend, **change})
    assert "\n" not in str(error.value)


def test_a_backend_that_cannot_is_refused():
    for name in ("triton", "cuda"):
        with pytest.raises(BackendUnavailableError, match="kernels"):
            attention_op(attention_inputs(), name)
