"""Every Triton kernel and tile of lora_linear compiled for GPUs that are not here.

What is asserted of the machine code: no spills, shared memory within the device's limit, and the
units that the design counts on (wgmma and tensor maps on sm_90, mma on sm_80). Not collected by
itself: suite_runner.py runs this file in a process of its own.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

import ahead_of_time
import launcher
import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels.ops.lora_linear import (
    configs,
    triton_adapter_grads,
    triton_gemm,
    triton_shrink,
)
from lora_kernels.ops.lora_linear import triton as host

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KERNELS = (
    triton_shrink.shrink, triton_adapter_grads.dy_pass, triton_adapter_grads.da_pass,
    triton_adapter_grads.sum_partials, triton_gemm.gemm_pointer, triton_gemm.gemm_descriptor,
)  # fmt: skip
QKV = (4096, 1024, 1024)


@dataclass(frozen=True)
class Case:
    target: str
    rank: int = 16
    N: tuple[int, ...] = (4096,)
    dtype: torch.dtype = BF16
    adapter: torch.dtype = BF16
    dropout_p: float = 0.0
    M: int = 8192
    K: int = 4096

    def __str__(self) -> str:
        kind = f"{self.dtype}-{self.adapter}".replace("torch.", "")
        return f"{self.target}-r{self.rank}-{len(self.N)}x-{kind}-p{self.dropout_p}-K{self.K}"


def run(
    case: Case, monkeypatch: Any, stand_in: Any, found: list[Any], given: bool = False
) -> configs.Target:
    """Forward and backward of a case on kernels replaced by `stand_in`, no element ever touched;
    `given`: with S and dS of the caller, and no dB."""
    target = configs.target(case.target, ahead_of_time.TARGETS[case.target][1])
    stand_ins = [stand_in(kernel, found) for kernel in KERNELS]
    kernels = host._Kernels(*stand_ins, TensorDescriptor, False)
    monkeypatch.setattr(host, "_kernels", lambda: kernels)
    monkeypatch.setattr(host, "_target", lambda *args: target)
    x = torch.empty(case.M, case.K, dtype=case.dtype)
    ws = [torch.empty(n, case.K, dtype=case.dtype) for n in case.N]
    las = [torch.empty(case.rank, case.K, dtype=case.adapter) for _ in case.N]
    lbs = [torch.empty(n, case.rank, dtype=case.adapter) for n in case.N]
    biases = [torch.empty(n, dtype=case.dtype) for n in case.N]
    seed = torch.zeros((), dtype=torch.int64)
    product = x.new_empty(case.M, case.rank * len(ws)) if given else None
    ys, s = host.lora_linear_fwd(
        x, ws, las, lbs, biases, [0.5] * len(ws), case.dropout_p, seed, product
    )
    host.lora_linear_bwd(
        ys,
        x,
        ws,
        las,
        lbs,
        s,
        [0.5] * len(ws),
        case.dropout_p,
        seed,
        True,
        True,
        not given,
        product,
    )
    return target


@pytest.fixture
def compile_case(monkeypatch):
    """Runs a case into compilations."""

    def compile_all(case: Case) -> tuple[list[ahead_of_time.Compiled], configs.Target]:
        ahead_of_time.compile_for(case.target)
        found: list[ahead_of_time.Compiled] = []
        return found, run(case, monkeypatch, ahead_of_time.Recorder, found)

    return compile_all


def gemms(found: list[ahead_of_time.Compiled]) -> list[ahead_of_time.Compiled]:
    return [c for c in found if c.kernel.startswith("gemm")]


def assert_launchable(found: list[ahead_of_time.Compiled]) -> None:
    for made in found:
        if made.is_cuda:
            wanted = 0
            if made.kernel == "gemm_descriptor" and made.compiled.metadata.target.arch >= 90:
                wanted = 2 * made.constants["G"] + 1
            assert launcher.tensor_maps(made.compiled) == wanted, made


def assert_units(found: list[ahead_of_time.Compiled], case: Case) -> None:
    """The matrix units and copies that the speed of the GEMM stands on."""
    for made in gemms(found):
        code = made.opcodes if made.is_cuda else {}
        if case.target == "sm_90" and case.dtype != FP32:
            assert made.kernel == "gemm_descriptor" or case.K % 8
            assert code["HGMMA"] > 0, made
            assert case.K % 8 or code["UTMALDG"] > 2, f"{made}: no pipeline of tensor-map loads"
        elif case.target == "sm_80" and case.dtype != FP32:
            assert code["HMMA"] > 0, made
            assert code["LDGSTS"] > 0, f"{made}: no asynchronous copies"
        elif case.target == "sm_100" and case.dtype != FP32:
            assert "tcgen05.mma" in made.compiled.asm["ptx"], made
        elif case.target == "gfx942" and case.dtype != FP32:
            assert "v_mfma" in made.compiled.asm["amdgcn"], made
    for made in found:
        if made.kernel in ("shrink", "dy_pass", "da_pass") and case.dtype != FP32:
            text = made.compiled.asm.get("ptx") or made.compiled.asm["amdgcn"]
            assert "mma" in text or "mfma" in text, made
            if case.target in ("sm_80", "sm_90"):
                # Rows of S and B of such a rank come element by element, and nothing beside them.
                alone = case.rank > 64 or case.rank % 8
                assert made.opcodes["LDGSTS"] > 0 or alone, f"{made}: not pipelined"


FEW = [
    Case("sm_90", dropout_p=0.1, N=QKV, adapter=FP32),
    Case("sm_90", rank=64),
    Case("sm_80"),
    Case("sm_100"),
    Case("gfx942", dropout_p=0.1),
]
# Problems that between them make the default take every tile that it can take.
SPACE = [
    {"M": m, "K": k, "rank": rank, "N": n, "dtype": dtype, "adapter": dtype, "dropout_p": p}
    for m, k, rank, n, dtype, p in itertools.product(
        (1, 100, 300, 700, 4096, 8192), (4096, 4095), (3, 16, 32, 64, 100, 256),
        ((64,), (500,), (1024,), (4096,), (14336,), QKV, (1024,) * 4),
        (BF16, FP32), (0.0, 0.1),
    )
]  # fmt: skip
# What makes a configuration: the tile, the padded rank, forward or dgrad. The rest a run brings.
TILE = ("BM", "BN", "BP", "BQ", "BK", "RP", "num_warps", "num_stages", "GROUP_M", "LORA_LAST",
        "PERSISTENT", "FLATTEN", "STORE_PARTS", "SCALE")  # fmt: skip
KINDS = [
    {"rank": rank, "N": n, "dtype": dtype, "adapter": adapter, "dropout_p": p}
    for rank in (3, 16, 32, 64, 100, 256)
    for n in ((4096,), QKV)
    for dtype, adapter in ((BF16, BF16), (BF16, FP32), (FP16, FP16), (FP32, FP32))
    for p in (0.0, 0.1)
    if not (dtype == FP16 and rank != 16) and not (adapter != dtype and rank not in (16, 256))
] + [{"K": 4095, "dropout_p": p} for p in (0.0, 0.1)]


def hardness(launch: ahead_of_time.Launch) -> tuple[Any, ...]:
    """Of two launches with one tile, which takes more registers."""
    o = launch.options
    return (
        o.get("RANK_BLOCKS", 0) > 2, o.get("DROPOUT", False), o.get("G", 1),
        o.get("HAS_BIAS", False), o.get("PARTIAL", False),
    )  # fmt: skip


_COLLECTED: dict[str, list[ahead_of_time.Launch]] = {}


def refused(where: configs.Target, shapes: dict[str, Any]) -> str:
    rank, members, p = (shapes.get(k, d) for k, d in (("rank", 16), ("N", (1,)), ("dropout_p", 0)))
    size = shapes.get("dtype", BF16).itemsize
    return configs.refused(where, rank, size, len(members), p > 0)


def configurations(target: str, monkeypatch: Any) -> list[ahead_of_time.Launch]:
    """Every (kernel, tile, padded rank, element size) of the default, each in the launch of SPACE
    that is the hardest to compile without spills."""
    ahead_of_time.compile_for(target)
    for kernel in KERNELS:
        kernel.device_caches.clear()  # they hold the target before
    if target in _COLLECTED:
        return _COLLECTED[target]
    kept: dict[tuple[Any, ...], ahead_of_time.Launch] = {}
    where = configs.target(target, ahead_of_time.TARGETS[target][1])
    for shapes in SPACE:
        if refused(where, shapes):
            continue
        found: list[ahead_of_time.Launch] = []
        run(Case(target, **shapes), monkeypatch, ahead_of_time.Collector, found)
        for launch in found:
            tile = tuple(launch.options.get(name) for name in TILE)
            key = (launch.name, shapes["dtype"], tile)
            if key not in kept or hardness(launch) > hardness(kept[key]):
                kept[key] = launch
    _COLLECTED[target] = list(kept.values())
    return _COLLECTED[target]


def assert_configurations(target: str, monkeypatch: Any, share: slice) -> None:
    launches = sorted(configurations(target, monkeypatch), key=lambda launch: launch.name)
    assert len(launches) > 70
    found = [launch.compile() for launch in launches[share]]
    where = configs.target(target, ahead_of_time.TARGETS[target][1])
    ahead_of_time.assert_fits(found, where.shared_bytes)
    assert_launchable(found)


@pytest.mark.parametrize(("first", "target"), enumerate(ahead_of_time.TARGETS))
def test_a_quarter_of_the_configurations_of_the_default(first, target, monkeypatch):
    """Of each GPU and kernel another quarter; all of them take minutes."""
    assert_configurations(target, monkeypatch, slice(first, None, len(ahead_of_time.TARGETS)))


@pytest.mark.slow
@pytest.mark.parametrize("target", ahead_of_time.TARGETS)
def test_every_configuration_of_the_default(target, monkeypatch):
    assert_configurations(target, monkeypatch, slice(None))


def test_the_space_reaches_every_tile_of_the_default(monkeypatch):
    """Random problems find no GEMM tile that the list above lacks."""
    generator = random.Random(5)
    for name, (_, processors) in ahead_of_time.TARGETS.items():
        where = configs.target(name, processors)
        reached = {
            tuple(launch.options.get(key) for key in TILE[:-1])
            for launch in configurations(name, monkeypatch)
            if launch.name.startswith("gemm")
        }
        for _ in range(2000):
            size, members = generator.choice((2, 4)), generator.choice((1, 1, 2, 3, 4))
            aligned, dropout = generator.random() < 0.7, generator.random() < 0.5
            rank = generator.choice((1, 8, 16, 32, 40, 64, 128, 256))
            if configs.refused(where, rank, size, members, dropout):
                continue
            c = configs.gemm(
                generator.choice((1, 16, 100, 700, 4096, 30000)),
                generator.choice((64, 500, 1024, 4096, 14336)),
                rank, size, where,
                dropout=dropout, members=members, vectors=aligned,
                descriptor=where.descriptors and size == 2 and aligned and members <= 3,
            )  # fmt: skip
            tile = {
                "BM": c.block_m, "BP": c.block_n, "BQ": c.block_k, "num_warps": c.num_warps,
                "num_stages": c.num_stages, "GROUP_M": c.group_m, "LORA_LAST": c.lora_last,
                "PERSISTENT": c.persistent,
            }  # fmt: skip
            if c.descriptor:
                tile |= {"FLATTEN": c.flatten, "STORE_PARTS": c.store_parts}
            assert tuple(tile.get(key) for key in TILE[:-1]) in reached, (name, c)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_defaults(compile_case, case):
    found, target = compile_case(case)
    ahead_of_time.assert_fits(found, target.shared_bytes)
    assert_units(found, case)
    assert_launchable(found)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_given_s_and_ds_leave_the_gemms_and_da(target, monkeypatch):
    """dS of a member has the rows of the whole group's; the other launches are compiled above."""
    ahead_of_time.compile_for(target)
    found: list[ahead_of_time.Launch] = []
    case = Case(target, N=QKV)
    where = run(case, monkeypatch, ahead_of_time.Collector, found, given=True)
    names = [launch.name.partition("_")[0] for launch in found]
    assert names == ["gemm", "gemm", "gemm", "da", "sum", "gemm"]
    made = [found[3].compile()]
    ahead_of_time.assert_fits(made, where.shared_bytes)
    assert_units(made, case)


@pytest.mark.slow
@pytest.mark.parametrize("shapes", KINDS, ids=lambda s: str(Case("", **s))[1:])
@pytest.mark.parametrize("target", ahead_of_time.TARGETS)
def test_every_kind_of_problem(compile_case, target, shapes):
    case = Case(target, **shapes)
    if refused(configs.target(target, 1), shapes):
        pytest.skip("the predicate refuses it")
    found, where = compile_case(case)
    ahead_of_time.assert_fits(found, where.shared_bytes)
    assert_units(found, case)
    assert_launchable(found)


TILES = [
    (name, tile, dtype, rank, dropout)
    for name in ahead_of_time.TARGETS
    for dtype in (BF16, FP32)
    for tile in configs.gemm_table(dtype.itemsize, configs.target(name, 1))
    for rank in (16, 64, 128)
    for dropout in (False, True)
    if not configs.invalid(
        tile, configs.target(name, 1), dtype.itemsize, rank, dropout=dropout
    )
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tile", "dtype", "rank", "dropout"), TILES, ids=str)
def test_every_tile_that_the_predicate_lets_pass(compile_case, name, tile, dtype, rank, dropout):
    with configs.forced(gemm=tile):
        case = Case(name, rank, dtype=dtype, adapter=dtype, dropout_p=0.1 if dropout else 0.0)
        found, target = compile_case(case)
    ahead_of_time.assert_fits(gemms(found), target.shared_bytes)


def test_a_tile_that_is_too_large_is_noticed(compile_case):
    """Negative controls of both gates: the predicate says no, and the compiler's output agrees."""
    target = configs.target("sm_80", 108)
    deep = configs.Gemm(128, 128, 64, 8, 9)
    assert "shared memory" in configs.invalid(deep, target, 2, 16)
    thin = configs.Gemm(128, 256, 32, 4, 3)
    assert "does not fit 4 warps" in configs.invalid(thin, target, 2, 16)
    for tile, said in ((deep, "bytes of shared memory"), (thin, "spills")):
        with configs.forced(gemm=tile):
            found, _ = compile_case(Case("sm_80", M=256, K=512, N=(512,)))
        with pytest.raises(AssertionError, match=said):
            ahead_of_time.assert_fits(gemms(found), target.shared_bytes)


def test_a_new_scaling_or_length_compiles_nothing_new(compile_case):
    """Scalings, M and the drop rate are run-time values."""
    first, _ = compile_case(Case("sm_90", M=8192))
    kernels = {id(c.compiled) for c in first}
    x = torch.empty(7777, 4096, dtype=BF16)
    w, a, b = (torch.empty(*s, dtype=BF16) for s in ((4096, 4096), (16, 4096), (4096, 16)))
    with configs.forced(
        gemm=configs.gemm(8192, 4096, 16, 2, host.target_of(x), descriptor=True),
        shrink=configs.shrink(8192, 4096, 16, 2, host.target_of(x), False),
    ):
        found: list[ahead_of_time.Compiled] = []
        for recorder in host._kernels()[:6]:
            recorder.found = found
        host.lora_linear_fwd(x, [w], [a], [b], [torch.empty(4096, dtype=BF16)], [0.37], 0.0, None)
    assert {id(c.compiled) for c in found} <= kernels
