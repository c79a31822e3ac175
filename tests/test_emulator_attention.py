"""The mma.sync kernels of attention (csrc/attention/cuda) and their host entry, in the emulator on
the CPU, against the fp64 formula. Nothing runs on a GPU."""

from __future__ import annotations

import dataclasses
import re

import emulator_library
import pytest
import torch
from emulated_attention import FAULTS, LARGE, SMALL, emulator, with_fault

from lora_kernels._backends import cuda as loader
from lora_kernels.errors import BackendUnavailableError
from lora_kernels.ops import attention
from lora_kernels.testing.attention import (
    AttentionInputs,
    attention_inputs,
    attention_op,
    check_attention,
    compare_attention,
)
from lora_kernels.testing.budget import BudgetExceededError
from lora_kernels.testing.poison import poisoned_empty

__all__ = ["emulator"]  # a fixture
pytestmark = pytest.mark.usefixtures("emulator")
BF16, FP16 = torch.bfloat16, torch.float16
SEEDS = (0, 1, 7)  # of the schedule
SOME = (0, 1, pytest.param(7, marks=pytest.mark.slow))
EVERYTHING = {
    "causal": True, "window": (100, 0), "softcap": 3.0, "sinks": True, "alibi": True,
    "dropout_p": 0.25, "seed": 2**40 + 5, "return_lse": True,
}  # fmt: skip


def check(**arguments) -> None:
    with poisoned_empty():
        check_attention(attention_inputs(**{"H": 2, "dtype": BF16, **arguments}), "cuda")


def test_what_runs_here(capsys):
    with capsys.disabled():
        print("\nGPU kernels of attention: run in the emulator on the CPU; nothing ran on a GPU")


@pytest.mark.parametrize("seed", SOME)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("features", [{"causal": True}, EVERYTHING], ids=["plain", "everything"])
def test_forward_and_backward(emulator, features, D, seed):
    """More rows and keys than a tile, neither a multiple of anything, in three schedules."""
    emulator.lk_options(seed, 0, LARGE)
    shape = {"B": 1, "S": 143, "Sk": 171, "Hk": 1, "D": D}
    check(**shape, dtype=FP16 if seed == 1 else BF16, **features)


@pytest.mark.parametrize(
    "features",
    [
        {},
        {"causal": True, "S": 70, "Sk": 33},  # rows without a key
        {"window": (5, 3)},
        {"window": (40, -1), "Sk": 97},
        {"window": (-1, 0), "S": 20, "Sk": 130},
        {"sinks": True, "return_lse": True},
        {"softcap": 2.0},
        {"alibi": True, "causal": True},
        {"dropout_p": 0.5, "seed": 3},
        {"scale": -0.3},
        {"scale": 0.0, "causal": True},
        {"S": 1, "Sk": 200, "causal": True},
        {"S": 129, "Sk": 1},
        {"H": 6, "Hk": 2, "S": 33},
    ],
    ids=str,
)
def test_single_features(features):
    check(**{"B": 2, "S": 66, "D": 64, **features})


@pytest.mark.parametrize("features", [{"causal": True}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("D", [64, 128])
def test_packed_sequences(features, D):
    """Empty and short sequences, and ends that are multiples of the tile."""
    check(lengths=(3, 125, 0, 1, 128, 20), Hk=1, D=D, **features)
    check(lengths=(3, 130, 0, 1, 40), key_lengths=(7, 0, 3, 150, 40), D=D, **features)


def test_slopes_of_each_sequence():
    i = attention_inputs(3, 40, 2, 64, dtype=BF16)
    check_attention(dataclasses.replace(i, alibi_slopes=torch.rand(3, 2)), "cuda")
    packed = attention_inputs(lengths=(20, 40, 30), H=2, D=64, dtype=BF16)
    packed = dataclasses.replace(packed, alibi_slopes=torch.rand(3, 2))
    check_attention(packed, "cuda")


@pytest.mark.parametrize("layout", ["sliced", "strided", "permuted", "misaligned"])
def test_layouts(layout):
    check(B=2, S=35, Hk=1, D=64, layout=layout, causal=True, dropout_p=0.25, seed=1)


def test_slices_of_one_projection_are_not_copied():
    """q, k and v as a fused projection leaves them: rows of 16 bytes, so strides are enough."""
    fused = torch.randn(2, 50, 4 * 64 + 2 * 2 * 64, dtype=BF16)
    q, k, v = fused.split((256, 128, 128), -1)
    parts = [t.unflatten(-1, (-1, 64)) for t in (q, k, v)]
    check_attention(AttentionInputs(*parts, options={"causal": True}), "cuda")


def test_expanded_output_gradient():
    i = attention_inputs(1, 40, 2, 64, dtype=BF16)
    grads = []
    for make in (lambda out: out.sum(), lambda out: (out * torch.ones_like(out)).sum()):
        q = i.q.clone().requires_grad_()
        make(attention(q, i.k, i.v, backend="cuda")).backward()
        grads.append(q.grad)
    assert torch.equal(*grads)


def test_devices_with_little_shared_memory(emulator):
    emulator.lk_options(0, 0, SMALL)
    check(B=1, S=140, D=128, causal=True)


def test_python_asks_for_as_much_shared_memory_as_the_kernels_need():
    header = (emulator_library.CSRC / "attention/cuda/launch.h").read_text()
    needed = re.search(r"kSharedMemoryNeeded = (\d+) << 10;", header)
    assert needed is not None
    assert int(needed[1]) << 10 <= loader._SHARED_BYTES <= SMALL


def test_operand_loads_have_no_bank_conflicts(emulator):
    before = emulator.lk_shared_phases(), emulator.lk_conflicting_phases()
    for D in (64, 128):
        attention_op(attention_inputs(1, 130, 1, D, dtype=BF16), "cuda")
    assert emulator.lk_shared_phases() > before[0]
    assert emulator.lk_conflicting_phases() == before[1]


def test_hidden_blocks_are_skipped(emulator):
    """A window of 16 keys: the number of products grows with the rows, not with their square."""
    counts = []
    for rows in (256, 512):
        i = attention_inputs(1, rows, 1, 64, dtype=BF16, causal=True, window=(16, 0))
        before = emulator.lk_shared_phases()
        attention(i.q, i.k, i.v, backend="cuda", **i.options)
        counts.append(emulator.lk_shared_phases() - before)
    assert counts[1] < 2.5 * counts[0]


def test_same_bits_in_every_schedule(emulator):
    i = attention_inputs(1, 140, 4, 64, Hk=2, dtype=BF16, **EVERYTHING)
    first = attention_op(i, "cuda")
    for seed in SEEDS[1:]:
        emulator.lk_options(seed, 0, LARGE)
        again = attention_op(i, "cuda")
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(emulator, fault, seed):
    """In every kernel: the output and each gradient leaves its budget."""
    features = {"dropout_p": 0.25, "seed": 3} if fault == "shifted_mask" else {"causal": True}
    i = attention_inputs(1, 150, 1, 64, dtype=BF16, **features)
    right = attention_op(i, "cuda")
    for name, t in with_fault(emulator, i, (seed, FAULTS[fault], LARGE)).items():
        with pytest.raises(BudgetExceededError):
            compare_attention(i, {"lse": right["lse"], name: t}, fault)


@pytest.mark.parametrize("needs", [("q",), ("v",), ("sinks",), ("k", "sinks"), ()], ids=str)
def test_subsets_of_gradients(needs):
    i = attention_inputs(1, 40, 2, 64, dtype=BF16, sinks=True)
    assert set(check_attention(i, "cuda", needs)) == {"out", "lse", *(f"d{n}" for n in needs)}


@pytest.mark.parametrize("shape", [{"B": 0}, {"S": 0}, {"Sk": 0}, {"lengths": (0, 0)}], ids=str)
def test_nothing_to_do(shape):
    got = attention_op(attention_inputs(**{"D": 64, "Hk": 2, "dtype": BF16, **shape}), "cuda")
    assert not any(t.any() for name, t in got.items() if name != "lse")
    assert (got["lse"] == -torch.inf).all()


def test_sinks_alone():
    check(B=2, S=5, Sk=0, D=64, sinks=True, return_lse=True)


def test_everything_dropped():
    i = attention_inputs(1, 40, 2, 64, dtype=BF16, dropout_p=1.0, seed=1)
    got = attention_op(i, "cuda")
    assert not any(got[name].any() for name in ("out", "dq", "dk", "dv"))


def test_extreme_scores():
    i = attention_inputs(1, 40, 2, 64, dtype=BF16, sinks=True)
    check_attention(dataclasses.replace(i, q=i.q * 300.0), "cuda", ("v",))


def test_a_number_that_is_none_is_not_hidden():
    for options in ({}, {"softcap": 4.0}):
        i = attention_inputs(1, 9, 2, 64, dtype=BF16)
        i.q[0, 3, 1, 2] = torch.nan
        out = attention(i.q, i.k, i.v, backend="cuda", **options)
        assert out[0, 3, 1].isnan().all()
        assert out.isnan().sum() == out.shape[-1]


REFUSED = {
    "value heads": ({"Dv": 128, "D": 64}, "value heads as wide"),
    "head": ({"D": 80}, "head sizes 64 and 128"),
    "mask": ({"D": 64, "mask": "bool"}, "no mask of queries x keys"),
    "fp32": ({"D": 64, "dtype": torch.float32}, "for bf16 and fp16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_reason(case):
    shape, reason = REFUSED[case]
    i = attention_inputs(**{"dtype": BF16, **shape})
    with pytest.raises(BackendUnavailableError, match=reason):
        attention_op(i, "cuda")


def test_what_the_entry_refuses():
    library, _ = loader.load()
    i = attention_inputs(1, 20, 2, 64, Hk=1, dtype=BF16)
    ends = torch.tensor([0, 20], dtype=torch.int32)
    args = [i.q, i.k, i.v, None, None, None, None, None, 1.0, -1, -1, 0.0, 1.0, 0, "auto"]
    library.attention_fwd(*args)

    def refused(position: int, value: object, message: str) -> None:
        with pytest.raises(RuntimeError, match=message):
            library.attention_fwd(*args[:position], value, *args[position + 1 :])

    refused(0, i.q[..., :32], "q and k differ in their head size")
    refused(0, i.q.float(), "k and q differ in dtype")
    refused(0, i.q[0], "do not fit")
    refused(1, i.k[:, :-1], "k and v differ in shape")
    refused(3, torch.zeros(3), "sinks has another shape")
    refused(4, ends, "do not fit")
    refused(6, torch.zeros(3, 2), "slopes is not")
    refused(9, -2, "window is below -1")
    refused(13, 70000, "threshold is not in")
    refused(13, 100, "dropout needs a seed")
    refused(14, "sm70", "the kernel is unknown")
    refused(14, "sm90", "need compute capability 9.0")
    three = torch.zeros(1, 20, 3, 64, dtype=BF16)
    with pytest.raises(RuntimeError, match="no multiple of the number of key heads"):
        library.attention_fwd(i.q, three, three, *args[3:])
    wide = torch.zeros(1, 20, 2, 96, dtype=BF16)
    with pytest.raises(RuntimeError, match="64 and 128 are"):
        library.attention_fwd(wide, wide, wide, *args[3:])
