"""The default tiles of attention's Triton kernels: one for every problem and device, that fits."""

from __future__ import annotations

import itertools

import pytest

from lora_kernels.ops.attention import triton_configs as configs

TARGETS = [configs.target(name, 132) for name in (*configs.SHARED_BYTES, "sm_999")]
HEADS = (1, 16, 40, 64, 72, 80, 96, 112, 128, 192, 256)
KERNELS = ("forward", "grad_q", "grad_kv", "grad_mask")


@pytest.mark.parametrize("where", TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_problem_has_a_tile_that_fits(where, kernel):
    for size, value, itemsize, burden in itertools.product(HEADS, (16, 64, 256), (2, 4), (0, 1, 2)):
        if kernel == "grad_mask" and burden != 2:
            continue  # there is a mask
        tile = configs.choose(kernel, size, value, itemsize, where, burden)
        assert tile.keys in (32, 64, 128), "whole draws of the dropout generator"
        assert tile.rows in (16, 32, 64, 128)
        assert tile.num_warps in (4, 8) and tile.num_stages >= 1
        needed = configs.shared_bytes(kernel, tile, size, value, itemsize, burden)
        # Without a pipeline operands are not all there at once: an upper bound of no use.
        assert needed <= where.shared_bytes or tile.num_stages == 1


@pytest.mark.parametrize("where", TARGETS, ids=lambda t: t.name)
def test_tiles_over_a_cache(where):
    for rows, size, itemsize in itertools.product((1, 4, 17, 33, 500), HEADS, (2, 4)):
        tile = configs.decode(rows, size, size, itemsize, where)
        assert tile.rows in (16, 32, 64) and tile.keys in (32, 64, 128)
        needed = configs.shared_bytes("decode", tile, size, size, itemsize, 0)
        assert needed <= where.shared_bytes or tile.num_stages == 1


def test_splits_fill_the_device_and_no_more():
    where = configs.target("sm_90", 132)
    assert configs.decode_splits(8, 65536, 64, where) == 32
    assert configs.decode_splits(8, 1024, 64, where) == 4
    assert configs.decode_splits(1000, 65536, 64, where) == 1
    assert configs.decode_splits(8, 0, 64, where) == 1


@pytest.mark.parametrize(
    ("size", "want"),
    [(1, (16, 0)), (16, (16, 0)), (24, (32, 0)), (40, (32, 16)), (59, (64, 0)), (64, (64, 0)),
     (72, (64, 16)), (80, (64, 16)), (96, (64, 32)), (112, (128, 0)), (128, (128, 0)),
     (160, (128, 32)), (192, (128, 64)), (224, (256, 0)), (256, (256, 0))],
)  # fmt: skip
def test_parts_of_a_head(size, want):
    assert configs.parts(size) == want
    assert sum(want) >= size


def test_forcing_ends_with_the_block():
    where, odd = configs.target("sm_90"), configs.Tile(16, 32, 1, 1)
    with configs.forced(grad_q=odd):
        assert configs.choose("grad_q", 64, 64, 2, where, 0) == odd
    assert configs.choose("grad_q", 64, 64, 2, where, 0) != odd
