"""The Triton kernel of lora_qkv in Triton's interpreter, against the fp64 formula.

Not collected by itself: suite_runner.py runs this file in a process of its own.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

import lora_kernels as lk
from lora_kernels.errors import BackendUnavailableError
from lora_kernels.ops.lora_qkv import triton as host
from lora_kernels.testing import (
    BudgetExceededError,
    assert_within_budget,
    check_lora_qkv,
    lora_qkv_inputs,
    lora_qkv_op,
    poisoned_empty,
)
from lora_kernels.testing.lora_qkv import results

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        (torch.float32, {"D": 10, "R": 6, "tables": "cache", "K": 21}),
        (torch.bfloat16, {"interleaved": True, "tables": "batch", "rank": (2, 17, 3)}),
        (torch.float16, {"joint": True, "lead": (35,), "adapter_dtype": torch.float32}),
    ],
    ids=str,
)
def test_against_the_oracle(dtype, changes):
    with poisoned_empty():
        check_lora_qkv(lora_qkv_inputs(dtype=dtype, **changes), "triton")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("D", "R"), [(8, None), (20, 6), (64, 32), (2, None)])
@pytest.mark.parametrize("tables", ["shared", "cache"])
def test_every_kind_against_the_oracle(dtype, joint, interleaved, D, R, tables):
    i = lora_qkv_inputs(
        (2, 37), 70, 3, 2, D, R=R, joint=joint, interleaved=interleaved, tables=tables,
        dtype=dtype, rank=33, bias=False,
    )  # fmt: skip
    check_lora_qkv(i, "triton", "xa")


@pytest.mark.parametrize("layout", ["strided", "permuted"])
def test_layouts(layout):
    check_lora_qkv(lora_qkv_inputs(layout=layout), "triton", "a")


def test_several_tiles_and_no_rows(monkeypatch):
    monkeypatch.setattr(host, "tile_of", lambda rows, dtype: host.Tile(16, 16, 16, 4, 2))
    check_lora_qkv(lora_qkv_inputs((1, 35), 40, 5, 3, 12, R=4), "triton", "")
    check_lora_qkv(lora_qkv_inputs((0, 3)), "triton", "")


def test_one_rounding():
    """Between projection and rotation nothing is rounded, so more results are the exact ones."""
    i = lora_qkv_inputs((1, 32), 32, 2, 2, 16, dtype=torch.bfloat16)
    exact = results(i, torch.float64, "")["z[0]"].bfloat16()
    wrong = [
        (lora_qkv_op(i, b, "")["z[0]"] != exact).float().mean() for b in ("triton", "reference")
    ]
    assert wrong[0] < wrong[1]


@pytest.mark.parametrize("wrong", ["sign", "layout", "position", "heads", "adapter"])
def test_a_planted_fault_is_found(wrong):
    i = lora_qkv_inputs(tables="cache", dtype=torch.bfloat16)
    n, t = i.linear, i.tables
    changed = {
        "sign": {"tables": dataclasses.replace(t, sin=-t.sin)},
        "layout": {"tables": dataclasses.replace(t, interleaved=True)},
        "position": {"tables": dataclasses.replace(t, position_ids=t.position_ids.roll(1, -1))},
        "heads": {"rotated": (2, 2, 0)},
        "adapter": {
            "linear": dataclasses.replace(n, lora_bs=[torch.zeros_like(b) for b in n.lora_bs])
        },
    }[wrong]
    oracle, low = results(i, torch.float64, ""), results(i, torch.bfloat16, "")
    got = lora_qkv_op(dataclasses.replace(i, **changed), "triton", "")
    with pytest.raises(BudgetExceededError):
        assert_within_budget(got["z[0]"], oracle["z[0]"], low["z[0]"])


def test_a_position_outside_of_the_cache_gives_nan():
    i = lora_qkv_inputs((1, 3), tables="cache", bias=False)
    n, t = i.linear, i.tables
    for wrong in (50, -1, 1 << 40):
        ids = torch.tensor([[3, wrong, 4]])
        (q, k, v), _ = host.lora_qkv_fwd(
            n.x[0], n.weights, n.lora_as, n.lora_bs, n.biases, n.scalings, 0.0, None, t.cos, t.sin,
            ids, 3, i.head_dim, list(i.rotated), False, "triton",
        )  # fmt: skip
        for out in (q, k):
            assert bool(out[1].isnan().all()) and not bool(out[::2].isnan().any())
        assert not bool(v.isnan().any())


def test_explain_and_refusals():
    told = lk.explain("lora_qkv", backend="triton", M=4, K=8, H=2, D=16)
    assert told["backend"] == "triton"
    assert lk.explain("lora_qkv", M=4, K=8, H=2, D=16)["backend"] == "aten"
    for changes, message in (({"dropout_p": 0.1}, "dropout masks x"), ({"D": 15, "R": 4}, "pairs")):
        with pytest.raises(BackendUnavailableError, match=message):
            lk.explain("lora_qkv", backend="triton", **{"M": 4, "K": 8, "H": 2, "D": 16, **changes})
