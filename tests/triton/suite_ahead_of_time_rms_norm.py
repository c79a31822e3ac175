"""The Triton kernels of rms_norm compiled for GPUs that are not here.

What is asserted of the machine code: no spills, and no more shared memory than a device has. Not
collected by itself: suite_runner.py runs this file in a process of its own.
"""

from __future__ import annotations

import itertools

import ahead_of_time
import pytest
import torch

from lora_kernels.ops import _triton_partial_sums
from lora_kernels.ops.rms_norm import triton as host
from lora_kernels.ops.rms_norm import triton_gradients, triton_normalize, triton_tiles

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KERNELS = (
    triton_normalize.normalize,
    triton_gradients.gradients,
    _triton_partial_sums.sum_partials,
)


@pytest.fixture
def compiled(monkeypatch):
    """The kernels of a forward and a backward, no element of them ever touched."""

    def run(target, dtype, shape=(8192, 4096), ranks=(), layout="rows", weighted=True, wide=False):
        found, kernels = ahead_of_time.recorders(target, KERNELS)
        processors = ahead_of_time.TARGETS[target][1]
        monkeypatch.setattr(host, "_kernels", lambda: host._Kernels(*kernels))
        monkeypatch.setattr(host, "_device", lambda t: (processors, target.startswith("gfx")))
        m, k = shape

        def matrix(rows, columns, dtype=dtype):
            return ahead_of_time.matrix(rows, columns, dtype, layout)

        own = FP32 if wide else dtype
        weight = torch.empty(k, dtype=own, device="meta") if weighted else None
        members = [matrix(r, k, own) for r in ranks]
        _, rstd, _ = host.rms_norm_fwd(matrix(m, k), weight, members, 1e-6, 0.0)
        host.rms_norm_bwd(matrix(m, k), matrix(m, k), weight, rstd, 0.0, True)
        return found

    return run


def assert_fits(found: list[ahead_of_time.Compiled]) -> None:
    ahead_of_time.assert_fits(found)
    ahead_of_time.assert_no_tensor_maps(found)


FEW = [
    ("sm_80", BF16, {"ranks": (16, 16, 16)}),
    ("sm_90", BF16, {"shape": (8192, 576)}),
    ("sm_100", FP32, {"ranks": (12,), "shape": (7, 16384)}),
    ("gfx942", FP16, {"ranks": (64, 32), "shape": (8192, 1024)}),
]
CHANGES = (
    {}, {"ranks": (16, 16, 16)}, {"shape": (8192, 64)}, {"shape": (8192, 16384), "weighted": False},
    {"shape": (100, 20000), "ranks": (8,)}, {"ranks": (64,), "shape": (65536, 1024)},
    {"ranks": (256,)}, {"ranks": (128, 128), "shape": (16384, 2048)},
    {"ranks": (16,), "layout": "columns"}, {"ranks": (5, 3), "shape": (7, 1001), "wide": True},
)  # fmt: skip
WHOLE = list(itertools.product(ahead_of_time.TARGETS, (BF16, FP16, FP32), CHANGES))


@pytest.mark.parametrize(("target", "dtype", "changes"), FEW, ids=str)
def test_kernels(compiled, target, dtype, changes):
    assert_fits(compiled(target, dtype, **changes))


@pytest.mark.slow
@pytest.mark.parametrize(("target", "dtype", "changes"), WHOLE, ids=str)
def test_every_kind(compiled, target, dtype, changes):
    assert_fits(compiled(target, dtype, **changes))


def test_reads_and_writes_are_sixteen_bytes_wide(compiled):
    for made in compiled("sm_90", BF16)[:2]:
        assert any("128" in width for width in made.suffixes("LDG")), made
        assert any("128" in width for width in made.suffixes("STG")), made


def test_a_tile_too_large_is_noticed(compiled, monkeypatch):
    """Negative control: the gate sees the spills of a program that holds too much."""
    monkeypatch.setattr(triton_tiles, "_rows_of", lambda columns: (1, 1))
    with pytest.raises(AssertionError, match="spills"):
        assert_fits(compiled("sm_80", BF16))
