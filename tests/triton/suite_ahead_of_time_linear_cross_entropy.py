"""The Triton kernel of linear_cross_entropy compiled for GPUs that are not here.

What is asserted of the machine code: no spills, and no more shared memory than two programs of a
device have. Not collected by itself: suite_runner.py runs this file in a process of its own.
"""

from __future__ import annotations

import itertools

import ahead_of_time
import pytest
import torch

from lora_kernels.ops.linear_cross_entropy import triton as host
from lora_kernels.ops.linear_cross_entropy import triton_rows

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MOST_SHARED = 32768


@pytest.fixture
def compiled(monkeypatch):
    """The kernel of losses alone and of losses with their gradient, no element ever touched."""

    def run(target, dtype, vocabulary, smoothing=0.0, softcap=0.0):
        found, [recorder] = ahead_of_time.recorders(target, [triton_rows.rows_to_losses])
        monkeypatch.setattr(host, "_kernel", lambda: recorder)
        work = host._Rows(-100, smoothing, softcap, 0.0)
        z = torch.empty(100, -(-vocabulary // 64) * 64, dtype=dtype)[:, :vocabulary]
        labels = torch.empty(100, dtype=torch.int64)
        work(z, labels, None)
        work(z, labels, torch.empty(100))
        return found

    return run


def assert_fits(found: list[ahead_of_time.Compiled]) -> None:
    ahead_of_time.assert_fits(found, MOST_SHARED)
    ahead_of_time.assert_no_tensor_maps(found)


def widest_loads(made: ahead_of_time.Compiled) -> set[str]:
    """Widths of the loads of the main loop, as the SASS spells them."""
    return set(made.suffixes("LDG"))


FEW = [
    ("sm_80", BF16, 50257, 0.1, 30.0),
    ("sm_90", BF16, 128256, 0.0, 0.0),
    ("sm_100", FP32, 1000, 0.1, 0.0),
    ("gfx942", FP16, 256000, 0.0, 30.0),
]
WHOLE = list(
    itertools.product(
        ahead_of_time.TARGETS, (BF16, FP16, FP32), (7, 1000, 50257), (0.0, 0.1), (0.0, 30.0)
    )
)


@pytest.mark.parametrize(("target", "dtype", "vocabulary", "smoothing", "softcap"), FEW, ids=str)
def test_kernels(compiled, target, dtype, vocabulary, smoothing, softcap):
    found = compiled(target, dtype, vocabulary, smoothing, softcap)
    assert_fits(found)
    for made in found:
        if made.is_cuda:  # 16 bytes at a time in the main loop
            assert any("128" in width for width in widest_loads(made)), made


@pytest.mark.slow
@pytest.mark.parametrize(("target", "dtype", "vocabulary", "smoothing", "softcap"), WHOLE, ids=str)
def test_every_kind(compiled, target, dtype, vocabulary, smoothing, softcap):
    assert_fits(compiled(target, dtype, vocabulary, smoothing, softcap))


def test_another_vocabulary_compiles_nothing_new(compiled):
    first = compiled("sm_90", BF16, 128256)
    again = compiled("sm_90", BF16, 50257)
    assert [a.compiled.hash for a in again] == [b.compiled.hash for b in first]


def test_a_block_too_large_is_noticed(compiled, monkeypatch):
    """Negative control: the gate sees the spills of a row that is held in too few threads."""
    monkeypatch.setattr(host, "_BLOCK", 1 << 17)
    with pytest.raises(AssertionError, match="spills"):
        assert_fits(compiled("sm_80", FP32, 1 << 14))
