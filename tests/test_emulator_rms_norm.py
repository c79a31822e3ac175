"""The CUDA kernels of rms_norm and their host entry on the CPU, in the emulator; no GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import emulated_host_entry
import pytest
import torch
from emulated_host_entry import LARGE

from lora_kernels._backends import cuda as loader
from lora_kernels.ops.rms_norm import cuda
from lora_kernels.ops.rms_norm.problem import RmsNormProblem
from lora_kernels.testing import (
    BudgetExceededError,
    check_rms_norm,
    poisoned_empty,
    rms_norm_inputs,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FAULTS = {"fragment_order": 1, "missing_barrier": 2, "missing_wait": 3}


@pytest.fixture(autouse=True)
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    operators, dll = emulated_host_entry.load("rms_norm")
    monkeypatch.setattr(loader, "load", lambda: (operators, ""))
    monkeypatch.setattr(cuda, "supports", lambda _: (True, "emulated"))
    yield dll
    dll.lk_options(0, 0, LARGE)


def check(shape, ranks=(), dtype=BF16, **options) -> None:
    with poisoned_empty():
        check_rms_norm(rms_norm_inputs(shape, ranks=ranks, dtype=dtype, **options), "cuda")


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    ("shape", "ranks"),
    [
        ((3, 7, 33), (3,)),
        ((19, 520), (8, 16, 5)),
        ((2, 264), (40,)),
        ((40, 72), ()),
        ((1, 1), (1,)),
    ],
    ids=str,
)
def test_against_the_oracle(shape, ranks, dtype):
    """Whole and odd rows; 0, 16, 32 and 64 columns; tiles of K that end early."""
    check(shape, ranks, dtype, offset=1.0)


def test_no_weight_and_other_dtypes():
    check((5, 40), (4,), weighted=False)
    check((5, 40), (4, 2), weight_dtype=FP32, adapter_dtype=FP32)


def test_scheduling(emulator):
    for seed in (1, 7):
        emulator.lk_options(seed, 0, LARGE)
        check((20, 600), (16, 16), FP16)


def test_large_ranks_and_groups_take_a_pass_of_their_own():
    check((19, 72), (50, 30))
    check((5, 40), (1,) * 10)


@pytest.mark.parametrize("layout", ["sliced", "strided", "permuted", "misaligned"])
def test_layouts(layout):
    check((17, 40), (3,), layout=layout)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", [(130, 264), (65, 1031), (3, 5000)], ids=str)
def test_every_kind_against_the_oracle(dtype, shape):
    for ranks in ((16,), (64,), (7, 8, 9), ()):
        check(shape, ranks, dtype)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(emulator, fault):
    found = 0
    for seed in range(4):
        emulator.lk_options(seed, FAULTS[fault], LARGE)
        try:
            check((20, 1104), (16, 16, 16))
        except (BudgetExceededError, RuntimeError):
            found += 1
    assert found


def test_what_the_entry_refuses():
    operators, _ = loader.load()
    x = torch.zeros(4, 16, dtype=BF16)
    rstd = torch.ones(4)
    for arguments, message in (
        ((x.float(), None, [], 0.1, 0.0), "bfloat16 and float16 are"),
        ((x, torch.ones(8), [], 0.1, 0.0), "weight does not fit x"),
        ((x, None, [torch.zeros(2, 8, dtype=BF16)], 0.1, 0.0), "lora_a does not fit x"),
        ((x[0], None, [], 0.1, 0.0), "not two-dimensional"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operators.rms_norm_fwd(*arguments)
    for arguments, message in (
        ((x[:3], x, None, rstd, 0.0, False), "dy has another shape"),
        ((x, x, None, rstd[:2], 0.0, False), "rstd is not that of forward"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operators.rms_norm_bwd(*arguments)


def test_reasons(monkeypatch):
    monkeypatch.undo()
    for changes, reason in (
        ({"device": "cpu"}, "x is on cpu"),
        ({"dtype": FP32}, "float32 is not supported"),
        ({"weight_dtype": torch.float64}, "weight in torch.float64"),
        ({"K": 30000}, "rows of 30000 are too long"),
    ):
        shapes = {"M": 4, "K": 8, "dtype": BF16, "device": "cuda", **changes}
        able, why = cuda.supports(RmsNormProblem.from_shapes(**shapes))
        assert not able and reason in why
