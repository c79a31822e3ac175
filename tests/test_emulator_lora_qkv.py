"""The CUDA kernels of lora_qkv and their host entry on the CPU, in the emulator; no GPU.

The backward runs in the emulator too: rope's kernel, then lora_linear's.
"""

from __future__ import annotations

import ctypes
import dataclasses
import subprocess
from collections.abc import Iterator

import emulated_host_entry
import emulator_library
import pytest
import torch
from emulated_host_entry import LARGE

from lora_kernels._backends import cuda as loader
from lora_kernels.ops import _dispatch
from lora_kernels.ops.lora_linear import cuda as lora_linear_cuda
from lora_kernels.ops.lora_linear import problem as lora_linear_problem
from lora_kernels.ops.lora_qkv import cuda
from lora_kernels.ops.lora_qkv.problem import LoraQkvProblem
from lora_kernels.ops.rope import cuda as rope_cuda
from lora_kernels.testing import (
    BudgetExceededError,
    check_lora_qkv,
    lora_qkv_inputs,
    lora_qkv_op,
    poisoned_empty,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FAULTS = {"fragment_order": 1, "missing_barrier": 2, "missing_wait": 3, "shifted_table": 6}
CACHES = (lora_linear_problem._choose, _dispatch._resolved)


@pytest.fixture(autouse=True)
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    for op in ("lora_linear", "rope"):
        emulated_host_entry.load(op)
    operators, dll = emulated_host_entry.load("lora_qkv", "rope")
    monkeypatch.setattr(loader, "load", lambda: (operators, ""))
    for module in (cuda, rope_cuda, lora_linear_cuda):
        monkeypatch.setattr(module, "supports", lambda _: (True, "emulated"))
    for cache in CACHES:
        cache.cache_clear()
    yield dll
    for cache in CACHES:
        cache.cache_clear()
    dll.lk_options(0, 0, LARGE)


def check(*args, needs: str = "", **options) -> None:
    with poisoned_empty():
        check_lora_qkv(lora_qkv_inputs(*args, **options), "cuda", needs)


@pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_against_the_oracle(dtype, interleaved, joint):
    """Heads of which a tile holds several or a part, whole and partly rotated; rows of 16 bytes
    and others; every kind of table."""
    options = {"dtype": dtype, "interleaved": interleaved, "joint": joint}
    check((2, 35), 40, 3, 1, 32, tables="batch", rank=(5, 8, 3)[: 1 if joint else 3], **options)
    check((1, 9), 24, 2, 1, 80, R=32, tables="cache", rank=16, **options)
    check((5,), 33, 3, 2, 10, R=6, **options)


def test_gradients():
    for joint in (False, True):
        check((2, 9), 40, 3, 1, 16, R=8, joint=joint, dtype=BF16, needs="xwabc", tables="cache")


def test_dropout_adapters_of_another_dtype_and_no_bias():
    check((2, 17), 40, 2, 1, 16, dtype=BF16, dropout_p=0.4, needs="xab", rank=(3, 16, 8))
    check((2, 17), 40, 2, 1, 16, dtype=BF16, adapter_dtype=FP32, bias=False, needs="ab")


def test_projections_without_an_adapter():
    for rank in ((4, 0, 7), (0, 8, 0)):
        check((2, 17), 40, 2, 1, 16, dtype=BF16, rank=rank, needs="xabc", tables="cache")


@pytest.mark.parametrize("layout", ["sliced", "strided", "permuted", "misaligned"])
def test_layouts(layout):
    check((2, 7), 40, 2, 1, 16, layout=layout, dtype=BF16)


@pytest.mark.parametrize("D", [64, 128, 256])
def test_tiles_of_128_columns(D):
    """Enough rows for the large tile: heads of half of one, of one, and of two."""
    check((1, 260), 72, 512 // D, max(1, 128 // D), D, dtype=BF16, rank=16)


def test_what_is_not_rotated_has_the_bits_of_lora_linear():
    i = lora_qkv_inputs((2, 35), 40, 3, 2, 16, dtype=BF16)
    n = i.linear
    x = n.x.flatten(0, -2)
    ys, _ = lora_linear_cuda.lora_linear_fwd(
        x, n.weights, n.lora_as, n.lora_bs, n.biases, n.scalings, 0.0, None
    )
    still = dataclasses.replace(i, rotated=(0, 0, 0))
    plain, part = lora_qkv_op(still, "cuda", ""), lora_qkv_op(i, "cuda", "")
    for g, y in enumerate(ys):
        assert torch.equal(plain[f"z[{g}]"].reshape(y.shape), y)
    assert torch.equal(part["z[2]"], plain["z[2]"])
    assert not torch.equal(part["z[0]"], plain["z[0]"])


def test_a_position_outside_of_the_cache_gives_nan():
    i = lora_qkv_inputs((1, 3), 24, 2, 1, 16, R=8, tables="cache", dtype=BF16)
    n, t = i.linear, i.tables
    operators, _ = loader.load()
    ids = torch.tensor([[1, 50, 2]])
    ys, _ = operators.lora_qkv_fwd(
        n.x.flatten(0, 1), n.weights, n.lora_as, n.lora_bs, n.biases, n.scalings, 1.0, 0, None,
        t.cos, t.sin, ids, 3, 16, [2, 1, 0], False, "auto",
    )  # fmt: skip
    q = ys[0].unflatten(1, (2, 16))
    assert q[1, :, :8].isnan().all() and q[1, :, 8:].isfinite().all()
    assert q[[0, 2]].isfinite().all() and ys[2].isfinite().all()


def test_scheduling(emulator):
    """The same bits in every order of the threads."""
    i = lora_qkv_inputs((2, 40), 104, 3, 1, 32, dtype=BF16, rank=16)
    first = lora_qkv_op(i, "cuda", "")
    for seed in (1, 7):
        emulator.lk_options(seed, 0, LARGE)
        got = lora_qkv_op(i, "cuda", "")
        assert all(torch.equal(got[name], t) for name, t in first.items())


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(emulator, fault):
    found = 0
    for seed in range(3):
        emulator.lk_options(seed, FAULTS[fault], LARGE)
        try:
            check((2, 40), 200, 2, 1, 32, dtype=BF16, rank=16)
        except (BudgetExceededError, RuntimeError):
            found += 1
    assert found


@pytest.mark.slow
@pytest.mark.parametrize("D", [2, 18, 40, 64, 72, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_every_head_dim(dtype, D):
    for interleaved in (False, True):
        for R in {D, max(2, D // 4 * 2), 2}:
            check((2, 67), 72, 3, 1, D, R=R, interleaved=interleaved, dtype=dtype, tables="cache")
    check((1, 300), 136, 2, 2, D, dtype=dtype, joint=True, needs="xab")


IN_ACCUMULATORS = {
    "none": ("", ""),
    "partner": ("kApart = D / 4", "kApart = D / 8"),
    "row": ("+ 8 * h;", "+ 4 * h;"),
    "head": ("first_head + head >= problem", "first_head >= problem"),
}


@pytest.mark.parametrize("fault", IN_ACCUMULATORS)
def test_rotation_in_the_accumulators_of_hopper(tmp_path, fault):
    """tests/csrc/test_project_sm90.cpp, of the header as it is and with an index of it changed."""
    cxx = emulator_library.compiler()
    if cxx is None:
        pytest.skip("no C++ compiler; install g++ or set CXX")
    source, program = emulator_library.ROOT / "tests/csrc/test_project_sm90.cpp", tmp_path / "test"
    header, changed = "lora_qkv/cuda/rotate_accumulators.cuh", tmp_path / "changed.cuh"
    code = (emulator_library.CSRC / header).read_text()
    before, after = IN_ACCUMULATORS[fault]
    assert before in code
    code = code.replace(before, after) if before else code
    code = code.replace("../../rope", f"{emulator_library.CSRC}/rope")
    changed.write_text(
        code.replace('"heads.h"', f'"{emulator_library.CSRC}/lora_qkv/cuda/heads.h"')
    )
    (tmp_path / "test.cpp").write_text(source.read_text().replace(header, str(changed)))
    command = [cxx, "-std=c++17", "-O1", "-DLK_EMULATOR", f"-I{emulator_library.CSRC}",
               f"-I{source.parent}", str(tmp_path / "test.cpp"), "-o", str(program)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode != 0) == (fault != "none"), done.stdout[-2000:]


def test_what_the_entry_refuses():
    operators, _ = loader.load()
    x, table = torch.zeros(6, 16, dtype=BF16), torch.zeros(3, 8)
    w, a, b = (torch.zeros(s, dtype=BF16) for s in ((16, 16), (4, 16), (16, 4)))
    given = {
        "x": x, "weights": [w], "lora_as": [a], "lora_bs": [b], "biases": [None],
        "scalings": [1.0], "keep_scale": 1.0, "threshold": 0, "seed": None, "cos": table,
        "sin": table, "position_ids": None, "sequence": 3, "head_dim": 8, "rotated": [1],
        "interleaved": False, "gemm": "auto",
    }  # fmt: skip
    for changes, message in (
        ({"rotated": []}, "lists differ in length"),
        ({"rotated": [3]}, "more heads rotated"),
        ({"sequence": 4}, "not whole sequences"),
        ({"sequence": 2}, "cos does not fit"),
        ({"head_dim": 6, "rotated": [0]}, "at most those of a head"),
        ({"x": x.float()}, "differ in dtype"),
        ({"weights": [w[:12]]}, "do not fit"),
        ({"gemm": "sm70"}, "accepted: auto, sm80, sm90"),
        ({"gemm": "sm90"}, "needs compute capability 9.0"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operators.lora_qkv_fwd(**{**given, **changes})


def test_reasons(monkeypatch):
    monkeypatch.undo()
    for changes, reason in (
        ({"device": "cpu"}, "x is on cpu"),
        ({"dtype": FP32}, "float32 is not supported"),
        ({"D": 9, "R": 8}, "9 channels has no pairs"),
        ({"rank": 300}, "rank 300 is too large"),
        ({"members": 9}, "9 projections are too many"),
        ({"frozen": 1, "dropout_p": 0.1}, "taken without dropout only"),
    ):
        shapes = {"M": 4, "K": 8, "H": 4, "D": 8, "dtype": BF16, "device": "cuda", **changes}
        able, why = cuda.supports(LoraQkvProblem.from_shapes(**shapes))
        assert not able and reason in why
