"""The dropout generator against an independent scalar version and published test vectors."""

from __future__ import annotations

import math

import pytest
import torch

from lora_kernels.ops import _philox

MASK32 = 0xFFFFFFFF


def scalar_philox(key, counter, rounds):
    """One block in Python integers, straight from the published definition."""
    k0, k1 = key
    x0, x1, x2, x3 = counter
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (p1 >> 32) ^ x1 ^ k0, p1 & MASK32, (p0 >> 32) ^ x3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return x0, x1, x2, x3


PI_COUNTER = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
PI_KEY = (0xA4093822, 0x299F31D0)
ONES = MASK32
# (rounds, counter, key, result): the known answers that the generator's authors publish.
KNOWN = [
    (7, (0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, (ONES,) * 4, (ONES,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, PI_COUNTER, PI_KEY, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, (0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, (ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, PI_COUNTER, PI_KEY, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("rounds", "counter", "key", "want"), KNOWN)
def test_known_answers(monkeypatch, rounds, counter, key, want):
    assert scalar_philox(key, counter, rounds) == want
    monkeypatch.setattr(_philox, "_ROUNDS", rounds)
    got = _philox.philox4x32(
        tuple(torch.tensor(k) for k in key), tuple(torch.tensor(c) for c in counter)
    )
    assert tuple(int(word) for word in got) == want


def scalar_keep(seed: int, m: int, k: int, stream: int, p: float) -> bool:
    """The documented formula for one element, in Python integers."""
    counter = (16 * (k // 128) + (k % 32) // 2, m, stream, 0)
    word = scalar_philox((seed & MASK32, seed >> 32), counter, 7)[(k % 128) // 32]
    draw = (word >> 16) if k % 2 else (word & 0xFFFF)
    return draw >= round(p * 65536)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 0x0123456789ABCDEF, 2**63 - 1])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 31), (2, 129), (3, 300)])
@pytest.mark.parametrize("stream", [0, 1, 7])
def test_mask_is_the_documented_formula(seed, rows, columns, stream):
    mask = _philox.keep_mask(torch.tensor(seed), rows, columns, 0.4, stream)
    want = [[scalar_keep(seed, m, k, stream, 0.4) for k in range(columns)] for m in range(rows)]
    assert mask.tolist() == want


def test_mask_of_a_part_is_a_part_of_the_mask():
    seed = torch.tensor(99)
    whole = _philox.keep_mask(seed, 40, 400, 0.3)
    assert torch.equal(_philox.keep_mask(seed, 17, 130, 0.3), whole[:17, :130])


@pytest.mark.parametrize("p", [0.0, 1e-6, 1e-3, 0.05, 0.1, 0.25, 0.5, 0.9, 0.999, 1.0])
def test_threshold_and_scale(p):
    drop = _philox.threshold(p) / 65536
    assert abs(drop - p) <= 0.5 / 65536
    if drop == 1.0:
        assert _philox.keep_scale(p) == 0.0
    else:
        assert math.isclose(_philox.keep_scale(p) * (1 - drop), 1.0)


def test_extreme_rates_keep_all_or_nothing():
    seed = torch.tensor(5)
    assert _philox.keep_mask(seed, 50, 500, 0.0).all()
    assert not _philox.keep_mask(seed, 50, 500, 1.0).any()


ROWS, COLUMNS = 500, 1000


def five_sigma(probability: float, n: int) -> float:
    return 5 * math.sqrt(probability * (1 - probability) / n)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.95])
def test_keep_rate(p):
    mask = _philox.keep_mask(torch.tensor(31337), ROWS, COLUMNS, p)
    keep = 1 - _philox.threshold(p) / 65536
    assert abs(mask.float().mean().item() - keep) < five_sigma(keep, mask.numel())
    for axis, n in ((0, ROWS), (1, COLUMNS)):
        worst = (mask.float().mean(axis) - keep).abs().max().item()
        assert worst < 1.2 * five_sigma(keep, n)  # 6 sigma: up to 1000 lines are looked at


SHIFTS = [(0, 1), (0, 2), (0, 16), (0, 32), (0, 64), (0, 96), (0, 128), (1, 0), (2, 0), (1, 1)]


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("shift", SHIFTS, ids=str)
def test_rows_and_columns_are_independent(p, shift):
    mask = _philox.keep_mask(torch.tensor(424242), ROWS, COLUMNS, p)
    down, right = shift
    assert_independent(
        mask[down:, right:], mask[: ROWS - down, : COLUMNS - right], 1 - round(p * 65536) / 65536
    )


def assert_independent(first: torch.Tensor, second: torch.Tensor, keep: float) -> None:
    both = (first & second).float().mean().item()
    # Pairs that share an element are correlated, which at most doubles the variance.
    assert abs(both - keep**2) < math.sqrt(2) * five_sigma(keep**2, first.numel())


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_streams_and_seeds_are_independent(p):
    keep = 1 - round(p * 65536) / 65536
    base = _philox.keep_mask(torch.tensor(7), ROWS, COLUMNS, p)
    others = [_philox.keep_mask(torch.tensor(7), ROWS, COLUMNS, p, g) for g in (1, 2)]
    others += [
        _philox.keep_mask(torch.tensor(s), ROWS, COLUMNS, p) for s in (6, 8, 7 + 2**32, 7 + 2**62)
    ]
    for other in others:
        assert not torch.equal(base, other)
        assert_independent(base, other, keep)
