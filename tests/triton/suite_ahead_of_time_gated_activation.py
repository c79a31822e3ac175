"""The Triton kernels of gated_activation compiled for GPUs that are not here.

What is asserted of the machine code: no spills, and no more shared memory than a device has. Not
collected by itself: suite_runner.py runs this file in a process of its own.
"""

from __future__ import annotations

import itertools

import ahead_of_time
import pytest
import torch

from lora_kernels.ops import _triton_partial_sums
from lora_kernels.ops.gated_activation import triton as host
from lora_kernels.ops.gated_activation import triton_activate, triton_gradients, triton_tiles

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KERNELS = (triton_activate.activate, triton_gradients.gradients, _triton_partial_sums.sum_partials)
LLAMA = (8192, 14336)


@pytest.fixture
def compiled(monkeypatch):
    """The kernels of a forward and a backward, no element of them ever touched."""

    def run(target, dtype, kind="silu", ranks=(), b_ranks=(), shape=LLAMA, layout="rows", **more):
        found, kernels = ahead_of_time.recorders(target, KERNELS)
        processors = ahead_of_time.TARGETS[target][1]
        monkeypatch.setattr(host, "_kernels", lambda: host._Kernels(*kernels))
        monkeypatch.setattr(host, "_device", lambda t: (processors, target.startswith("gfx")))
        m, n = shape
        adapter = more.get("adapter_dtype", dtype)

        def matrix(rows, columns, dtype=dtype):
            return ahead_of_time.matrix(rows, columns, dtype, layout)

        gate, dh = matrix(m, n), matrix(m, n)
        up = matrix(m, n) if more.get("gated", True) else None
        host.gated_activation_fwd(gate, up, kind, [matrix(r, n, adapter) for r in ranks])
        s = torch.empty(m, sum(b_ranks), dtype=dtype, device="meta") if b_ranks else None
        bs = [matrix(n, r, adapter) for r in b_ranks]
        host.gated_activation_bwd(dh, gate, up, kind, bs, s, [0.5, 2.0][: len(bs)])
        return found

    return run


def assert_fits(found: list[ahead_of_time.Compiled]) -> None:
    ahead_of_time.assert_fits(found)
    ahead_of_time.assert_no_tensor_maps(found)


FEW = [
    ("sm_80", BF16, {"ranks": (16,), "b_ranks": (16, 16)}),
    ("sm_90", BF16, {}),
    ("sm_100", FP32, {"kind": "gelu", "ranks": (12,), "b_ranks": (8,), "gated": False}),
    ("gfx942", FP16, {"kind": "gelu_tanh", "ranks": (64,), "b_ranks": (64, 32)}),
]
KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu_squared")
ADAPTERS = (
    {}, {"ranks": (16,), "b_ranks": (16, 16)}, {"ranks": (8, 8, 3), "b_ranks": (5, 64)},
    {"ranks": (32,), "b_ranks": (32, 32)}, {"ranks": (64,), "b_ranks": (64, 64)},
    {"ranks": (256,), "b_ranks": (256, 256)}, {"ranks": (128,), "b_ranks": (128, 128)},
    {"ranks": (16,), "b_ranks": (16,), "gated": False},
    {"ranks": (16,), "b_ranks": (16, 16), "layout": "columns"},
    {"ranks": (16,), "b_ranks": (16, 16), "shape": (7, 1001), "adapter_dtype": FP32},
)  # fmt: skip
WHOLE = [
    *((t, d, {"kind": k}) for t in ahead_of_time.TARGETS for d in (BF16, FP32) for k in KINDS),
    *itertools.product(ahead_of_time.TARGETS, (BF16, FP16, FP32), ADAPTERS),
]


@pytest.mark.parametrize(("target", "dtype", "changes"), FEW, ids=str)
def test_kernels(compiled, target, dtype, changes):
    assert_fits(compiled(target, dtype, **changes))


@pytest.mark.slow
@pytest.mark.parametrize(("target", "dtype", "changes"), WHOLE, ids=str)
def test_every_kind(compiled, target, dtype, changes):
    assert_fits(compiled(target, dtype, **changes))


def test_reads_and_writes_are_sixteen_bytes_wide(compiled):
    for made in compiled("sm_90", BF16):
        assert any("128" in width for width in made.suffixes("LDG")), made
        assert any("128" in width for width in made.suffixes("STG")), made


def test_a_tile_too_large_is_noticed(compiled, monkeypatch):
    """Negative control: the gate sees the spills of a program that holds too much."""
    tile = triton_tiles.Tile(64, 512, 1, 1 << 20, 4, 1)
    monkeypatch.setattr(triton_tiles, "plain_backward", lambda M, N: tile)
    with pytest.raises(AssertionError, match="spills"):
        assert_fits(compiled("sm_80", BF16))
