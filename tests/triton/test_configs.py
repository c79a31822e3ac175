"""The default tiles of the Triton kernels: there is a valid one for every problem and device."""

from __future__ import annotations

import itertools

import pytest

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
