"""The CUDA kernels of gated_activation and their host entry on the CPU, in the emulator; no GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import emulated_host_entry
import pytest
import torch
from emulated_host_entry import LARGE

from lora_kernels._backends import cuda as loader
from lora_kernels.ops.gated_activation import cuda
from lora_kernels.ops.gated_activation.problem import KINDS, GatedActivationProblem
from lora_kernels.testing import (
    BudgetExceededError,
    check_gated_activation,
    gated_activation_inputs,
    poisoned_empty,
)
from lora_kernels.testing.gated_activation import check_adapter_products

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FAULTS = {"fragment_order": 1, "missing_barrier": 2, "missing_wait": 3}


@pytest.fixture(autouse=True)
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    operators, dll = emulated_host_entry.load("gated_activation")
    monkeypatch.setattr(loader, "load", lambda: (operators, ""))
    monkeypatch.setattr(cuda, "supports", lambda _: (True, "emulated"))
    yield dll
    dll.lk_options(0, 0, LARGE)


def check(shape, ranks=(), member_ranks=(), dtype=BF16, kind="silu", **options) -> None:
    """Products, and where there are none H and the gradients."""
    i = gated_activation_inputs(
        shape, kind, dtype=dtype, ranks=ranks, member_ranks=member_ranks,
        gated=len(member_ranks) != 1, **options,
    )  # fmt: skip
    with poisoned_empty():
        if ranks or member_ranks:
            check_adapter_products(i, "cuda")
        else:
            check_gated_activation(i, "cuda")


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind):
    for dtype, member_ranks in ((BF16, ()), (FP16, ())):
        check((3, 7, 33), dtype=dtype, kind=kind, member_ranks=member_ranks)
    check_gated_activation(gated_activation_inputs((5, 48), kind, gated=False, dtype=BF16), "cuda")


@pytest.mark.parametrize(
    ("shape", "ranks", "member_ranks"),
    [((70, 136), (3, 8), (16, 5)), ((33, 45), (40,), (17,)), ((1, 8), (1,), (1, 1))],
    ids=str,
)
def test_adapters(shape, ranks, member_ranks):
    """Whole and odd rows; 16, 32 and 64 columns; blocks of rows and columns that end early."""
    check(shape, ranks, member_ranks)


def test_scheduling(emulator):
    for seed in (1, 7):
        emulator.lk_options(seed, 0, LARGE)
        check((40, 200), (16,), (8, 8), FP16)


def test_large_ranks_take_a_pass_of_their_own():
    check((35, 72), (50, 30), (40, 3))


def test_wider_adapters_and_no_db():
    i = gated_activation_inputs(
        (9, 40), dtype=BF16, ranks=(4,), member_ranks=(4, 2), adapter_dtype=FP32
    )
    for with_db in (True, False):
        check_adapter_products(i, "cuda", with_db)


def test_a_group_of_more_than_eight():
    check((5, 40), (1,) * 10)


@pytest.mark.parametrize("layout", ["sliced", "strided", "permuted", "misaligned"])
def test_layouts(layout):
    check((17, 40), layout=layout)
    check((17, 40), (3,), (3, 2), layout=layout)


def test_splits_are_added(monkeypatch):
    """Several blocks along N and along M for the same sums."""
    check((40, 1100), (5,), (3, 3))
    check((600, 24), (1,), (2, 1))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(130, 264), (65, 131)], ids=str)
def test_every_kind_of_adapters(dtype, kind, shape):
    for ranks, member_ranks in (((16,), (16, 16)), ((64,), (32, 1)), ((7, 8, 9), (20,))):
        check(shape, ranks, member_ranks, dtype, kind)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(emulator, fault):
    found = 0
    for seed in range(4):
        emulator.lk_options(seed, FAULTS[fault], LARGE)
        try:
            check((70, 200), (16,), (16, 16))
        except (BudgetExceededError, RuntimeError, AssertionError):
            found += 1
    assert found


def test_what_the_entry_refuses():
    operators, _ = loader.load()
    gate = torch.zeros(4, 16, dtype=BF16)
    b = torch.zeros(16, 2, dtype=BF16)
    for arguments, message in (
        ((gate, gate[:, :8], 0, []), "another shape or dtype than gate"),
        ((gate, None, 9, []), "kind is unknown"),
        ((gate.float(), None, 0, []), "bfloat16 and float16 are"),
        ((gate, None, 0, [torch.zeros(2, 8, dtype=BF16)]), "does not fit gate"),
        ((gate[0], None, 0, []), "not two-dimensional"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operators.gated_activation_fwd(*arguments)
    for bs, s, scalings, message in (
        ([b, b], None, [1.0, 1.0], "one B per operand"),
        ([b], None, [], "differ in length"),
        ([b], gate[:, :3], [1.0], "s has another shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operators.gated_activation_bwd(gate, gate, None, 0, bs, s, scalings)


def test_reasons(monkeypatch):
    monkeypatch.undo()
    for changes, reason in (
        ({"device": "cpu"}, "gate is on cpu"),
        ({"dtype": FP32}, "float32 is not supported"),
        ({"member_ranks": (300, 1)}, "rank 300 is too large"),
    ):
        shapes = {"M": 4, "N": 8, "dtype": BF16, "device": "cuda", **changes}
        able, why = cuda.supports(GatedActivationProblem.from_shapes(**shapes))
        assert not able and reason in why
