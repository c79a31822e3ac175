"""Every Triton kernel of attention compiled for GPUs that are not here.

What is asserted of the machine code: no spills, shared memory within the device's limit, and the
units that the design counts on (wgmma on sm_90, mma and asynchronous copies on sm_80). Not
collected by itself: suite_runner.py runs this file in a process of its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import ahead_of_time
import pytest
import torch

from lora_kernels.ops.attention import triton as host
from lora_kernels.ops.attention import (
    triton_backward,
    triton_configs,
    triton_decode,
    triton_decode_host,
    triton_forward,
    triton_mask_gradient,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KERNELS = (
    triton_forward.forward, triton_backward.row_terms, triton_backward.grad_q,
    triton_backward.grad_kv, triton_mask_gradient.grad_mask,
)  # fmt: skip
PASSES = ("forward", "grad_q", "grad_kv")


@dataclass(frozen=True)
class Case:
    target: str
    D: int = 64
    Dv: int = 0
    dtype: torch.dtype = BF16
    causal: bool = True
    window: int = -1
    softcap: float = 0.0
    sinks: bool = False
    alibi: bool = False
    mask: str = ""
    dropout_p: float = 0.0
    packed: bool = False
    S: int = 4096
    H: int = 8
    Hk: int = 2

    def __str__(self) -> str:
        default = Case(self.target)
        changed = {n: v for n, v in vars(self).items() if v != getattr(default, n)}
        told = "-".join(f"{n}={v}" for n, v in changed.items() if n != "target")
        return f"{self.target}-{told}".replace("torch.", "")


@pytest.fixture
def compile_case(monkeypatch):
    """Runs forward and backward of a case into compilations, no element of it ever touched."""

    def compile_all(case: Case, backward: bool = True) -> list[ahead_of_time.Compiled]:
        found = record(monkeypatch, case.target)
        rows = (case.S,) if case.packed else (1, case.S)
        q, k, v, out = (
            torch.empty(*rows, heads, size, dtype=case.dtype)
            for heads, size in (
                (case.H, case.D), (case.Hk, case.D), (case.Hk, case.Dv or case.D),
                (case.H, case.Dv or case.D),
            )
        )  # fmt: skip
        ends = torch.tensor([0, 100, case.S], dtype=torch.int32) if case.packed else None
        mask = None
        if case.mask:
            mask = torch.empty(1, 1, case.S, case.S, dtype=case.dtype)
            mask = mask.bool() if case.mask == "bool" else mask
        arguments = (
            q, k, v, torch.empty(case.H) if case.sinks else None, mask, ends, ends,
            torch.empty(1, case.H) if case.alibi else None, torch.zeros((), dtype=torch.int64),
            0.125, (case.window, 0 if case.causal else -1), case.softcap, case.dropout_p, True,
        )  # fmt: skip
        host.attention_fwd(*arguments)
        if not backward:
            return found
        lse = torch.empty(*rows[:-1], case.H, case.S)
        needs = [True, True, True, case.sinks, case.mask == "additive"]
        host.attention_bwd(out, None, out, lse, *arguments, needs)
        return found

    return compile_all


def record(monkeypatch: pytest.MonkeyPatch, target: str) -> list[ahead_of_time.Compiled]:
    found, recorders = ahead_of_time.recorders(target, KERNELS)
    where = triton_configs.target(target, ahead_of_time.TARGETS[target][1])
    monkeypatch.setattr(host, "_kernels", lambda: host._Kernels(*recorders, False))
    monkeypatch.setattr(host, "_target", lambda *args: where)
    return found


def spilled(made: ahead_of_time.Compiled) -> int:
    """What goes to memory. On AMD scalar registers spill into lanes of a vector register."""
    if made.is_cuda:
        return made.spills()
    text = made.compiled.asm["amdgcn"]
    found = re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", text)
    assert found
    return sum(map(int, found))


def assert_fits(found: list[ahead_of_time.Compiled], target: str) -> None:
    limit, wrong = triton_configs.SHARED_BYTES[target], []
    for made in found:
        if made.shared > limit:
            wrong.append(f"{made}: {made.shared} bytes of shared memory")
        if spilled(made):
            wrong.append(f"{made}: spills {spilled(made)}")
    assert not wrong, f"{target}:\n" + "\n".join(wrong)


def assert_units(found: list[ahead_of_time.Compiled], case: Case) -> None:
    for made in found:
        if made.kernel not in PASSES or case.dtype == FP32:
            continue
        code = made.opcodes if made.is_cuda else {}
        pipelined = made.constants["num_stages"] > 1
        if case.target == "sm_90":
            wide = made.constants["BN" if made.kernel == "grad_kv" else "BM"] >= 64
            assert code["HGMMA"] > 0 or (code["HMMA"] > 0 and not wide), made
        elif case.target == "sm_80":
            assert code["HMMA"] > 0, made
        elif case.target == "sm_100":
            text = made.compiled.asm["ptx"]
            assert "tcgen05.mma" in text or "mma.sync" in text, made
        else:
            assert "v_mfma" in made.compiled.asm["amdgcn"], made
        if case.target in ("sm_80", "sm_90") and pipelined:
            assert code["LDGSTS"] > 0, f"{made}: no asynchronous copies"


FEW = [
    Case("sm_90", 128),
    Case("sm_80", 80, window=1000, sinks=True, packed=True),
    Case("gfx942", softcap=30.0),
]
HEADS = ((40, 0), (64, 0), (72, 0), (80, 0), (96, 0), (128, 0), (192, 128), (256, 0))
WAYS = [
    {}, {"window": 1000, "sinks": True}, {"softcap": 30.0}, {"alibi": True, "packed": True},
    {"mask": "bool", "causal": False}, {"dropout_p": 0.1, "packed": True},
    {"mask": "additive", "dropout_p": 0.1, "softcap": 30.0, "alibi": True, "window": 1000,
     "sinks": True},
]  # fmt: skip
MANY = [
    Case(target, D, Dv, dtype, **way)
    for target in ahead_of_time.TARGETS
    for D, Dv in HEADS
    for way in WAYS
    for dtype in (BF16, FP16)
    if dtype == BF16 or D == 64
] + [Case(target, D, dtype=FP32, **way) for target in ("sm_80", "sm_90") for D in (40, 64)
     for way in ({}, WAYS[-1])]  # fmt: skip


@pytest.mark.parametrize("case", FEW, ids=str)
def test_defaults(compile_case, case):
    found = compile_case(case)
    assert_fits(found, case.target)
    assert_units(found, case)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_extents_of_one(compile_case, packed):
    """They are constants to the compiler, not values."""
    mask = "" if packed else "additive"
    assert compile_case(Case("sm_90", S=1, H=1, Hk=1, packed=packed, mask=mask, sinks=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", MANY, ids=str)
def test_defaults_of_every_kind(compile_case, case):
    found = compile_case(case)
    assert_fits(found, case.target)
    assert_units(found, case)


def compile_decode(
    monkeypatch: pytest.MonkeyPatch, target: str, D: int, rows: int, dtype: torch.dtype,
    batch: int = 2,
) -> list[ahead_of_time.Compiled]:  # fmt: skip
    found = record(monkeypatch, target)
    recorders = [
        ahead_of_time.Recorder(kernel, found)
        for kernel in (triton_decode.decode, triton_decode.combine)
    ]
    monkeypatch.setattr(triton_decode_host, "_kernels", lambda: tuple(recorders))
    q = torch.empty(batch, rows, 32, D, dtype=dtype)
    pages = torch.empty(64, 16, 8, D, dtype=dtype)
    table = torch.zeros(batch, 64, dtype=torch.int32)
    triton_decode_host.attention_decode(
        q, pages, pages, table[:, 0], table, torch.empty(32), None, 0.1, (500, 0), 0.0, 4
    )
    return found


@pytest.mark.parametrize(("target", "D"), [("sm_90", 128)])
def test_decode(monkeypatch, target, D):
    """One sequence: an extent of 1 is a constant to the compiler, not a value."""
    found = compile_decode(monkeypatch, target, D, 1, BF16, batch=1)
    assert [made.kernel for made in found] == ["decode", "combine"]
    assert_fits(found, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", ahead_of_time.TARGETS)
@pytest.mark.parametrize("D", [64, 80, 128, 256])
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_decode_of_every_kind(monkeypatch, target, D, rows):
    for dtype in (BF16, FP32):
        if dtype == BF16 or D <= 64:
            assert_fits(compile_decode(monkeypatch, target, D, rows, dtype), target)


def test_a_tile_that_is_too_large_is_noticed(compile_case):
    """Negative control of both gates."""
    tile = triton_configs.Tile(128, 64, 4, 6)
    needed = triton_configs.shared_bytes("forward", tile, 128, 128, 2, 0)
    assert needed > triton_configs.SHARED_BYTES["sm_80"]
    with triton_configs.forced(forward=tile):
        found = compile_case(Case("sm_80", 128, causal=False), backward=False)
    with pytest.raises(AssertionError, match=r"bytes of shared memory\n.*spills"):
        assert_fits(found, "sm_80")


def test_other_lengths_and_windows_compile_nothing_new(compile_case):
    case = Case("sm_80", window=1000, sinks=True)
    kernels = {id(made.compiled) for made in compile_case(case, backward=False)}
    host._kernels().forward.found = found = []
    q = torch.empty(3, 1777, 8, 64, dtype=BF16)
    k = torch.empty(3, 999, 2, 64, dtype=BF16)
    host.attention_fwd(
        q, k, k, torch.empty(8), None, None, None, None, None, 0.3, (77, 0), 0.0, 0.0, True
    )
    assert {id(made.compiled) for made in found} <= kernels
