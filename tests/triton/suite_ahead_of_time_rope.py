"""The Triton kernel of rope compiled for GPUs that are not here.

What is asserted of the machine code: no spills, and no more shared memory than a device has. Not
collected by itself: suite_runner.py runs this file in a process of its own.
"""

from __future__ import annotations

import itertools

import ahead_of_time
import pytest
import torch

from lora_kernels.ops.rope import triton as host
from lora_kernels.ops.rope import triton_rotate

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.fixture
def compiled(monkeypatch):
    """The kernels of a forward and a backward, no element of them ever touched."""

    def run(target, dtype, interleaved, H=32, Hk=8, D=128, R=None, ids=True, layout=None):
        found, [recorder] = ahead_of_time.recorders(target, [triton_rotate.rotate])
        monkeypatch.setattr(host, "_kernel", lambda: recorder)
        heads = [torch.empty(2, 100, n, D, dtype=dtype) for n in (H, Hk) if n]
        if layout == "heads first":
            heads = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in heads]
        table = torch.empty(4096, R or D)
        positions = torch.empty(2, 100, dtype=torch.int64) if ids else None
        tables = (table, table) if ids else (table[:100], table[:100])
        host.rope_fwd(heads, *tables, positions, interleaved)
        host.rope_bwd(heads, *tables, positions, interleaved)
        assert len(found) == 2, "one launch each way"
        return found

    return run


def assert_fits(found: list[ahead_of_time.Compiled]) -> None:
    ahead_of_time.assert_fits(found)
    ahead_of_time.assert_no_tensor_maps(found)


FEW = [
    ("sm_80", BF16, False, {}),
    ("sm_90", BF16, True, {"D": 96, "R": 48, "Hk": 0, "ids": False}),
    ("sm_100", FP32, False, {"layout": "heads first"}),
    ("gfx942", FP16, True, {"D": 80}),
]
WHOLE = list(
    itertools.product(
        ahead_of_time.TARGETS, (BF16, FP16, FP32, FP64), (False, True),
        ({}, {"D": 64}, {"D": 96, "R": 48}, {"D": 256}, {"D": 10, "Hk": 0, "ids": False},
         {"layout": "heads first"}),
    )
)  # fmt: skip


@pytest.mark.parametrize(("target", "dtype", "interleaved", "changes"), FEW, ids=str)
def test_kernels(compiled, target, dtype, interleaved, changes):
    assert_fits(compiled(target, dtype, interleaved, **changes))


@pytest.mark.slow
@pytest.mark.parametrize(("target", "dtype", "interleaved", "changes"), WHOLE, ids=str)
def test_every_kind(compiled, target, dtype, interleaved, changes):
    assert_fits(compiled(target, dtype, interleaved, **changes))


def test_too_many_channels_for_a_program_are_noticed(compiled, monkeypatch):
    """Negative control: the gate sees the spills of a program that holds too much."""
    monkeypatch.setattr(host, "_CHANNELS", 1 << 15)
    with pytest.raises(AssertionError, match="spills"):
        assert_fits(compiled("sm_80", FP32, False, H=128, Hk=0, D=256))
