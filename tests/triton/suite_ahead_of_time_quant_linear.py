"""quant_linear's Triton kernels compiled for GPUs that are not here.

What is asserted of the machine code: no spills, shared memory within the device's limit, matrix
units, stores of 16 bytes, one launch per dequantization. Not collected by itself: suite_runner.py
runs this file in a process of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import ahead_of_time
import pytest
import torch

from lora_kernels.ops.quant_linear import configs, formats, parts_of
from lora_kernels.ops.quant_linear import triton as host
from lora_kernels.ops.quant_linear.formats import QuantSpec
from lora_kernels.ops.quant_linear.problem import FORMAT_NAMES

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KERNELS = host._kernels()
SHARED_BYTES = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
_BLOCK = {formats.FLAT: 64, formats.GPTQ: 128, formats.AWQ: 128, formats.FP8_BLOCK: 128}


@dataclass(frozen=True)
class Case:
    target: str
    format: str = "nf4"
    rows: tuple[int, ...] = (1,)
    dtype: torch.dtype = BF16
    adapter: torch.dtype | None = BF16
    dropout_p: float = 0.0
    act_order: bool = False
    K: int = 4096
    N: int = 4096

    def __str__(self) -> str:
        kind = f"{self.dtype}-{self.adapter}".replace("torch.", "")
        more = f"-p{self.dropout_p}-K{self.K}" + ("-act_order" if self.act_order else "")
        return f"{self.target}-{self.format}-{'_'.join(map(str, self.rows))}-{kind}{more}"

    @property
    def spec(self) -> QuantSpec:
        fmt, layout = FORMAT_NAMES[self.format]
        nested = formats.NESTED_BLOCK if layout == formats.FLAT else 0
        block = _BLOCK.get(layout, self.K)
        return QuantSpec(fmt, layout, (self.N, self.K), BF16, block, nested, self.act_order)


@pytest.fixture
def compile_case(monkeypatch):
    """Runs dequantization, forward and backward of a case into compilations; nothing is touched."""

    def compile_all(case: Case) -> tuple[list[ahead_of_time.Compiled], configs.Target]:
        processors = ahead_of_time.TARGETS[case.target][1]
        target = configs.Target(case.target, processors, SHARED_BYTES[case.target])
        found, recorders = ahead_of_time.recorders(case.target, KERNELS)
        monkeypatch.setattr(host, "_kernels", lambda: host._Kernels(*recorders))
        monkeypatch.setattr(host, "_target", lambda *args: target)
        spec, seed = case.spec, torch.zeros((), dtype=torch.int64)
        parts = tuple(torch.empty(p.shape, dtype=p.dtypes[0]) for p in parts_of(spec))
        host.dequantize(parts, spec, case.dtype)
        host.quantize(torch.empty(spec.shape, dtype=case.dtype), spec)
        a = b = None
        if case.adapter is not None:
            a = torch.empty(16, case.K, dtype=case.adapter)
            b = torch.empty(case.N, 16, dtype=case.adapter)
        for m in case.rows:
            x, dy = (torch.empty(m, n, dtype=case.dtype) for n in (case.K, case.N))
            bias = torch.empty(case.N, dtype=case.dtype)
            _, s = host.quant_linear_fwd(x, parts, spec, bias, a, b, 0.5, case.dropout_p, seed)
            host.quant_linear_bwd(
                dy, x, parts, spec, a, b, s, 0.5, case.dropout_p, seed, True, False, False
            )
        return found, target

    return compile_all


def assert_units(found: list[ahead_of_time.Compiled], case: Case) -> None:
    """What the speed stands on."""
    assert sum(c.kernel.startswith("dequantize") for c in found) == 1
    ahead_of_time.assert_no_tensor_maps(found)
    for made in found:
        if made.kernel == "products" and case.dtype != FP32:
            if case.target == "sm_90":
                assert made.opcodes["HGMMA"] > 0, made
            elif case.target == "sm_80":
                assert made.opcodes["HMMA"] > 0, made
            elif case.target == "gfx942":
                assert "v_mfma_f32_16x16" in made.compiled.asm["amdgcn"], made
        if made.kernel == "dequantize_flat" and made.is_cuda and made.constants["EVEN"]:
            assert "STG.E.128" in made._dump("-sass"), made
            moved = case.dtype != FP32 and made.shared  # fp32: a thread's elements are two stores
            assert not moved, f"{made}: moves elements between threads"


def assert_all(compile_case, case: Case) -> list[ahead_of_time.Compiled]:
    found, target = compile_case(case)
    ahead_of_time.assert_fits(found, target.shared_bytes)
    assert_units(found, case)
    return found


FEW = [
    Case("sm_90", rows=(1, 128)),
    Case("sm_90", "int4", rows=(40,), dropout_p=0.1, adapter=FP32),
    Case("sm_80", "int8"),
    Case("sm_100", "nf4", rows=(128,)),
    Case("gfx942", rows=(16,)),
]
ROWS = (1, 32, 128)
MANY = [
    Case(target, name, ROWS, dtype, adapter, p)
    for target in ahead_of_time.TARGETS
    for name in ("nf4", "int8", "int4", "int4_awq", "fp8_block")
    for dtype, adapter, p in (
        (BF16, BF16, 0.0), (BF16, FP32, 0.1), (FP16, None, 0.0), (FP32, FP32, 0.1),
    )
] + [
    Case(target, name, ROWS, K=k, act_order=act)
    for target in ahead_of_time.TARGETS
    for name, k, act in (("nf4", 4100, False), ("nf4", 4095, False), ("int4", 4096, True),
                         ("int4_awq", 4100, False), ("fp8_tensor", 4096, False))
]  # fmt: skip


@pytest.mark.parametrize("case", FEW, ids=str)
def test_defaults(compile_case, case):
    assert_all(compile_case, case)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["nf4", "int4", "fp8_block"])
def test_extents_of_one(compile_case, format):
    """They are constants to the compiler, not values."""
    found, target = compile_case(Case("sm_90", format, K=128, N=1))
    assert {c.kernel for c in found} >= {"products", "finish"}
    ahead_of_time.assert_fits(found, target.shared_bytes)


@pytest.mark.slow
@pytest.mark.parametrize("case", MANY, ids=str)
def test_defaults_of_every_kind(compile_case, case):
    assert_all(compile_case, case)


def test_a_tile_that_is_too_large_is_noticed(compile_case):
    """Negative control of the gates."""
    with configs.forced(launch=configs.Launch(64, 1, 1)):
        found, target = compile_case(Case("sm_80", "int8", rows=(128,), adapter=None))
    with pytest.raises(AssertionError, match="spills"):
        ahead_of_time.assert_fits(found, target.shared_bytes)


def test_other_rows_compile_nothing_new(compile_case):
    """The number of rows is a run-time value."""
    first, _ = compile_case(Case("sm_90", rows=(17,), adapter=None))
    second, _ = compile_case(Case("sm_90", rows=(30,), adapter=None))
    assert {c.compiled.hash for c in second} <= {c.compiled.hash for c in first}
