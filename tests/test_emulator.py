"""The GPU kernels of lora_linear on the CPU: same sources, emulated instructions, no GPU.

What this proves is the logic: indices, masks, edges, fragment layouts, barriers, waits. It is our
model of the hardware, so it says nothing about the instructions themselves, nor about time; nothing
in this file runs on a GPU (the `gpu` tests do).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from dataclasses import replace

import emulator_library as library
import pytest
import torch
from emulated_lora_linear import (
    DTYPES,
    LARGE,
    SMALL,
    Emulator,
    EmulatorError,
    da,
    dgrad,
    emulate,
    rank_columns,
    shrink,
)

from lora_kernels._backends import cuda as cuda_backend
from lora_kernels.ops._philox import keep_mask, keep_scale
from lora_kernels.testing import (
    BudgetExceededError,
    LoraLinearInputs,
    LoraLinearResults,
    assert_within_budget,
    compare,
    lora_linear_inputs,
    lora_linear_results,
    yardstick,
)

BF16, FP16 = torch.bfloat16, torch.float16
SEEDS = (0, 1, 7)
TILES = {"128x256": 0, "128x128": 1, "64x64": 2}
UNALIGNED = 3
FAULTS = {"fragment_order": 1, "missing_barrier": 2, "missing_wait": 3, "shifted_mask": 4}


@pytest.fixture(scope="module")
def dll() -> Iterator[ctypes.CDLL]:
    if library.compiler() is None:
        pytest.skip("no C++ compiler; install g++ or set CXX")
    loaded = library.load()
    yield loaded
    loaded.lk_options(0, 0, LARGE)
    loaded.lk_clear_memory()


def check(dll: ctypes.CDLL, inputs: LoraLinearInputs, **options: object) -> LoraLinearResults:
    oracle = lora_linear_results(inputs, torch.float64, needs="xab")
    results = emulate(dll, inputs, **options)
    compare(results, oracle, yardstick(inputs, oracle, "xab"), "emulator: ")
    return results


def test_what_runs_here(dll, capsys):
    with capsys.disabled():
        print("\nGPU kernels of lora_linear: run in the emulator on the CPU; nothing ran on a GPU")


CORRECT = ("mma", "mma_trans", "warp_sum", "cp_async", "named_barrier", "bank_conflicts")
STOPPED = {
    "deadlock": "deadlock",
    "divergent": "different warp-wide instructions",
    "returned_lane": "after a lane has returned",
    "outside": "outside shared memory",
    "past_end": "past the end of shared memory",
    "misaligned": "misaligned global access",
    "unregistered": "outside every registered range",
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CORRECT)
def test_instructions(dll, name, seed):
    dll.lk_clear_memory()
    dll.lk_options(seed, 0, LARGE)
    assert dll.lk_selftest(name.encode()) == 1, dll.lk_error()


@pytest.mark.parametrize("name", STOPPED)
def test_emulator_stops_wrong_kernels(dll, name):
    dll.lk_clear_memory()
    dll.lk_options(0, 0, LARGE)
    assert dll.lk_selftest(name.encode()) == 0
    assert STOPPED[name] in dll.lk_error().decode()
    dll.lk_clear_memory()
    assert dll.lk_selftest(b"warp_sum") == 1  # and goes on afterwards


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"M": 70, "K": 200, "N": 136, "rank": 16}, id="aligned"),
        pytest.param({"M": 37, "K": 45, "N": 51, "rank": 3}, id="odd"),
        pytest.param({"M": 65, "K": 144, "N": (80, 24, 33), "rank": (4, 17, 8)}, id="group"),
    ],
)
def test_forward_and_backward(dll, shape, dropout_p, dtype, seed):
    inputs = lora_linear_inputs(dtype=dtype, dropout_p=dropout_p, **shape)
    check(dll, inputs, seed=seed)


@pytest.mark.parametrize("rank", [1, 8, 13, 24, 40, 64, 100, 256])
def test_ranks(dll, rank):
    inputs = lora_linear_inputs(M=33, K=136, N=72, rank=rank, dtype=BF16, dropout_p=0.1)
    check(dll, inputs, seed=rank)


@pytest.mark.parametrize("M", [1, 7, 127, 129])
def test_rows(dll, M):
    check(dll, lora_linear_inputs(M=M, K=64, N=48, rank=8, dtype=FP16, dropout_p=0.5), seed=M)


def test_group_of_eight(dll):
    inputs = lora_linear_inputs(
        M=20, K=136, N=(8, 16, 24, 40, 8, 33, 64, 16), rank=(8, 1, 2, 30, 4, 16, 5, 64),
        scaling=(0.5, 2.0, 1.0, 0.25, 3.0, 0.7, 1.5, 0.1), dtype=BF16, dropout_p=0.2,
    )  # fmt: skip
    check(dll, inputs)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, FP16], ids=["fp32", "fp16"])
def test_adapters_of_another_dtype(dll, adapter_dtype):
    inputs = lora_linear_inputs(
        M=40, K=72, N=56, rank=6, dtype=BF16, adapter_dtype=adapter_dtype, dropout_p=0.1
    )
    results = check(dll, inputs)
    assert results.das[0].dtype == results.dbs[0].dtype == adapter_dtype


@pytest.mark.parametrize("layout", ["sliced", "misaligned"])
def test_layouts_with_nan_around(dll, layout):
    inputs = lora_linear_inputs(M=34, K=72, N=(40, 16), rank=(8, 5), dtype=BF16, dropout_p=0.2)
    check(dll, inputs.with_layout(layout, float("nan")), pad=False)


def padded_rows(t: torch.Tensor) -> torch.Tensor:
    """Rows of a multiple of 16 bytes, NaN behind the last element of each."""
    if t.dim() != 2:
        return t
    wide = torch.full((t.shape[0], -(-t.shape[1] // 8) * 8 + 8), float("nan"), dtype=t.dtype)
    return wide[:, : t.shape[1]].copy_(t)


@pytest.mark.parametrize("tile", [None, *TILES.values()])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_aligned_rows_with_a_partial_last_chunk(dll, dropout_p, tile):
    """K and N are no multiples of 8, yet 16-byte copies are possible."""
    inputs = lora_linear_inputs(
        M=70, K=301, N=(91, 34), rank=(5, 9), dtype=BF16, dropout_p=dropout_p
    )
    moved = replace(
        inputs,
        x=padded_rows(inputs.x),
        **{
            name: [padded_rows(t) for t in getattr(inputs, name)]
            for name in ("weights", "lora_as", "lora_bs", "dys")
        },
    )
    check(dll, moved, tile=tile)
    if tile is None:
        check(dll, moved, pad=False)


@pytest.mark.parametrize("keep", ["none", "all"])
def test_extreme_probabilities(dll, keep):
    inputs = lora_linear_inputs(
        M=20, K=40, N=24, rank=4, dtype=BF16, dropout_p=1.0 if keep == "none" else 1e-6
    )
    check(dll, inputs)


@pytest.mark.parametrize("splits", [1, 2, 3, 5])
def test_split_sums(dll, splits):
    shape = {"M": 270, "K": 600, "N": (64, 32), "rank": (8, 4)}
    check(dll, lora_linear_inputs(dtype=BF16, dropout_p=0.1, **shape), splits=splits)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("tile", TILES)
def test_gemm_tiles(dll, tile, dropout_p):
    """Several tiles in both directions, the last ones partial; more k-blocks than stages."""
    inputs = lora_linear_inputs(
        M=150, K=328, N=(296, 200), rank=(8, 40), dtype=BF16, dropout_p=dropout_p
    )
    check(dll, inputs, tile=TILES[tile], seed=3)


@pytest.mark.parametrize(
    ("m", "n", "sm_count", "tile"),
    [
        pytest.param(8192, 4096, 108, "128x256", id="large"),
        pytest.param(384, 128, 1, "128x128", id="narrow"),
        pytest.param(16, 4096, 108, "64x64", id="few rows"),
    ],
)
def test_choice_of_a_tile(dll, m, n, sm_count, tile):
    k = torch.zeros(1, 64, dtype=BF16)
    p = library.GemmParams(dtype=DTYPES[BF16], layout=0, m=m, problems=1, sm_count=sm_count)
    p.problem[0] = library.GemmProblem(n, k.data_ptr(), n, None, 0, 0, 1)
    p.term[0] = library.GemmTerm(k.data_ptr(), 64, k.data_ptr(), 64, 64, -1)
    assert dll.lk_gemm_sm80_choice(ctypes.addressof(p)) == TILES[tile]
    p.term[0].lda = 65
    assert dll.lk_gemm_sm80_choice(ctypes.addressof(p)) == UNALIGNED
    assert dll.lk_gemm_sm80_tile(ctypes.addressof(p), TILES[tile]) != 0  # and nothing else can


@pytest.mark.parametrize("rank", [16, 40, 150])
def test_devices_with_little_shared_memory(dll, rank):
    inputs = lora_linear_inputs(M=90, K=264, N=536, rank=rank, dtype=BF16, dropout_p=0.25)
    check(dll, inputs, shared_limit=SMALL)


@pytest.mark.parametrize("rank", [16, 24, 64, 128])
@pytest.mark.parametrize("tile", TILES)
def test_operand_loads_have_no_bank_conflicts(dll, tile, rank):
    """The swizzle of the tiles puts the 8 rows of every ldmatrix phase into different banks."""
    inputs = lora_linear_inputs(M=64, K=128, N=128, rank=rank, dtype=BF16, dropout_p=0.25)
    before = dll.lk_shared_phases(), dll.lk_conflicting_phases()
    emulate(dll, inputs, tile=TILES[tile])
    assert dll.lk_shared_phases() > before[0]
    assert dll.lk_conflicting_phases() == before[1]


def test_python_asks_for_as_much_shared_memory_as_the_kernels_need():
    header = (library.CSRC / "lora_linear/cuda/launch.h").read_text()
    needed = re.search(r"kSharedMemoryNeeded = (\d+) << 10;", header)
    assert needed is not None
    assert int(needed[1]) << 10 == cuda_backend._SHARED_BYTES <= SMALL


def test_wide_outputs(dll):
    """More than one column block (512) of dY and of X (256), more ranks than one chunk."""
    inputs = lora_linear_inputs(M=66, K=520, N=1100, rank=72, dtype=BF16, dropout_p=0.1)
    check(dll, inputs)


@pytest.mark.parametrize("needs", ["x", "a", "b", "ab", "xb"])
def test_some_gradients(dll, needs):
    shape = {"M": 70, "K": 136, "N": (72, 40), "rank": (8, 5)}
    inputs = lora_linear_inputs(dtype=BF16, dropout_p=0.2, **shape)
    everything = emulate(dll, inputs)
    some = emulate(dll, inputs, needs=needs)
    assert (some.dx.numel() > 0, bool(some.das), bool(some.dbs)) == tuple(k in needs for k in "xab")
    for name, t in some.named().items():
        assert t.numel() == 0 or torch.equal(t, everything.named()[name]), name


@pytest.mark.parametrize("empty", ["K", "N"])
def test_features_of_extent_zero(dll, empty):
    """Sums over nothing: S, dS and dB are zero, Y is the bias, dX is empty or zero."""
    m, k, n, r = 5, (0 if empty == "K" else 16), (0 if empty == "N" else 24), 4
    inputs = LoraLinearInputs(
        torch.ones(m, k, dtype=BF16), [torch.ones(n, k, dtype=BF16)],
        [torch.ones(r, k, dtype=BF16)], [torch.ones(n, r, dtype=BF16)],
        [torch.full((n,), 3.0, dtype=BF16)], [1.0], 0.0, None, [torch.ones(m, n, dtype=BF16)],
    )  # fmt: skip
    results = emulate(dll, inputs, pad=False)
    assert torch.equal(results.ys[0], torch.full((m, n), 3.0, dtype=BF16))
    for t in (results.dx, results.das[0], results.dbs[0]):
        assert torch.equal(t, torch.zeros_like(t))


def test_same_bits_in_every_schedule(dll):
    inputs = lora_linear_inputs(M=70, K=264, N=(72, 40), rank=(8, 5), dtype=BF16, dropout_p=0.2)
    first = emulate(dll, inputs, seed=0).named()
    for seed in SEEDS[1:]:
        for name, t in emulate(dll, inputs, seed=seed, seed_on_device=True).named().items():
            assert torch.equal(t, first[name]), name


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(dll, fault, seed):
    """In every kernel: Y (shrink, forward), dX (dgrad), dA and dB each leave their budgets."""
    inputs = lora_linear_inputs(M=300, K=600, N=136, rank=16, dtype=BF16, dropout_p=0.25)
    oracle = lora_linear_results(inputs, torch.float64, needs="xab")
    low = yardstick(inputs, oracle, "xab").named()
    results = emulate(dll, inputs, seed=seed, fault=FAULTS[fault]).named()
    for name in ("y[0]", "dx", "da[0]", "db[0]"):
        with pytest.raises(BudgetExceededError):
            assert_within_budget(results[name], oracle.named()[name], low[name], name)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_are_those_of_every_backend(dll, p):
    """Bit for bit, read out of each kernel that draws them: one-hot operands leave the mask."""
    rows, columns, seed = 70, 300, 2**40 + 12345
    picked = torch.randperm(columns)[:256]
    one_hot = torch.zeros(256, columns, dtype=FP16)
    one_hot[torch.arange(256), picked] = 1.0
    e = Emulator(dll, FP16)
    drop = e.dropout(p, seed, on_device=True)
    x = torch.ones(rows, columns, dtype=FP16)
    members = LoraLinearInputs(
        x, [torch.zeros(8, columns, dtype=FP16)] * 2, [one_hot, one_hot], [], [], [1.0, 1.0], p,
        seed, [torch.zeros(rows, 8, dtype=FP16)] * 2,
    )  # fmt: skip
    for t in (one_hot, *members.weights, *members.dys):
        e.given(t)
    keep = [keep_mask(torch.tensor(seed), rows, columns, p, g) for g in range(2)]

    ranks = rank_columns([256, 256], True)
    s, _ = shrink(e, members, x, members.lora_as, ranks, ranks, drop, 1.0)
    for g in range(2):
        assert torch.equal(s[:, 256 * g : 256 * (g + 1)] != 0, keep[g][:, picked])

    ds = e.output(rows, 16)
    ds.zero_()
    ds[:, 8] = 1.0  # rank 1, member 1
    ones = torch.ones(1, columns, dtype=FP16)
    e.given(ones)
    dx = dgrad(e, members, members.dys, ds, [ones, ones], [0, 8], drop)
    assert torch.equal(dx != 0, keep[1])

    pick_rows = torch.eye(rows, dtype=FP16)
    e.given(pick_rows)
    both = torch.cat([pick_rows, torch.zeros(rows, 2), pick_rows, torch.zeros(rows, 2)], 1).half()
    shapes = LoraLinearInputs(
        x, [], [torch.empty(rows, columns, dtype=FP16)] * 2, [], [], [], p, seed, []
    )
    e.given(both)
    for g, out in enumerate(da(e, shapes, x, both, [0, 72], drop)):
        assert torch.equal(out != 0, keep[g])


def test_scale_of_kept_elements(dll):
    inputs = lora_linear_inputs(M=9, K=40, N=24, rank=4, dtype=FP16, dropout_p=0.3)
    check(dll, inputs)
    assert keep_scale(0.3) > 1.0


def test_zero_rows_give_zero_gradients(dll):
    inputs = lora_linear_inputs(M=1, K=40, N=24, rank=4, dtype=BF16)
    none = LoraLinearInputs(
        inputs.x[:0], inputs.weights, inputs.lora_as, inputs.lora_bs, inputs.biases,
        inputs.scalings, 0.0, None, [inputs.dys[0][:0]],
    )  # fmt: skip
    results = emulate(dll, none)
    assert results.ys[0].shape == (0, 24) and results.dx.shape == (0, 40)
    assert torch.equal(results.das[0], torch.zeros_like(results.das[0]))
    assert torch.equal(results.dbs[0], torch.zeros_like(results.dbs[0]))


REFUSED = {
    "float32": ({"dtype": DTYPES[torch.float32]}, "float32 is not supported"),
    "members": ({"members": 9}, "more than 8 members"),
    "no members": ({"members": 0}, "the group is empty"),
    "stride": ({"ldx": 39}, "row stride"),
    "extent": ({"m": -1}, "an extent is negative"),
    "null": ({"x": None}, "null"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(dll, case):
    changes, message = REFUSED[case]
    x = torch.zeros(8, 40, dtype=BF16)
    p = library.ShrinkParams(
        dtype=DTYPES[BF16], x=x.data_ptr(), ldx=40, m=8, k=40, members=1, keep_scale=1.0,
        sm_count=1,
    )  # fmt: skip
    p.member[0] = library.ShrinkMember(x.data_ptr(), 40, 4, 0, 0, 1.0)
    assert dll.lk_check_shrink(ctypes.addressof(p)) is None
    for name, changed in changes.items():
        setattr(p, name, changed)
    assert message in dll.lk_check_shrink(ctypes.addressof(p)).decode()
    assert dll.lk_shrink(ctypes.addressof(p)) != 0


@pytest.mark.parametrize("rank", [0, 257])
def test_ranks_outside_are_refused(dll, rank):
    with pytest.raises(EmulatorError, match=r"1\.\.256"):
        inputs = lora_linear_inputs(M=2, K=300, N=8, rank=1, dtype=BF16)
        e = Emulator(dll, BF16)
        a = torch.zeros(rank, 300, dtype=BF16)
        shrink(e, inputs, inputs.x, [a], [0, rank], [0, 264], e.dropout(0.0, None, False), 1.0)
