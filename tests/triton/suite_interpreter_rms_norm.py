"""The Triton kernels of rms_norm in Triton's interpreter, against the fp64 formula.

Not collected by itself: suite_runner.py runs this file in a process of its own.
"""

from __future__ import annotations

import pytest
import torch

import lora_kernels as lk
from lora_kernels.errors import BackendUnavailableError
from lora_kernels.ops import rms_norm
from lora_kernels.ops.rms_norm import triton as host
from lora_kernels.ops.rms_norm import triton_tiles
from lora_kernels.testing import (
    BudgetExceededError,
    check_rms_norm,
    poisoned_empty,
    rms_norm_inputs,
    rms_norm_op,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BF16 = torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_oracle(dtype):
    for shape, ranks, offset in (((3, 7, 33), (), 0.0), ((2, 19, 200), (3, 16, 8), 1.0)):
        with poisoned_empty():
            check_rms_norm(
                rms_norm_inputs(shape, ranks=ranks, dtype=dtype, offset=offset), "triton"
            )
    check_rms_norm(rms_norm_inputs((5, 33), ranks=(2,), weighted=False, dtype=dtype), "triton")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (70, 130), (130, 1100), (3, 5000)], ids=str)
def test_every_kind_against_the_oracle(dtype, shape):
    for ranks in ((), (64, 3, 100), (300,), (1,)):
        for weighted, offset in ((True, 1.0), (False, 0.0)):
            i = rms_norm_inputs(shape, ranks=ranks, dtype=dtype, offset=offset, weighted=weighted)
            check_rms_norm(i, "triton")


@pytest.mark.parametrize("shape", [(5,), (0, 5), (1, 1), (2, 3, 4, 5), (3, 0, 4)], ids=str)
def test_shapes(shape):
    check_rms_norm(rms_norm_inputs(shape, ranks=(2, 3)), "triton")
    check_rms_norm(rms_norm_inputs(shape), "triton")


@pytest.mark.parametrize("layout", ["sliced", "strided", "permuted", "misaligned"])
def test_layouts(layout):
    with poisoned_empty():
        check_rms_norm(rms_norm_inputs((17, 40), ranks=(3,), layout=layout, dtype=BF16), "triton")


def test_wider_weight_and_adapters():
    i = rms_norm_inputs(
        (5, 40), ranks=(4, 2), dtype=BF16, weight_dtype=torch.float32, adapter_dtype=torch.float32
    )
    check_rms_norm(i, "triton")
    assert rms_norm_op(i, "triton")["dweight"].dtype == torch.float32


def test_rows_that_are_not_one_tile(monkeypatch):
    """Two walks over a row, and shares of dweight that are added in memory; an odd last tile."""
    monkeypatch.setattr(triton_tiles, "_WHOLE_ROW", 0)
    monkeypatch.setattr(triton_tiles, "_WHOLE_ROW_BACKWARD", 0)
    i = rms_norm_inputs((5, 4500), dtype=BF16)
    monkeypatch.setattr(host, "_device", lambda t: (1, False))
    assert triton_tiles.gradients(5, 4500, 1).per_program > 1
    check_rms_norm(i, "triton")


def test_several_rows_of_a_program_and_more_parts_than_are_added_at_once(monkeypatch):
    monkeypatch.setattr(host, "_device", lambda t: (10, False))
    tile = triton_tiles.gradients(310, 200, 10)
    assert tile.per_program > tile.rows and -(-310 // tile.per_program) > host._SUM_ROWS
    check_rms_norm(rms_norm_inputs((310, 200), dtype=BF16), "triton")


def test_members_that_do_not_fit_one_launch(monkeypatch):
    """The rest of the group is shrunk from y; a rank larger than a launch is cut."""
    monkeypatch.setattr(triton_tiles, "MAX_RANK", 32)
    check_rms_norm(rms_norm_inputs((9, 50), dtype=BF16, ranks=(16, 3, 40)), "triton")


def test_s_is_what_lora_linear_would_save():
    i = rms_norm_inputs((9, 50), dtype=BF16, ranks=(16, 3))
    y, _, s = host.rms_norm_fwd(i.x, i.weight, i.lora_as, i.eps, i.offset)
    plain, _, _ = host.rms_norm_fwd(i.x, i.weight, [], i.eps, i.offset)
    assert torch.equal(y, plain)
    b = torch.zeros(4, 16, dtype=BF16)
    w = torch.zeros(4, 50, dtype=BF16)
    _, saved = torch.ops.lora_kernels.lora_linear_fwd(
        y, [w], [i.lora_as[0]], [b], [None], [1.0], 0.0, None, "triton"
    )
    apart = (s[:, :16].float() - saved.float()).abs()
    assert (apart <= torch.finfo(BF16).eps * saved.float().abs() + 1e-6).all()


def test_one_call_is_the_next_bit_for_bit():
    i = rms_norm_inputs((70, 130), dtype=BF16, ranks=(5,))
    first, second = (rms_norm_op(i, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("wrong", ["rstd", "rank", "row"])
def test_a_planted_fault_is_found(wrong, monkeypatch):
    """eps left out, the last rank of A dropped, a row left out of dweight."""
    real_fwd, real_bwd = host.rms_norm_fwd, host.rms_norm_bwd

    def fwd(x, weight, lora_as, eps, offset):
        y, rstd, s = real_fwd(x, weight, lora_as, 0.0 if wrong == "rstd" else eps, offset)
        return y, rstd, s if wrong != "rank" else torch.cat([s[:, :-1], 0 * s[:, -1:]], 1)

    def bwd(dy, x, weight, rstd, offset, need_dweight):
        if wrong != "row":
            return real_bwd(dy, x, weight, rstd, offset, need_dweight)
        _, dweight = real_bwd(dy[1:], x[1:], weight, rstd[1:], offset, need_dweight)
        return real_bwd(dy, x, weight, rstd, offset, need_dweight)[0], dweight

    monkeypatch.setattr(host, "rms_norm_fwd", fwd)
    monkeypatch.setattr(host, "rms_norm_bwd", bwd)
    with pytest.raises(BudgetExceededError):
        check_rms_norm(rms_norm_inputs((9, 40), dtype=BF16, ranks=(4,)), "triton")


def test_what_it_lacks_is_refused():
    with pytest.raises(BackendUnavailableError, match="float64"):
        rms_norm(torch.zeros(2, 3, dtype=torch.float64), backend="triton")
    with pytest.raises(BackendUnavailableError, match="weight in torch"):
        rms_norm(torch.zeros(2, 3), torch.zeros(3, dtype=torch.float64), backend="triton")
    assert lk.explain("rms_norm", M=2, K=3)["backend"] != "triton"
