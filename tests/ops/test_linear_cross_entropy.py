"""linear_cross_entropy against the fp64 formula with all logits, on every backend."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from lora_kernels.errors import BackendUnavailableError, InvalidArgumentError
from lora_kernels.ops import _registry, linear_cross_entropy
from lora_kernels.ops.linear_cross_entropy import chunks
from lora_kernels.testing import (
    BudgetExceededError,
    assert_within_budget,
    check_linear_cross_entropy,
    linear_cross_entropy_inputs,
    linear_cross_entropy_op,
)
from lora_kernels.testing.linear_cross_entropy import results, yardstick

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "capped": {"softcap": 2.0},
    "z_loss": {"z_loss": 0.05},
    "everything": {"label_smoothing": 0.3, "softcap": 1.5, "z_loss": 0.02, "shift": True},
}
FWD = torch.ops.lora_kernels.linear_cross_entropy_fwd.default
GRAD = torch.ops.lora_kernels.linear_cross_entropy_grad.default


# The Triton kernel runs in the interpreter: tests/triton/suite_interpreter_linear_cross_entropy.py.
@pytest.fixture(
    params=[b for b in _registry.find("linear_cross_entropy").backends if b != "triton"]
)
def backend(request) -> str:
    return request.param


def skip_unless(backend: str, dtype: torch.dtype) -> None:
    spec = _registry.find("linear_cross_entropy")
    able, why = spec.supports(backend, spec.problem(M=2, K=2, V=2, dtype=dtype))
    if not able:
        pytest.skip(f"{backend}: {why}")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_oracle(backend, dtype, options, reduction):
    skip_unless(backend, dtype)
    i = linear_cross_entropy_inputs(dtype=dtype, reduction=reduction, weighted=True, **options)
    check_linear_cross_entropy(i, backend)


@pytest.mark.parametrize("lead", [(1, 1), (7,), (2, 3, 5), (130,)], ids=str)
@pytest.mark.parametrize("V", [1, 15, 16, 17, 1000])
def test_odd_shapes(backend, lead, V):
    skip_unless(backend, torch.bfloat16)
    for rank, bias in ((0, False), (5, True)):
        i = linear_cross_entropy_inputs(
            lead, 33, V, rank, torch.bfloat16, bias=bias, ignored=0.0, reduction="sum"
        )
        check_linear_cross_entropy(i, backend)


@pytest.mark.parametrize("layout", ["sliced", "strided", "permuted", "misaligned"])
def test_layouts(backend, layout):
    check_linear_cross_entropy(linear_cross_entropy_inputs(layout=layout), backend)


@pytest.mark.parametrize("ignored", [0.0, 0.05, 0.97])
def test_several_chunks(backend, monkeypatch, ignored):
    """Also where most rows do not count and are left out."""
    monkeypatch.setattr(chunks, "_CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr(chunks, "_LEAST_ROWS", 3)
    i = linear_cross_entropy_inputs((4, 50), ignored=ignored, reduction="sum")
    check_linear_cross_entropy(i, backend)


def test_fp32_adapter_over_a_bf16_head(backend):
    skip_unless(backend, torch.bfloat16)
    i = linear_cross_entropy_inputs(dtype=torch.bfloat16, adapter_dtype=torch.float32)
    check_linear_cross_entropy(i, backend)
    result = linear_cross_entropy_op(i, backend)
    assert {n: t.dtype for n, t in result.items()} == {
        "loss": torch.float32, "dhidden": torch.bfloat16, "dweight": torch.bfloat16,
        "dlora_a": torch.float32, "dlora_b": torch.float32, "dbias": torch.bfloat16,
    }  # fmt: skip


@pytest.mark.parametrize("needs", [("hidden",), ("lora_b",), ("weight", "bias"), ()])
def test_subsets_of_gradients(backend, needs):
    i = linear_cross_entropy_inputs()
    assert set(check_linear_cross_entropy(i, backend, needs)) == {"loss", *(f"d{n}" for n in needs)}


def test_extreme_logits(backend):
    """Without the maximum taken out first, exp overflows; far below it, exp is 0."""
    i = linear_cross_entropy_inputs(bias=False, rank=0)
    i = dataclasses.replace(i, hidden=i.hidden * 300.0)
    check_linear_cross_entropy(i, backend)


def test_no_label_counts(backend):
    i = linear_cross_entropy_inputs(ignored=2.0)
    result = linear_cross_entropy_op(i, backend)
    want = F.cross_entropy(torch.randn(3, 4), torch.full((3,), -100))
    assert result.pop("loss").isnan() and want.isnan()
    assert all(not t.any() for t in result.values())


def test_no_token(backend):
    i = linear_cross_entropy_inputs((0, 9), reduction="sum")
    result = linear_cross_entropy_op(i, backend)
    assert result["loss"] == 0.0 and not result["dweight"].any()


@pytest.mark.parametrize("wrong", ["adapter", "scaling", "smoothing", "labels", "softcap"])
def test_a_planted_fault_is_found(wrong):
    """The oracle sees the same inputs with one thing changed."""
    i = linear_cross_entropy_inputs(label_smoothing=0.1, softcap=3.0)
    changed = {
        "adapter": {"lora_b": i.lora_b * 0.98},
        "scaling": {"options": {**i.options, "scaling": 0.69}},
        "smoothing": {"options": {**i.options, "label_smoothing": 0.101}},
        "labels": {"labels": i.labels.roll(1)},
        "softcap": {"options": {**i.options, "softcap": 3.01}},
    }[wrong]
    real = linear_cross_entropy_op(i, "aten")
    other = dataclasses.replace(i, **changed)
    oracle = results(other, torch.float64)
    low = yardstick(other, oracle)
    with pytest.raises(BudgetExceededError):
        assert_within_budget(real["loss"], oracle["loss"], low["loss"])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("backend", ["reference", "aten"])
def test_gradcheck(backend, options, reduction):
    i = linear_cross_entropy_inputs(
        (2, 3), 4, 6, 2, torch.float64, weighted=True, reduction=reduction, **options
    )
    names, tensors = zip(*i.tensors().items(), strict=True)

    def loss(*leaves):
        named = dict(zip(names, leaves, strict=True))
        hidden, weight = named.pop("hidden"), named.pop("weight")
        return linear_cross_entropy(
            hidden, weight, i.labels,
            token_weights=i.token_weights, backend=backend, **named, **i.options,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, [t.requires_grad_() for t in tensors])


def test_second_derivatives_are_refused():
    i = linear_cross_entropy_inputs(rank=0, bias=False)
    hidden = i.hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, i.weight, i.labels)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize("isa", ["amx", "avx512", "avx2", "baseline"])
def test_every_instruction_set(isa, monkeypatch):
    from lora_kernels._backends import cpu

    module, why = cpu.load()
    if module is None:
        pytest.skip(why)
    if isa not in module.machine_isas():
        pytest.skip(f"this machine has no {isa}")
    module.set_isa_limit(isa)
    try:
        for dtype in DTYPES:
            i = linear_cross_entropy_inputs((40,), 30, 3001, dtype=dtype, **OPTIONS["everything"])
            check_linear_cross_entropy(i, "cpu")
    finally:
        module.set_isa_limit("")


def test_rows_do_not_depend_on_their_chunk():
    from lora_kernels._backends import cpu

    module, why = cpu.load()
    if module is None:
        pytest.skip(why)
    z, labels = torch.randn(37, 501), torch.randint(0, 501, (37,))

    def rows(part: slice) -> torch.Tensor:
        return module.linear_cross_entropy_rows(
            z[part].clone(), labels[part], None, -100, 0.1, 0.0, 0.1
        )

    parts = [rows(slice(r, r + 5)) for r in range(0, 37, 5)]
    assert torch.equal(rows(slice(None)), torch.cat(parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(backend, dtype):
    skip_unless(backend, dtype)
    i = linear_cross_entropy_inputs((9,), dtype=dtype)
    arguments = (i.hidden, i.weight, i.labels, i.lora_a, i.lora_b, i.bias, 0.7, -100, 0.1, 2.0, 0.1)
    opcheck(FWD, (*arguments, backend))
    opcheck(GRAD, (torch.rand(9), *arguments, [True, False, True, True, False], backend))
    assert _registry.find("linear_cross_entropy").schemas == (FWD.name(), GRAD.name())


def test_compile_with_dynamic_rows():
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, dynamic=True, backend="eager")
    for rows in (5, 9):
        i = linear_cross_entropy_inputs((rows,), rank=0, bias=False)
        hidden = i.hidden.requires_grad_()
        loss = compiled(hidden, i.weight, i.labels)
        eager = linear_cross_entropy(hidden, i.weight, i.labels)
        assert torch.equal(loss, eager)
        assert torch.equal(*(torch.autograd.grad(t, hidden)[0] for t in (loss, eager)))


def test_autocast():
    i = linear_cross_entropy_inputs(rank=0, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(i.hidden, i.weight, i.labels)
    low = i.hidden.bfloat16(), i.weight.bfloat16()
    assert torch.equal(loss, linear_cross_entropy(*low, i.labels))


def test_memory_stays_below_the_logits(backend, monkeypatch):
    """No tensor of tokens x vocabulary elements is made by the chunked backends."""
    if backend == "reference":
        pytest.skip("the reference makes all logits")
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(chunks, "_CHUNK_ELEMENTS", 6400)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.untyped_storage().nbytes())
            return out

    i = linear_cross_entropy_inputs((1000,), 8, 100)
    with Watch():
        linear_cross_entropy_op(i, backend, ("hidden", "lora_a"))
    assert 0 < largest < 1000 * 100 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(2, 8, dtype=torch.int64)}, "labels has shape"),
        ({"labels": torch.zeros(2, 9)}, "labels has dtype"),
        ({"labels": torch.full((2, 9), 67)}, "labels holds 67"),
        ({"weight": torch.zeros(67, 21)}, "weight has shape"),
        ({"weight": torch.zeros(67, 20).bfloat16()}, "weight is torch.bfloat16"),
        ({"lora_b": None}, "belong together"),
        ({"lora_b": torch.zeros(66, 3)}, "lora_b has shape"),
        ({"bias": torch.zeros(66)}, "bias has shape"),
        ({"hidden": torch.zeros(20)}, "hidden has shape"),
        ({"reduction": "avg"}, "reduction='avg'"),
        ({"softcap": 0.0}, "softcap=0.0"),
        ({"label_smoothing": 1.5}, "label_smoothing=1.5"),
        ({"scaling": float("nan")}, "scaling=nan"),
        ({"z_loss": -1.0}, "z_loss=-1.0"),
        ({"token_weights": torch.ones(3)}, "token_weights has shape"),
    ],
)
def test_bad_input(change, message):
    i = linear_cross_entropy_inputs()
    arguments = {**i.tensors(), "labels": i.labels, **i.options, **change}
    with pytest.raises(InvalidArgumentError, match=message) as error:
        linear_cross_entropy(**arguments)
    assert "\n" not in str(error.value)


def test_a_backend_that_cannot_is_refused():
    i = linear_cross_entropy_inputs(dtype=torch.float64)
    with pytest.raises(BackendUnavailableError, match="cpu"):
        linear_cross_entropy_op(i, "cpu")
    with pytest.raises(BackendUnavailableError, match="no cuda kernels"):
        linear_cross_entropy_op(i, "cuda")
