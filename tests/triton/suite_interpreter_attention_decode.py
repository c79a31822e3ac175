"""attention_decode's Triton kernels in the interpreter, against the fp64 oracle.

Not collected by itself: the interpreter holds for a whole process, so suite_runner.py runs this
file in a process of its own with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from lora_kernels.ops import attention, attention_decode
from lora_kernels.ops.attention import triton_configs, triton_decode, triton_decode_host
from lora_kernels.testing import BudgetExceededError, assert_within_budget, poisoned_empty
from tests.ops.decode_cases import CASES, check_decode, decode_inputs

SMALL = triton_configs.Tile(16, 32, 4, 1)
LENGTHS = (7, 0, 75)


@pytest.fixture(autouse=True)
def _small_tiles():
    with triton_configs.forced(decode=SMALL):
        yield


def check(num_splits: int | None = None, **arguments: Any) -> None:
    with poisoned_empty():
        check_decode(decode_inputs(**arguments), "triton", num_splits=num_splits)


@pytest.mark.parametrize("case", CASES)
def test_every_case(case):
    """Paged where whole, contiguous where split, so that each meets each case in one or other."""
    odd = list(CASES).index(case) % 2
    check(3 if odd else 1, page=0 if odd else 5, lengths=LENGTHS, **{"H": 2, **CASES[case]})


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("page", [0, 1, 16, 64], ids=str)
@pytest.mark.parametrize("splits", [1, 2, 7])
def test_every_case_paged_and_split(case, page, splits):
    for dtype in (torch.float32, torch.bfloat16):
        check(splits, page=page, lengths=(130, 1, 0, 64), dtype=dtype, **CASES[case])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_and_strides(dtype):
    check(2, lengths=(70,), H=3, Hk=1, D=40, S=2, page=8, dtype=dtype, layout="permuted")


def test_rows_of_several_tiles():
    """More rows (queries x heads of the group) than a tile has, and more queries than keys."""
    check(2, lengths=(40, 5), S=11, H=4, Hk=2, window=(20, 0), sinks=True)


@pytest.mark.parametrize("splits", [1, 3])
def test_decoding_with_a_cache_equals_prefill(splits):
    i = decode_inputs(lengths=(40,), S=40, H=2, Hk=1, page=8)
    k, v = (i.sequence(name, 0)[None] for name in ("k", "v"))
    every = {
        dtype: attention(*(t.to(dtype) for t in (i.q, k, v)), causal=True, backend="reference")
        for dtype in (torch.float64, torch.float32)
    }
    for t in (0, 31, 32, 39):
        step = attention_decode(
            i.q[:, t : t + 1], i.k_cache, i.v_cache, torch.tensor([t + 1]),
            block_table=i.block_table, num_splits=splits, backend="triton",
        )  # fmt: skip
        exact, plain = (every[d][:, t : t + 1] for d in (torch.float64, torch.float32))
        assert_within_budget(step, exact, plain)


def test_splits_that_have_no_key():
    for sinks in (False, True):
        check(5, lengths=(40, 0, 1), H=2, Hk=1, sinks=sinks)


def test_bitwise_from_run_to_run_and_whatever_stands_beside():
    """A sequence's result does not depend on the others of the batch at a fixed split."""
    i = decode_inputs(lengths=(7, 75), page=8, dtype=torch.bfloat16, H=2)
    first, second = (
        attention_decode(**i.arguments(), num_splits=2, backend="triton") for _ in range(2)
    )
    assert torch.equal(first, second)
    alone = dataclasses.replace(i, q=i.q[1:], lengths=i.lengths[1:], block_table=i.block_table[1:])
    got = attention_decode(**alone.arguments(), num_splits=2, backend="triton")
    assert torch.equal(got[0], first[1])


def test_out_of_range_is_not_a_number_and_no_other_address():
    """As on a GPU, where the values are not read before the launch."""
    i = decode_inputs(lengths=(7, 12, 9), page=4, H=2)
    table, lengths = i.block_table.clone(), i.cache_seqlens
    table[2, 1], lengths[1] = 10**6, 13
    for splits in (1, 2):
        out, lse = triton_decode_host.attention_decode(
            i.q, i.k_cache, i.v_cache, lengths, table, None, None, 0.3, (-1, 0), 0.0, splits
        )
        assert out[0].isfinite().all() and lse[0].isfinite().all()
        assert out[1:].isnan().all() and lse[1:].isnan().all()


# Planted faults


def _one_key_late(right):
    return lambda products, rows, keys, S, Sk, *rest: right(products, rows, keys, S, Sk - 1, *rest)


def _no_rescaling(right):
    return lambda acc, factor, D2: acc


FAULTS = {
    "the last key left out": ("scores", _one_key_late),
    "O is not rescaled": ("scale_parts", _no_rescaling),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_noticed(monkeypatch, fault):
    name, spoil = FAULTS[fault]
    i = decode_inputs(lengths=(70,), H=2, page=8)
    check_decode(i, "triton", num_splits=2)
    monkeypatch.setattr(triton_decode, name, spoil(getattr(triton_decode, name)))
    with pytest.raises(BudgetExceededError):
        check_decode(i, "triton", num_splits=2)
