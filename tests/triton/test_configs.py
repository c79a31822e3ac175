"""The default tiles of the Triton kernels: there is a valid one for every problem and device."""

from __future__ import annotations

import itertools

import pytest

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops.lora_linear import configs

TARGETS = [configs.target(name, 132) for name in (*configs.SHARED_BYTES, "sm_999")]
RANKS = (1, 16, 17, 32, 64, 100, 128, 256)


@pytest.mark.parametrize("where", TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rank", RANKS)
def test_every_problem_has_a_valid_tile(where, itemsize, rank):
    flags = itertools.product((False, True), (False, True), (False, True), (1, 2, 8))
    for dropout, exact, descriptor, members in flags:
        for m, p in ((1, 1), (70, 4096), (8192, 14336)):
            c = configs.gemm(
                m, p, rank, itemsize, where,
                dropout=dropout, exact=exact, descriptor=descriptor, members=members,
            )  # fmt: skip
            unaligned = configs.gemm(
                m, p, rank, itemsize, where,
                dropout=dropout, exact=exact, members=members, vectors=False,
            )  # fmt: skip
            assert not unaligned.descriptor
            assert c in configs.gemm_table(itemsize, where)
            assert not configs.invalid(
                c, where, itemsize, rank, dropout=dropout, exact=exact, members=members
            )
            assert c.descriptor <= (descriptor and where.descriptors)
            assert configs.gemm_shared_bytes(c, itemsize, rank) <= where.shared_bytes


@pytest.mark.parametrize("where", TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rank", RANKS)
def test_walks_fit_and_fill_the_device(where, itemsize, rank):
    padded = configs.padded_rank(rank)
    for m, k in ((1, 1), (16, 4096), (8192, 4096), (100_000, 14336)):
        for c in (
            configs.shrink(m, k, padded, itemsize, where, False),
            configs.shrink(m, k, padded, itemsize, where, True),
            configs.dy_pass(m, k, rank, itemsize, where),
            configs.da_pass(m, k, padded, itemsize, where),
        ):
            assert c.splits >= 1
            assert c.num_stages >= 1
            for extent in (c.held, c.step):
                assert extent >= 16
                assert extent & (extent - 1) == 0
            if c.num_stages > 1:
                stage = (c.held + padded) * c.step * itemsize
                assert c.num_stages * stage <= where.shared_bytes // 2


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rank", RANKS)
def test_dropout_tiles_are_whole_draws(itemsize, rank):
    where, padded = configs.target("sm_90", 132), configs.padded_rank(rank)
    for tile in (
        configs.shrink(8192, 4096, padded, itemsize, where, True).step,
        configs.da_pass(8192, 4096, padded, itemsize, where).held,
        configs.gemm(8192, 4096, rank, itemsize, where, dropout=True).block_n,
    ):
        assert tile == 32 or tile % 128 == 0


@pytest.mark.parametrize(
    ("ranks", "most", "want"),
    [
        ((16,), 64, [(0, 1)]),
        ((8, 16, 3), 64, [(0, 3)]),
        ((256, 1), 256, [(0, 1), (1, 2)]),
        ((64, 16, 16, 16), 64, [(0, 1), (1, 4)]),
        ((100, 3, 200), 64, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_members_of_a_launch(ranks, most, want):
    assert configs.members_per_launch(ranks, most) == want


def test_padding_of_the_rank():
    assert [configs.padded_rank(r) for r in (1, 16, 17, 100, 128, 256)] == [
        16,
        16,
        32,
        128,
        128,
        256,
    ]
    assert [configs.rank_blocks(r, 2) for r in (1, 16, 17, 33, 100, 256)] == [1, 1, 1, 2, 4, 8]


def test_large_problems_get_the_large_tile():
    where = configs.target("sm_90", 132)
    assert configs.gemm(8192, 4096, 16, 2, where, descriptor=True).flatten
    assert configs.gemm(64, 512, 16, 2, where, descriptor=True).block_m == 64


def test_forcing_ends_with_the_block():
    where = configs.target("sm_90", 132)
    odd = configs.Rows(16, 16, 7, 1, 1)
    with configs.forced(shrink=odd):
        assert configs.shrink(64, 64, 16, 2, where, False) == odd
    assert configs.shrink(64, 64, 16, 2, where, False) != odd


GOOD = {"held": 64, "step": 128, "splits": 3, "num_warps": 4, "num_stages": 2}


@pytest.mark.parametrize(
    ("kernel", "dropout", "change", "says"),
    [
        ("shrink", True, {"step": 16}, "step=16; accepted with dropout: 32, 64 or a multiple"),
        ("da_pass", False, {"held": 16}, "held=16; accepted with dropout: 32, 64 or a multiple"),
        ("dy_pass", False, {"held": 48}, "held=48; accepted: powers of two from 16"),
        ("dy_pass", False, {"step": 8}, "step=8; accepted: powers of two from 16"),
        ("shrink", False, {"num_warps": 3}, "num_warps=3; accepted: powers of two"),
        ("shrink", False, {"num_warps": 64}, "num_warps=64"),
        ("shrink", False, {"splits": 0}, "splits=0; accepted: whole numbers from 1"),
        ("dy_pass", False, {"num_stages": "4"}, "num_stages='4'; accepted: whole numbers"),
        ("da_pass", False, {"wide": 1}, "unexpected keyword argument 'wide'"),
    ],
)
def test_a_tuned_tile_that_cannot_be_is_refused(monkeypatch, kernel, dropout, change, says):
    where = configs.target("sm_90", 132)
    asked = {
        "shrink": lambda: configs.shrink(8192, 4096, 16, 2, where, dropout),
        "dy_pass": lambda: configs.dy_pass(8192, 4096, 16, 2, where),
        "da_pass": lambda: configs.da_pass(8192, 4096, 16, 2, where),
    }[kernel]
    monkeypatch.setattr(configs.tuned_tiles, "lookup", lambda *a, **k: GOOD)
    assert asked() == configs.Rows(**GOOD)
    monkeypatch.setattr(configs.tuned_tiles, "lookup", lambda *a, **k: {**GOOD, **change})
    with pytest.raises(InvalidArgumentError, match=f"tuned tile of {kernel} for sm_90") as caught:
        asked()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_narrow_step_is_fine_without_dropout(monkeypatch):
    narrow = {**GOOD, "step": 16}
    monkeypatch.setattr(configs.tuned_tiles, "lookup", lambda *a, **k: narrow)
    assert configs.shrink(8192, 4096, 16, 2, configs.target("sm_90", 132), False).step == 16


def test_what_no_tile_can_hold_is_refused():
    amd, hopper = configs.target("gfx942", 304), configs.target("sm_90", 132)
    assert "masks of 3 members of rank 128" in configs.refused(amd, 128, 2, 3, True)
    for where, rank, members, dropout in (
        (hopper, 128, 3, True), (amd, 128, 1, True), (amd, 128, 3, False), (amd, 64, 3, True),
    ):  # fmt: skip
        assert not configs.refused(where, rank, 2, members, dropout)
