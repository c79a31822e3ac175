"""The default tiles of quant_linear's Triton kernels."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import replace

import pytest
import torch

from lora_kernels.ops.quant_linear import configs, formats
from lora_kernels.ops.quant_linear.formats import QuantSpec
from lora_kernels.ops.quant_linear.problem import FORMAT_NAMES, QuantLinearProblem

TARGETS = [configs.Target("sm_90", 132), configs.Target("sm_86", 28), configs.Target("gfx942", 304)]
BLOCKS = {formats.FLAT: (32, 64, 4096), formats.GPTQ: (32, 128), formats.AWQ: (7, 128),
          formats.FP8_BLOCK: (16, 128)}  # fmt: skip


def specs(n: int, k: int):
    for fmt, layout in FORMAT_NAMES.values():
        for block in BLOCKS.get(layout, (k,)):
            yield QuantSpec(fmt, layout, (n, k), torch.bfloat16, block)


@pytest.mark.parametrize("where", TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("backward", [False, True])
def test_walks_cover_the_sum_and_fill_the_device(where, itemsize, backward):
    for n, k in ((1, 1), (33, 50), (4096, 4096), (1024, 14336), (14336, 4096), (4096, 4100)):
        for spec in specs(n, k):
            w = configs.walk(spec, itemsize, backward, where)
            for extent in (w.held, w.step):
                assert extent >= 32 and extent & (extent - 1) == 0
            assert 1 <= w.splits <= configs.MAX_SPLITS
            extent, total = (k, n) if backward else (n, k)
            programs = w.splits * -(-extent // w.held)
            steps = -(-total // w.step)
            full = programs * 2 > where.processors
            assert full or w.splits * 2 * configs.AHEAD * 2 > steps or w.splits == 8


def test_the_order_of_sums_is_no_function_of_the_batch():
    assert "rows" not in inspect.signature(configs.walk).parameters
    fields = set(configs.Walk.__dataclass_fields__)
    assert fields == {"held", "step", "splits"}
    assert not fields & set(configs.Launch.__dataclass_fields__)


def test_rows_of_a_program():
    spec = next(specs(64, 64))
    for itemsize, *flags in itertools.product((2, 4), *[(False, True)] * 3):
        for m in (1, 16, 17, 64, 128):
            c = configs.launch(spec, m, itemsize, *flags, TARGETS[0])
            assert c.rows >= 16 and c.rows & (c.rows - 1) == 0
            assert configs.AHEAD % c.ahead == 0
            assert not configs.invalid(c)
        assert configs.launch(spec, 16, itemsize, *flags, TARGETS[0]).rows == 16


@pytest.mark.parametrize(
    ("layout", "k", "block", "columns", "fast"),
    [
        (formats.FLAT, 4096, 64, 64, True),
        (formats.FLAT, 4096, 32, 64, False),
        (formats.FLAT, 4096, 32, 32, True),
        (formats.FLAT, 4100, 64, 64, False),
        (formats.FLAT, 96, 4096, 32, True),
        (formats.GPTQ, 4096, 128, 64, True),
        (formats.GPTQ, 4096, 7, 64, False),
        (formats.AWQ, 100, 64, 64, True),
        (formats.FP8_BLOCK, 100, 40, 32, False),
        (formats.INT8_ROW, 7, 7, 64, True),
    ],
)
def test_one_scale_per_row_of_a_tile(layout, k, block, columns, fast):
    kind = next(kind for kind, of in FORMAT_NAMES.values() if of == layout)
    spec = QuantSpec(kind, layout, (16, k), torch.bfloat16, block)
    assert configs.is_fast(spec, columns) == fast


def test_act_order_has_a_scale_per_element():
    spec = QuantSpec("int4", formats.GPTQ, (16, 64), torch.bfloat16, 64, 0, True)
    assert not configs.is_fast(spec, 64)


def test_no_dequantization_has_a_larger_grid_than_there_is():
    """CUDA has 65535 blocks along the second axis, which walks along in_features."""
    from lora_kernels.ops.quant_linear import triton as host

    narrowest, _ = configs._RANGES[configs.Dequantize, "columns"]
    assert -(-host._MOST_COLUMNS // narrowest) <= 65535
    problem = QuantLinearProblem(M=0, K=host._MOST_COLUMNS + 1, N=1, layout=formats.INT8_ROW)
    usable = host.backend.usable
    host.backend.usable = lambda *_: (True, "usable")
    try:
        assert "too large" in host.supports(problem)[1]
        assert host.supports(replace(problem, K=4096))[0]
    finally:
        host.backend.usable = usable
