"""rope against the fp64 formula, on every backend."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.library import opcheck

import lora_kernels as lk
from lora_kernels.errors import BackendUnavailableError, InvalidArgumentError
from lora_kernels.ops import _registry, rope
from lora_kernels.ops.rope import aten
from lora_kernels.testing import (
    BudgetExceededError,
    assert_within_budget,
    check_rope,
    rope_inputs,
    rope_op,
)
from lora_kernels.testing.rope import results

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FWD = torch.ops.lora_kernels.rope_fwd.default
BWD = torch.ops.lora_kernels.rope_bwd.default


# The Triton kernel runs in the interpreter: tests/triton/suite_interpreter_rope.py. The compiled
# library has no fp64: test_rope_cpu.py.
@pytest.fixture(params=["reference", "aten"])
def backend(request) -> str:
    return request.param


@pytest.mark.parametrize("tables", ["shared", "batch", "cache"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_oracle(backend, dtype, interleaved, tables):
    for R in (None, 6, 2):
        i = rope_inputs(R=R, interleaved=interleaved, tables=tables, dtype=dtype)
        check_rope(i, backend)


@pytest.mark.parametrize("D", [2, 40, 64, 72, 80, 96, 128, 192, 256])
def test_head_dims(backend, D):
    for interleaved in (False, True):
        i = rope_inputs(D=D, interleaved=interleaved, dtype=torch.bfloat16, Hk=1)
        check_rope(i, backend)


@pytest.mark.parametrize("lead", [(1, 1), (1, 300), (7,), (0,), (2, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("tables", ["shared", "cache"])
def test_lengths_and_packed_heads(backend, lead, tables):
    for Hk in (0, 3):
        check_rope(rope_inputs(lead, tables=tables, Hk=Hk, R=10), backend)


@pytest.mark.parametrize("layout", ["sliced", "strided", "permuted", "misaligned"])
def test_layouts(backend, layout):
    for interleaved in (False, True):
        check_rope(rope_inputs(layout=layout, interleaved=interleaved, R=8), backend)
    i = rope_inputs()
    heads_first = i.q.transpose(1, 2).contiguous().transpose(1, 2)
    q, _ = rope(heads_first, None, i.cos, i.sin, backend=backend)
    assert torch.equal(q, rope(i.q, None, i.cos, i.sin, backend=backend)[0])
    assert q.is_contiguous()


@pytest.mark.parametrize("tables", ["shared", "batch", "cache"])
def test_several_chunks_of_positions(monkeypatch, tables):
    monkeypatch.setattr(aten, "_ELEMENTS", 300)
    for lead in ((3, 11), (11,)):
        for R in (16, 6):
            check_rope(rope_inputs(lead, R=R, tables=tables, dtype=torch.bfloat16), "aten")


@pytest.mark.parametrize("table_dtype", [torch.bfloat16, torch.float64], ids=str)
def test_tables_of_another_dtype(backend, table_dtype):
    i = rope_inputs(table_dtype=table_dtype)
    check_rope(i, backend)
    assert rope_op(i, backend)["q"].dtype == torch.float32


def test_shapes_of_positions(backend):
    i = rope_inputs(tables="cache")
    one = i.position_ids[:1]
    base = rope(i.q, i.k, i.cos, i.sin, position_ids=one.expand(2, 9), backend=backend)
    for positions in (one, one[0], one.int()):
        again = rope(i.q, i.k, i.cos, i.sin, position_ids=positions, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(base, again, strict=True))
    rows = rope(i.q, i.k, i.cos[one], i.sin[one], backend=backend)  # tables [1, S, R]
    assert all(torch.equal(a, b) for a, b in zip(base, rows, strict=True))


def test_against_transformers(backend):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    i = rope_inputs(tables="batch")
    q, k = llama.apply_rotary_pos_emb(i.q.transpose(1, 2), i.k.transpose(1, 2), i.cos, i.sin)
    oracle = results(i, torch.float64)
    ours = rope(i.q, i.k, i.cos, i.sin, backend=backend)
    for name, mine, theirs in zip("qk", ours, (q, k), strict=True):
        assert_within_budget(mine, oracle[name], theirs.transpose(1, 2))


def test_the_rest_of_a_head_passes_bit_for_bit(backend):
    i = rope_inputs(R=6, dtype=torch.bfloat16)
    q, k = rope(i.q, i.k, i.cos, i.sin, backend=backend)
    assert torch.equal(q[..., 6:], i.q[..., 6:]) and torch.equal(k[..., 6:], i.k[..., 6:])


def test_one_rounding(backend):
    """The result is that of fp64 rounded, but for ties that fp32 decides the other way."""
    i = rope_inputs((4, 64), dtype=torch.bfloat16)
    exact = results(i, torch.float64)["q"].bfloat16()
    q, _ = rope(i.q, i.k, i.cos, i.sin, backend=backend)
    assert (q != exact).float().mean() < 0.002


def test_the_inverse_rotation_restores(backend):
    i = rope_inputs(dtype=torch.float64, table_dtype=torch.float64)
    q, k = rope(i.q, i.k, i.cos, i.sin, backend=backend)
    back = rope(q, k, i.cos, -i.sin, backend=backend)
    for restored, original in zip(back, (i.q, i.k), strict=True):
        assert_within_budget(restored, original, original)


@pytest.mark.parametrize("needs", [("q",), ("k",), ()])
def test_subsets_of_gradients(backend, needs):
    assert set(check_rope(rope_inputs(), backend, needs)) == {"q", "k", *(f"d{n}" for n in needs)}


@pytest.mark.parametrize("wrong", ["sign", "layout", "position", "channels"])
def test_a_planted_fault_is_found(wrong, backend):
    i = rope_inputs(tables="cache", dtype=torch.bfloat16)
    changed = {
        "sign": {"sin": -i.sin},
        "layout": {"interleaved": True},
        "position": {"position_ids": i.position_ids.roll(1, -1)},
        "channels": {"cos": i.cos[:, :14], "sin": i.sin[:, :14]},
    }[wrong]
    oracle, low = results(i, torch.float64), results(i, i.q.dtype)
    got = rope_op(dataclasses.replace(i, **changed), backend)
    for name in ("q", "dk"):
        with pytest.raises(BudgetExceededError):
            assert_within_budget(got[name], oracle[name], low[name])


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_of_any_order(backend, interleaved):
    """Also with cos and sin that differ within a pair."""
    i = rope_inputs((1, 3), 2, 6, Hk=1, R=4, interleaved=interleaved, dtype=torch.float64)
    cos, sin = torch.rand(3, 4), torch.rand(3, 4)

    def both(q, k):
        return rope(q, k, cos, sin, interleaved=interleaved, backend=backend)

    leaves = [i.q.requires_grad_(), i.k.requires_grad_()]
    assert torch.autograd.gradcheck(both, leaves)
    assert torch.autograd.gradgradcheck(both, leaves)


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_opcheck(backend, layout):
    i = rope_inputs(tables="cache", layout=layout, dtype=torch.bfloat16)
    for operator in (FWD, BWD):
        opcheck(operator, ([i.q, i.k], i.cos, i.sin, i.position_ids, False, backend))
        opcheck(operator, ([i.q], i.cos[:9], i.sin[:9], None, True, backend))
    assert _registry.find("rope").schemas == (FWD.name(), BWD.name())


def test_compile_with_dynamic_lengths():
    compiled = torch.compile(rope, fullgraph=True, dynamic=True, backend="eager")
    for S in (5, 9, 12):
        i = rope_inputs((2, S))
        q = i.q.requires_grad_()
        pairs = [run(q, i.k, i.cos, i.sin) for run in (compiled, rope)]
        assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))
        assert torch.equal(*(torch.autograd.grad(out.sum(), q)[0] for out, _ in pairs))
        with torch.no_grad():
            assert torch.equal(compiled(q, None, i.cos, i.sin)[0], pairs[1][0])


def test_nothing_is_changed_in_place(backend):
    i = rope_inputs()
    before = [t.clone() for t in (i.q, i.k, i.cos, i.sin)]
    out, _ = rope(i.q, i.k, i.cos, i.sin, backend=backend)
    rope_op(i, backend)
    assert all(torch.equal(a, b) for a, b in zip(before, (i.q, i.k, i.cos, i.sin), strict=True))
    assert out.data_ptr() != i.q.data_ptr()


def test_autocast_leaves_the_dtype(backend):
    i = rope_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        q, _ = rope(i.q, i.k, i.cos, i.sin, backend=backend)
    assert torch.equal(q, rope(i.q, i.k, i.cos, i.sin, backend=backend)[0])


def test_explain():
    told = lk.explain("rope", B=1, S=64, H=4, D=16, Hk=2)
    assert told["backend"] in ("cpu", "aten")  # without the compiled library the second
    assert "element-wise" in told["backends"]["aten"]["reason"]
    spec = _registry.find("rope")
    problem = spec.problem(B=1, S=10, H=3, D=8, Hk=1, R=4)
    assert spec.flops(problem, "fwd") == 3 * 10 * 4 * 4
    with pytest.raises(InvalidArgumentError, match="argument 'S' is missing"):
        lk.explain("rope", B=1, H=2, D=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(9, 16)}, "q has shape"),
        ({"q": [1.0]}, "q is a list"),
        ({"k": torch.zeros(2, 8, 2, 16)}, "k has shape"),
        ({"k": torch.zeros(2, 9, 2, 16).half()}, "k is torch.float16"),
        ({"cos": torch.zeros(9, 14)}, "sin has shape"),
        ({"cos": torch.zeros(9, 5), "sin": torch.zeros(9, 5)}, "even number of channels"),
        ({"cos": torch.zeros(9, 18), "sin": torch.zeros(9, 18)}, "even number of channels"),
        ({"cos": torch.zeros(9, 0), "sin": torch.zeros(9, 0)}, "even number of channels"),
        ({"cos": torch.zeros(12, 16), "sin": torch.zeros(12, 16)}, "a cache and position_ids"),
        ({"cos": torch.zeros(9, 16, requires_grad=True)}, "detach them"),
        ({"cos": torch.zeros(9, 16, dtype=torch.int32)}, "cos has dtype"),
        ({"position_ids": torch.zeros(2, 8, dtype=torch.int64)}, "position_ids has shape"),
        ({"position_ids": torch.zeros(2, 9)}, "position_ids has dtype"),
        ({"position_ids": torch.full((9,), 9)}, "position_ids holds 9"),
        ({"position_ids": torch.full((9,), -1)}, "position_ids holds -1"),
        ({"interleaved": None}, "interleaved=None"),
    ],
)
def test_bad_input(change, message):
    i = rope_inputs()
    with pytest.raises(InvalidArgumentError, match=message) as error:
        rope(**{"q": i.q, "k": i.k, "cos": i.cos, "sin": i.sin, **change})
    assert "\n" not in str(error.value)


def test_a_backend_that_cannot_is_refused():
    with pytest.raises(BackendUnavailableError, match="q is on cpu"):
        rope_op(rope_inputs(), "cuda")
