"""The CUDA kernel of rope and its host entry on the CPU, in the emulator; no GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import emulated_host_entry
import pytest
import torch
from emulated_host_entry import LARGE

from lora_kernels._backends import cuda as loader
from lora_kernels.ops import _dispatch
from lora_kernels.ops.rope import cuda, rotate_in_place
from lora_kernels.ops.rope.problem import RopeProblem
from lora_kernels.testing import (
    BudgetExceededError,
    check_rope,
    poisoned_empty,
    rope_inputs,
    rope_op,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHIFTED_TABLE = 6


@pytest.fixture(autouse=True)
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    operators, dll = emulated_host_entry.load("rope")
    monkeypatch.setattr(loader, "load", lambda: (operators, ""))
    monkeypatch.setattr(cuda, "supports", lambda _: (True, "emulated"))
    _dispatch._resolved.cache_clear()
    yield dll
    _dispatch._resolved.cache_clear()
    dll.lk_options(0, 0, LARGE)


def check(*args, **options) -> None:
    with poisoned_empty():
        check_rope(rope_inputs(*args, **options), "cuda")


@pytest.mark.parametrize("tables", ["shared", "batch", "cache"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_oracle(dtype, interleaved, tables):
    """Whole heads and a part, in accesses of 16 bytes and one by one; tables of both widths."""
    for R in (None, 16, 6):
        for table_dtype in (torch.float32, torch.bfloat16):
            check(
                D=32, R=R, interleaved=interleaved, tables=tables, dtype=dtype, H=5,
                table_dtype=table_dtype,
            )  # fmt: skip


@pytest.mark.parametrize("lead", [(1, 1), (41,), (0,), (2, 0), (0, 3)], ids=str)
def test_lengths_and_packed_heads(lead):
    for Hk in (0, 3):
        check(lead, Hk=Hk, R=10, tables="cache", dtype=torch.bfloat16)
        check(lead, Hk=Hk, D=80, R=32, dtype=torch.float16)


@pytest.mark.parametrize("layout", ["sliced", "strided", "permuted", "misaligned"])
def test_layouts(layout):
    for interleaved in (False, True):
        check(layout=layout, interleaved=interleaved, tables="cache", dtype=torch.bfloat16)


def test_ids_of_four_bytes_and_a_shared_batch():
    i = rope_inputs(tables="cache", dtype=torch.bfloat16)
    want = rope_op(i, "aten")
    i.position_ids.copy_(i.position_ids[:1].expand_as(i.position_ids))
    want = rope_op(i, "cuda")
    for ids in (i.position_ids[:1].int(), i.position_ids[0], i.position_ids.int().t()[:, 0]):
        outs = cuda.rope_fwd([i.q], i.cos, i.sin, ids, False)
        assert torch.equal(outs[0], want["q"])


def test_a_position_outside_of_the_cache_gives_nan_in_rotated_channels():
    i = rope_inputs((3,), D=16, R=8, tables="cache", dtype=torch.bfloat16)
    for wrong in (-1, 50):
        (out,) = cuda.rope_fwd([i.q], i.cos, i.sin, torch.tensor([1, wrong, 2]), False)
        assert out[1, :, :8].isnan().all() and torch.equal(out[1, :, 8:], i.q[1, :, 8:])
        assert out[0].isfinite().all() and out[2].isfinite().all()


def test_in_place_inside_of_something_wider():
    """As lora_qkv has it: the first heads of a projection, the others left alone."""
    i = rope_inputs(H=6, D=16, dtype=torch.bfloat16)
    for heads in (i.q[:, :, :4], i.q[:, :, :4, 1:13]):
        tables = (i.cos[:, : heads.shape[-1]], i.sin[:, : heads.shape[-1]], None, False)
        (want,) = cuda.rope_fwd([heads], *tables)
        whole = i.q.clone()
        view = whole.as_strided(heads.size(), heads.stride(), heads.storage_offset())
        (got,) = rotate_in_place([view], *tables, "cuda")
        assert got.data_ptr() == view.data_ptr() and torch.equal(got, want)
        view.copy_(heads)
        assert torch.equal(whole, i.q)


def test_more_tensors_than_a_launch_takes():
    i = rope_inputs(dtype=torch.bfloat16)
    outs = cuda.rope_fwd([i.q] * 9, i.cos, i.sin, None, False)
    assert len(outs) == 9 and all(torch.equal(o, outs[0]) for o in outs)


def test_planted_faults_are_found(emulator):
    i = rope_inputs(dtype=torch.bfloat16)
    emulator.lk_options(0, SHIFTED_TABLE, LARGE)
    with pytest.raises(BudgetExceededError):
        check_rope(i, "cuda")


def test_what_the_entry_refuses():
    operators, _ = loader.load()
    q, table = torch.zeros(2, 5, 3, 8), torch.zeros(5, 8)
    for heads, cos, sin, ids, message in (
        ([], table, table, None, "1 to 8 tensors"),
        ([q.double()], table, table, None, "unsupported dtype"),
        ([q[0, 0]], table, table, None, "three or four dimensions"),
        ([q, q.half()], table, table, None, "differ in shape or dtype"),
        ([q], table[:4], table, None, "cos does not fit"),
        ([q], table, table[:4], None, "sin does not fit"),
        ([q], table[:, :3], table[:, :3], None, "not even"),
        ([q], torch.zeros(5, 10), torch.zeros(5, 10), None, "at most those of a head"),
        ([q], table, table, torch.zeros(5), "not int32 or int64"),
        ([q], table, table, torch.zeros(4, dtype=torch.int64), "position_ids does not fit"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operators.rope_rotate(heads, cos, sin, ids, False, False)


def test_reasons(monkeypatch):
    monkeypatch.undo()
    for changes, reason in (
        ({"device": "cpu"}, "q is on cpu"),
        ({"dtype": torch.float64}, "float64 is not supported"),
        ({"D": 65538}, "a head of 65538 is too large"),
        ({"B": 2**20, "S": 2**11}, "positions are not supported"),
    ):
        shapes = {"B": 2, "S": 4, "H": 4, "D": 8, "dtype": torch.bfloat16, "device": "cuda"}
        able, why = cuda.supports(RopeProblem.from_shapes(**{**shapes, **changes}))
        assert not able and reason in why
