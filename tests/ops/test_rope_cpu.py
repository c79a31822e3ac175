"""The compiled rope: every instruction set, layout, dtype and kind of table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch.library import opcheck

import lora_kernels as lk
from lora_kernels._backends import cpu as library_loader
from lora_kernels.errors import BackendUnavailableError
from lora_kernels.ops import rope
from lora_kernels.testing import (
    BudgetExceededError,
    assert_within_budget,
    check_rope,
    poisoned_empty,
    rope_inputs,
    rope_op,
)
from lora_kernels.testing.rope import results

library, reason = library_loader.load()
if library is not None and not hasattr(library, "rope_rotate"):
    library, reason = None, "lora_kernels._C was built without rope"
pytestmark = pytest.mark.skipif(library is None, reason=reason)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Tiles multiply nothing here: with amx runs what runs with avx512.
ISAS = [n for n in library.machine_isas() if n != "amx"] if library is not None else ["none"]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    library.set_isa_limit(request.param)
    yield request.param
    library.set_isa_limit("")


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_isa(isa, dtype, interleaved):
    sizes = ((16, None), (64, None), (80, 22), (2, None), (48, 46), (128, 34), (6, 4))
    for (D, R), tables in zip(sizes, ("shared", "batch", "cache") * 3, strict=False):
        i = rope_inputs(
            (2, 5), 3, D, Hk=1, R=R, interleaved=interleaved, tables=tables, dtype=dtype
        )
        with poisoned_empty():
            check_rope(i, "cpu")


@pytest.mark.parametrize("table_dtype", TABLE_DTYPES, ids=str)
def test_tables_of_every_dtype(isa, table_dtype):
    for layout in ("contiguous", "strided"):
        i = rope_inputs(D=44, R=38, dtype=torch.bfloat16, table_dtype=table_dtype, layout=layout)
        check_rope(i, "cpu")


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_parts_of_a_fused_projection_are_read_where_they_lie(isa, interleaved):
    B, S, H, Hk, D = 2, 6, 3, 2, 20
    qkv = torch.randn(B, S, (H + 2 * Hk) * D, dtype=torch.bfloat16)
    q, k, _ = (t.unflatten(-1, (-1, D)) for t in qkv.split([H * D, Hk * D, Hk * D], -1))
    i = dataclasses.replace(rope_inputs((B, S), H, D, Hk=Hk, interleaved=interleaved), q=q, k=k)
    check_rope(i, "cpu")
    for order in ((0, 2, 1, 3), (2, 0, 1, 3)):  # heads before positions, heads first
        back = torch.argsort(torch.tensor(order)).tolist()
        moved = [t.permute(order).contiguous().permute(back) for t in (q, k)]
        check_rope(dataclasses.replace(i, q=moved[0], k=moved[1]), "cpu")
    repeated = k[:, :, :1].expand(B, S, 4, D)
    check_rope(dataclasses.replace(i, k=repeated), "cpu", needs=("q",))


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_gives_the_same_bits(isa, dtype, interleaved):
    for R in (None, 18):
        i = rope_inputs((2, 7), 3, 36, Hk=2, R=R, interleaved=interleaved, dtype=dtype)
        for inverse in (False, True):
            want = library.rope_rotate([i.q, i.k], i.cos, i.sin, None, interleaved, inverse, False)
            wide = torch.cat([i.q, i.k], -2)  # both in one buffer, as a projection leaves them
            parts = [wide[:, :, :3], wide[:, :, 3:]]
            got = library.rope_rotate(parts, i.cos, i.sin, None, interleaved, inverse, True)
            assert all(a.data_ptr() == b.data_ptr() for a, b in zip(got, parts, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(want, parts, strict=True))


def test_fp32_bits_are_those_of_library_calls(isa):
    """Each product is rounded before the sum, so models give the same fp32 bits with the op."""
    i = rope_inputs((3, 5), 2, 24, tables="batch")
    for x, out in zip((i.q, i.k), rope(i.q, i.k, i.cos, i.sin, backend="cpu"), strict=True):
        cos, sin = i.cos.unsqueeze(-2), i.sin.unsqueeze(-2)
        first, second = x.chunk(2, -1)
        assert torch.equal(out, x * cos + torch.cat([-second, first], -1) * sin)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_the_backward_is_the_transpose(isa, interleaved):
    """<rotate(x), y> = <x, rotate back(y)>, also with cos and sin that differ within a pair."""
    x, y = (torch.randn(2, 5, 3, 26) for _ in range(2))
    cos, sin = torch.rand(5, 22), torch.rand(5, 22)
    (turned,) = library.rope_rotate([x], cos, sin, None, interleaved, False, False)
    (back,) = library.rope_rotate([y], cos, sin, None, interleaved, True, False)
    exact = (x.double() * back.double()).sum()
    assert_within_budget((turned * y).sum(), exact, (x * back).sum())


def test_any_number_of_threads_gives_the_same_bits(isa):
    i = rope_inputs((2, 300), 8, 64, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        outs = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            outs.append(rope(i.q, i.k, i.cos, i.sin, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for out in outs for a, b in zip(out, outs[0], strict=True))


@pytest.mark.parametrize("lead", [(0,), (1, 0), (0, 3), (1,)], ids=str)
def test_few_positions_and_none(isa, lead):
    for Hk in (0, 2):
        for tables in ("shared", "cache"):
            check_rope(rope_inputs(lead, Hk=Hk, tables=tables), "cpu")


def test_a_number_that_is_none_stays_in_its_pair(isa):
    i = rope_inputs((1, 2), 1, 8, Hk=0)
    x = i.q.clone()
    x[0, 1, 0, 3] = torch.nan
    y, _ = rope(x, None, i.cos, i.sin, backend="cpu")
    assert y.isnan().nonzero().tolist() == [[0, 1, 0, 3], [0, 1, 0, 7]]


@pytest.mark.parametrize("wrong", ["sign", "layout", "position", "channels", "heads"])
def test_a_planted_fault_is_found(isa, wrong):
    i = rope_inputs(tables="cache", dtype=torch.bfloat16)
    changed = {
        "sign": {"sin": -i.sin},
        "layout": {"interleaved": True},
        "position": {"position_ids": i.position_ids.roll(1, -1)},
        "channels": {"cos": i.cos[:, :14], "sin": i.sin[:, :14]},
        "heads": {"q": i.q.roll(1, -2), "k": i.k.roll(1, -2)},
    }[wrong]
    oracle, low = results(i, torch.float64), results(i, i.q.dtype)
    got = rope_op(dataclasses.replace(i, **changed), "cpu")
    for name in ("q", "k", "dq", "dk") if wrong != "heads" else ("q", "k"):
        with pytest.raises(BudgetExceededError):
            assert_within_budget(got[name], oracle[name], low[name])


def test_opcheck_of_views():
    i = rope_inputs((2, 5), 3, 16, Hk=2, dtype=torch.bfloat16)
    wide = torch.cat([i.q, i.k], -2)
    heads = [wide[:, :, :3], wide[:, :, 3:]]
    for operator in (torch.ops.lora_kernels.rope_fwd.default,
                     torch.ops.lora_kernels.rope_bwd.default):  # fmt: skip
        opcheck(operator, (heads, i.cos, i.sin, None, False, "cpu"))


def test_the_host_entry_checks_what_it_reads():
    q, cos = torch.zeros(2, 4, 1, 8), torch.zeros(4, 8)
    ids = torch.zeros(2, 4, dtype=torch.int64)
    wrong = [
        ([q], cos[:3], cos[:3], None),
        ([q], cos, cos[:3], None),
        ([q], torch.zeros(3, 4, 8), torch.zeros(3, 4, 8), None),
        ([q], torch.zeros(4, 10), torch.zeros(4, 10), None),
        ([q], torch.zeros(4, 7), torch.zeros(4, 7), None),
        ([q, q.half()], cos, cos, None),
        ([q, q[:1]], cos, cos, None),
        ([q.double()], cos, cos, None),
        ([q], cos.int(), cos.int(), None),
        ([q], cos, cos, ids[:, :3]),
        ([q], cos, cos, ids.float()),
        ([], cos, cos, None),
    ]
    for heads, c, s, positions in wrong:
        with pytest.raises(RuntimeError, match=r"rope \(cpu\)"):
            library.rope_rotate(heads, c, s, positions, False, False, False)
    with pytest.raises(RuntimeError, match="side by side"):
        library.rope_rotate([torch.zeros(2, 4, 8, 3).mT], cos, cos, None, False, False, True)


def test_choice_and_refusals():
    told = lk.explain("rope", B=1, S=64, H=4, D=16, dtype="bfloat16")
    assert told["backend"] == "cpu" and told["reason"] == "one pass over the heads"
    assert lk.explain("rope", B=1, S=64, H=4, D=16, dtype="float64")["backend"] == "aten"
    with pytest.raises(BackendUnavailableError, match=r"torch\.float64 is not supported"):
        rope_op(rope_inputs(dtype=torch.float64), "cpu")
