"""The Hopper kernels of attention (csrc/attention/cuda/*_sm90.cuh) in the emulator, whose copy
engine, transaction barriers and warpgroup products are models from the PTX ISA: what this finds is
layouts, descriptors, pipelines and masks. Nothing runs on a GPU."""

from __future__ import annotations

import ctypes
import dataclasses

import pytest
import torch
from emulated_attention import FAULTS, emulator, with_fault

from lora_kernels.testing.attention import (
    AttentionInputs,
    attention_inputs,
    attention_op,
    compare_attention,
)
from lora_kernels.testing.budget import BudgetExceededError

__all__ = ["emulator"]  # a fixture
BF16, FP16 = torch.bfloat16, torch.float16
SEEDS = (0, 1, 7)  # of the schedule
SOME = (0, 1, pytest.param(7, marks=pytest.mark.slow))
HOPPER = 227 << 10  # shared memory per block, by which the emulated device tells what it is


@pytest.fixture(autouse=True)
def hopper(emulator: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    monkeypatch.setenv("LORA_KERNELS_CUDA_ATTENTION", "sm90")
    emulator.lk_options(0, 0, HOPPER)
    return emulator


def check(i: AttentionInputs) -> None:
    compare_attention(i, attention_op(i, "cuda"), "sm90")


@pytest.mark.parametrize("seed", SOME)
@pytest.mark.parametrize("D", [64, 128])
def test_more_blocks_than_stages(hopper, D, seed):
    hopper.lk_options(seed, 0, HOPPER)
    keys = 540 if D == 64 else 300
    dtype = FP16 if seed == 1 else BF16
    check(attention_inputs(1, 141, 2, D, Sk=keys, Hk=1, dtype=dtype, causal=True))


@pytest.mark.parametrize(
    "features",
    [
        {"S": 1, "Sk": 150},
        {"S": 130, "Sk": 60, "causal": True},  # rows without a key
        {"S": 150, "Sk": 300, "window": (40, 0)},
        {"S": 40, "Sk": 40, "window": (5, 3), "B": 2},
        {"S": 20, "sinks": True, "causal": True, "return_lse": True},
        {"S": 33, "H": 6, "Hk": 2},
        {"lengths": (3, 130, 0, 1, 64), "causal": True},
        {"lengths": (3, 130, 0, 1), "key_lengths": (7, 0, 3, 260), "sinks": True},
    ],
    ids=str,
)
def test_features(features):
    check(attention_inputs(**{"B": 1, "H": 2, "Hk": 1, "D": 64, "dtype": BF16, **features}))


def test_slices_of_one_projection():
    fused = torch.randn(2, 50, 4 * 64 + 2 * 2 * 64, dtype=BF16)
    parts = [t.unflatten(-1, (-1, 64)) for t in fused.split((256, 128, 128), -1)]
    check(AttentionInputs(*parts, options={"causal": True}))


def test_neighbours_in_a_packed_tensor_do_not_meet():
    """A box of keys reaches into the next sequence: numbers that are none must stay there."""
    i = attention_inputs(lengths=(40, 30), H=2, D=64, dtype=BF16, causal=True)
    i.k[40:], i.v[40:] = torch.nan, torch.inf
    alone = AttentionInputs(*(t[None, :40] for t in (i.q, i.k, i.v)), options=i.options)
    one, both = attention_op(alone, "cuda"), attention_op(i, "cuda")
    assert torch.equal(both["out"][:40], one["out"][0])
    i.q[40:] = torch.nan
    both = attention_op(i, "cuda")
    assert all(torch.isfinite(both[name][:40]).all() for name in ("out", "dq", "dk", "dv"))


def test_same_bits_in_every_schedule(hopper):
    i = attention_inputs(1, 141, 2, 64, Sk=300, Hk=1, dtype=BF16, causal=True)
    first = attention_op(i, "cuda")
    for seed in SEEDS[1:]:
        hopper.lk_options(seed, 0, HOPPER)
        again = attention_op(i, "cuda")
        assert all(torch.equal(again[name], first[name]) for name in first)


# On Hopper: an operand of the next step, products not waited for, copies not waited for.
@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "shifted_mask"])
@pytest.mark.parametrize("seed", SOME)
def test_planted_faults_are_found(hopper, fault, seed):
    """In every kernel: the output and each gradient leaves its budget, or the emulator stops."""
    i = attention_inputs(1, 150, 1, 64, dtype=BF16, causal=True)
    right = attention_op(i, "cuda")
    try:
        wrong = with_fault(hopper, i, (seed, FAULTS[fault], HOPPER))
    except RuntimeError:
        assert fault in ("missing_wait", "missing_barrier"), hopper.lk_error()
        return
    for name, t in wrong.items():
        with pytest.raises(BudgetExceededError):
            compare_attention(i, {"lse": right["lse"], name: t}, fault)


REFUSED = {
    "softcap": ({"softcap": 3.0}, "softcap, ALiBi and dropout"),
    "alibi": ({"alibi": True}, "softcap, ALiBi and dropout"),
    "dropout": ({"dropout_p": 0.1, "seed": 1}, "softcap, ALiBi and dropout"),
    "scale": ({"scale": -1.0}, "a scale above 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_kernel_refuses_by_name(case):
    features, reason = REFUSED[case]
    i = attention_inputs(1, 20, 2, 64, dtype=BF16, **features)
    with pytest.raises(RuntimeError, match=reason):
        attention_op(i, "cuda")


def test_expanded_operands_go_to_the_other_kernel(monkeypatch):
    i = attention_inputs(1, 20, 2, 64, dtype=BF16)
    i = dataclasses.replace(i, k=i.k[:, :, :1].expand(1, 20, 2, 64))
    with pytest.raises(RuntimeError, match="an operand is expanded"):
        attention_op(i, "cuda")
    monkeypatch.setenv("LORA_KERNELS_CUDA_ATTENTION", "auto")
    check(i)
