"""The Triton kernel of lora_qkv compiled for GPUs that are not here.

What is asserted of the machine code: tensor-core products, no spills, no more shared memory than
a device has. Not collected by itself: suite_runner.py runs this file in a process of its own.
"""

from __future__ import annotations

import itertools

import ahead_of_time
import pytest
import torch

from lora_kernels.ops.lora_qkv import triton as host
from lora_kernels.ops.lora_qkv import triton_projection

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def compiled(monkeypatch):
    """The kernels of q and k, no element of them ever touched."""

    def run(target, dtype, interleaved=False, M=300, K=2048, D=128, R=None, rank=16, ids=True,
            bias=False):  # fmt: skip
        found, [recorder] = ahead_of_time.recorders(target, [triton_projection.project])
        monkeypatch.setattr(host, "_kernel", lambda: recorder)
        x, s = torch.empty(M, K, dtype=dtype), torch.empty(M, 3 * rank, dtype=dtype)
        table = torch.empty(4096, R or D)
        positions = torch.empty(1, M, dtype=torch.int64) if ids else None
        tables = (table, table) if ids else (table[:M], table[:M])
        for heads, column in ((32, 0), (8, rank)):
            n = heads * D
            host._project(
                x, torch.empty(n, K, dtype=dtype), s[:, column : column + rank],
                torch.empty(n, rank), torch.empty(n, dtype=dtype) if bias else None, 0.5, *tables,
                positions, M, D, heads, interleaved,
            )  # fmt: skip
        assert len(found) == 2, "one launch for each"
        return found

    return run


def assert_fits(found: list[ahead_of_time.Compiled], dtype: torch.dtype) -> None:
    ahead_of_time.assert_fits(found)
    for made in found:
        if made.is_cuda and dtype != FP32:
            assert made.opcodes["HMMA"] + made.opcodes["HGMMA"] + made.opcodes["UTCHMMA"]


FEW = [
    ("sm_80", BF16, {}),
    ("sm_90", FP16, {"interleaved": True, "D": 80, "R": 32, "ids": False, "bias": True}),
    ("sm_100", BF16, {"M": 8, "rank": 64}),
    ("gfx942", BF16, {"D": 64}),
]
WHOLE = list(
    itertools.product(
        ahead_of_time.TARGETS, (BF16, FP16, FP32),
        ({}, {"M": 8}, {"interleaved": True, "bias": True}, {"D": 80, "R": 32, "ids": False},
         {"rank": 128}, {"rank": 5, "K": 2041}),
    )
)  # fmt: skip


@pytest.mark.parametrize(("target", "dtype", "changes"), FEW, ids=str)
def test_kernels(compiled, target, dtype, changes):
    assert_fits(compiled(target, dtype, **changes), dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "dtype", "changes"), WHOLE, ids=str)
def test_every_kind(compiled, target, dtype, changes):
    assert_fits(compiled(target, dtype, **changes), dtype)


def test_a_tile_that_is_too_large_is_noticed(compiled, monkeypatch):
    """Negative control: the gate sees the spills of a tile that does not fit its registers."""
    monkeypatch.setattr(host, "LARGE", host.Tile(128, 128, 32, 4, 2))
    with pytest.raises(AssertionError, match="spills"):
        assert_fits(compiled("sm_80", BF16), BF16)
