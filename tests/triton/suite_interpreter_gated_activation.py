"""The Triton kernels of gated_activation in Triton's interpreter, against the fp64 formula.

Not collected by itself: suite_runner.py runs this file in a process of its own.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

import lora_kernels as lk
from lora_kernels.errors import BackendUnavailableError
from lora_kernels.ops import gated_activation
from lora_kernels.ops.gated_activation import triton as host
from lora_kernels.ops.gated_activation import triton_tiles
from lora_kernels.ops.gated_activation.problem import KINDS
from lora_kernels.testing import (
    BudgetExceededError,
    check_gated_activation,
    gated_activation_inputs,
    poisoned_empty,
)
from lora_kernels.testing.gated_activation import check_adapter_products

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BF16 = torch.bfloat16
OPS = torch.ops.lora_kernels


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_against_the_oracle(kind):
    for gated, dtype in ((True, BF16), (False, torch.float32)):
        check_gated_activation(
            gated_activation_inputs((3, 7, 33), kind, gated=gated, dtype=dtype), "triton"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "ranks", "member_ranks"),
    [((2, 19, 200), (3, 16), (5, 8)), ((33, 70), (17,), (1,))],
    ids=str,
)
def test_adapters(dtype, shape, ranks, member_ranks):
    """S of a group, dS and dB of gate and up; rows and columns that end in the middle of tiles."""
    i = gated_activation_inputs(
        shape, gated=len(member_ranks) == 2, dtype=dtype, ranks=ranks, member_ranks=member_ranks
    )
    with poisoned_empty():
        check_adapter_products(i, "triton")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (70, 130), (130, 1100)], ids=str)
def test_every_kind_of_adapters(dtype, kind, shape):
    for ranks, member_ranks in (((64, 3, 100), (64, 64)), ((300,), (256, 1)), ((1,), (16,))):
        i = gated_activation_inputs(
            shape, kind, gated=len(member_ranks) == 2, dtype=dtype, ranks=ranks,
            member_ranks=member_ranks,
        )  # fmt: skip
        check_adapter_products(i, "triton")
        check_gated_activation(i, "triton")


def test_without_db_and_with_wider_adapters():
    i = gated_activation_inputs(
        (5, 40), dtype=BF16, ranks=(4,), member_ranks=(4, 2), adapter_dtype=torch.float32
    )
    for with_db in (True, False):
        check_adapter_products(i, "triton", with_db)


def test_members_that_do_not_fit_one_launch(monkeypatch):
    """The rest of the group is shrunk from h; a rank larger than a launch is cut."""
    monkeypatch.setattr(triton_tiles, "MAX_RANK", 32)
    i = gated_activation_inputs((9, 50), dtype=BF16, ranks=(16, 3, 40), member_ranks=(2, 2))
    check_adapter_products(i, "triton")


def test_large_ranks_make_ds_apart():
    i = gated_activation_inputs((9, 50), dtype=BF16, ranks=(1,), member_ranks=(70, 3))
    tile = triton_tiles.gradients(9, 50, 128, 2, 132, False)
    assert triton_tiles.ds_apart(73, 2, tile, 2)
    check_adapter_products(i, "triton")


def test_splits_are_added(monkeypatch):
    """Several programs along N and along M, more than the adding kernel takes at once."""
    monkeypatch.setattr(host, "_device", lambda t: (4096, False))
    assert triton_tiles.shrink(70, 1700, 16, 2, 4096, False).splits > 4
    assert triton_tiles.gradients(8192, 1700, 16, 2, 4096, False).splits > 4
    forced = triton_tiles.Tile(16, 128, 5, 16, 4, 1)
    monkeypatch.setattr(triton_tiles, "gradients", lambda *shape: forced)
    i = gated_activation_inputs((70, 1700), dtype=BF16, ranks=(1,), member_ranks=(1, 1))
    check_adapter_products(i, "triton")


@pytest.mark.parametrize("layout", ["sliced", "strided", "permuted", "misaligned"])
def test_layouts(layout):
    i = gated_activation_inputs((17, 40), layout=layout, dtype=BF16)
    with poisoned_empty():
        check_gated_activation(i, "triton")
        moved = dataclasses.replace(
            gated_activation_inputs((17, 40), layout=layout, ranks=(3,), member_ranks=(3, 2)),
        )
        moved = dataclasses.replace(
            moved,
            lora_as=[a.t().contiguous().t() for a in moved.lora_as],
            lora_bs=[b.t().contiguous().t() for b in moved.lora_bs],
        )
        check_adapter_products(moved, "triton")


@pytest.mark.parametrize("shape", [(5,), (0, 5), (3, 0), (1, 1), (2, 3, 4, 5)], ids=str)
def test_shapes(shape):
    for gated in (True, False):
        check_gated_activation(gated_activation_inputs(shape, gated=gated), "triton")


def test_large_values_stay_finite_and_none_is_not_hidden():
    for kind in KINDS:
        gate = torch.tensor([-1e30, -1e4, -90.0, 0.0, 90.0, 1e4], requires_grad=True)
        h = gated_activation(gate, torch.ones(6), kind, backend="triton")
        h.sum().backward()
        assert (h.isfinite() | (gate.abs() > 1e18)).all() and gate.grad.isfinite().all()
        gate = torch.tensor([1.0, torch.nan, 2.0], requires_grad=True)
        h = gated_activation(gate, kind=kind, backend="triton")
        assert h.isnan().tolist() == [False, True, False]
        if kind != "relu":  # whose slope at NaN is 0, as PyTorch's is
            h.sum().backward()
            assert gate.grad.isnan().tolist() == [False, True, False]


def test_one_call_is_the_next_bit_for_bit():
    i = gated_activation_inputs((70, 130), dtype=BF16, ranks=(5,), member_ranks=(5, 3))
    made = []
    for _ in range(2):
        h, s = host.gated_activation_fwd(i.gate, i.up, i.kind, i.lora_as)
        *grads, dbs = host.gated_activation_bwd(h, i.gate, i.up, i.kind, i.lora_bs, i.s, [0.5, 1.5])
        made.append([h, s, *grads, *dbs])
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.parametrize("wrong", ["rank", "scale", "column"])
def test_a_planted_fault_is_found(wrong, monkeypatch):
    """The last rank of A dropped, dS not scaled, dS of up in the place of that of gate."""
    real_fwd, real_bwd = host.gated_activation_fwd, host.gated_activation_bwd

    def fwd(gate, up, kind, lora_as):
        h, s = real_fwd(gate, up, kind, lora_as)
        return h, s if wrong != "rank" else torch.cat([s[:, :-1], 0 * s[:, -1:]], 1)

    def bwd(*arguments):
        dgate, dup, ds, dbs = real_bwd(*arguments)
        if wrong == "scale":
            ds = ds * 1.1
        elif wrong == "column":
            ds = ds.flip(1)
        return dgate, dup, ds, dbs

    monkeypatch.setattr(host, "gated_activation_fwd", fwd)
    monkeypatch.setattr(host, "gated_activation_bwd", bwd)
    i = gated_activation_inputs((9, 40), dtype=BF16, ranks=(4,), member_ranks=(2, 2))
    with pytest.raises(BudgetExceededError):
        check_adapter_products(i, "triton")


def test_what_it_lacks_is_refused():
    with pytest.raises(BackendUnavailableError, match="float64"):
        gated_activation(torch.zeros(2, 3, dtype=torch.float64), backend="triton")
    with pytest.raises(BackendUnavailableError, match="rank 257 is too large; at most 256"):
        OPS.gated_activation_bwd(
            torch.zeros(2, 3), torch.zeros(2, 3), None, "silu", [torch.zeros(3, 257)], None, [1.0],
            "triton",
        )  # fmt: skip
    assert lk.explain("gated_activation", M=2, N=3)["backend"] != "triton"
