"""The CUDA kernels of quant_linear and their host entry on the CPU, in the emulator; no GPU.

Dequantization has to give the bits of the reference, products the error budget around the fp64
product with the dequantized weight.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from emulated_host_entry import LARGE
from emulated_quant_linear import FORMATS, install, shuffled_groups, weight
from torch import Tensor

from lora_kernels.ops import dequantize, quant_linear, quantize
from lora_kernels.ops.quant_linear import QuantTensor, cuda, formats, problem, reference
from lora_kernels.testing import (
    BudgetExceededError,
    check_quant_linear,
    compare,
    lora_linear_results,
    poisoned_empty,
    quant_linear_inputs,
    quant_linear_op,
    yardstick,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SEEDS = (0, 1, 7)
FAULTS = {"fragment_order": 1, "missing_barrier": 2, "missing_wait": 3, "shifted_mask": 4}
CHECKED = tuple(name for name in FORMATS if name != "int4_v1")  # those that quantize makes


@pytest.fixture(autouse=True)
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    dll = install(monkeypatch)
    yield dll
    dll.lk_options(0, 0, LARGE)
    problem._choose.cache_clear()


def check(*args, seeds=(0,), needs="xabc", dll=None, **kwargs) -> None:
    for seed in seeds:
        if dll is not None:
            dll.lk_options(seed, 0, LARGE)
        with poisoned_empty():
            check_quant_linear(quant_linear_inputs(*args, **kwargs), "cuda", needs)


def same_bits(q: QuantTensor) -> None:
    for dtype in (FP32, BF16, FP16):
        with poisoned_empty():
            got = dequantize(q, dtype=dtype, backend="cuda")
        want = reference.dequantize(q.parts, q.spec, dtype)
        assert got.shape == want.shape and got.dtype == dtype
        # Bits, where neither is NaN: whose payload is nobody's business.
        assert torch.equal(torch.isnan(got), torch.isnan(want))
        integer = torch.int32 if dtype == FP32 else torch.int16
        assert torch.equal(*(t.nan_to_num(0.0).view(integer) for t in (got, want)))


@pytest.mark.parametrize("shape", [(3, 32), (33, 96), (70, 160), (17, 45), (1, 1)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_dequantize_bits(name, shape):
    same_bits(weight(*shape, name, block_size=32))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [64, 4096])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_dequantize_flat_blocks(name, block_size, double_quant):
    """More than one block of nested statistics, more than one block of the grid, odd tails."""
    same_bits(weight(131, 129, name, block_size, double_quant))


def test_dequantize_other_shapes():
    for shape in [(5,), (2, 3, 7)]:
        w = torch.randn(shape)
        same_bits(quantize(w, "nf4", 32))


def test_dequantize_every_code():
    codes = torch.arange(256, dtype=torch.uint8)
    scale = torch.tensor([0.37])
    for layout, packed in [
        (formats.INT8_ROW, codes.view(torch.int8)),
        (formats.FP8_ROW, codes.view(torch.float8_e4m3fn)),
    ]:
        kind = "int8" if layout == formats.INT8_ROW else "fp8"
        spec = replace(weight(1, 256, kind if kind == "int8" else "fp8_row").spec, layout=layout)
        same_bits(QuantTensor(spec, (packed.view(1, 256), scale)))
    for kind in ("nf4", "fp4"):
        q = weight(8, 64, kind, 64, False)
        same_bits(QuantTensor(q.spec, (codes, *q.parts[1:])))


@pytest.mark.parametrize("name", ["int4", "int4_v1"])
def test_dequantize_act_order(name):
    same_bits(shuffled_groups(weight(21, 150, name, 16)))


@pytest.mark.parametrize("name", FORMATS)
def test_dequantize_misaligned_parts(name):
    """Parts that are slices of a larger buffer, as those of a flattened parameter are."""
    q = weight(40, 96, name, 32)
    moved = []
    for t in q.parts:
        room = torch.empty(t.numel() + 1, dtype=t.dtype)
        moved.append(room[1:].view(t.shape).copy_(t))
    shifted = QuantTensor(q.spec, tuple(moved))
    same_bits(shifted)
    x = torch.randn(5, 96).to(BF16)
    want = quant_linear(x, q, backend="cuda")
    assert torch.equal(quant_linear(x, shifted, backend="cuda"), want)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_quantize_bytes(name, double_quant, dtype):
    """Zero blocks, ties, tails, more than one block of nested statistics."""
    torch.manual_seed(3)
    for shape, block in [((3, 11), 32), ((64, 65), 64), ((150, 131), 32), ((5, 4096), 4096)]:
        w = torch.randn(shape)
        w[0, :8] = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 1e-30, 3.0])
        w.view(-1)[32:64] = 0.0
        w[-1] *= 1e-20
        w = w.to(dtype)
        spec = quantize(
            w, name, None if name == "int8" else block, None if name == "int8" else double_quant
        ).spec
        got, want = cuda.quantize(w, spec), reference.quantize(w, spec)
        assert got is not None and len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
            assert not a.is_floating_point() or torch.equal(torch.signbit(a), torch.signbit(b))


def test_quantize_every_middle():
    """Elements on the middles between two codes, and their neighbours, in both directions."""
    for name in ("nf4", "fp4"):
        values = formats.code_table(name).sort().values
        middles = (values[:-1] + values[1:]) / 2
        up, down = (torch.nextafter(middles, torch.full_like(middles, s)) for s in (2.0, -2.0))
        w = torch.cat([torch.ones(1), middles, up, down, torch.zeros(18)]).view(1, 64)
        spec = quantize(w, name, 64, False).spec
        got, want = cuda.quantize(w, spec), reference.quantize(w, spec)
        assert got is not None and torch.equal(got[0], want[0])
    code = formats.dynamic_map()
    absmax = torch.cat([code, (code[:-1] + code[1:]) / 2, torch.tensor([1.0])])
    got = cuda._operator("quant_quantize_nested")(absmax, 256, code, torch.zeros(()), 1e-38)
    scaled = absmax * (1.0 / torch.tensor([1.0]))
    low = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2)
    assert torch.equal(got[0], low.to(torch.uint8))


@pytest.mark.parametrize("rows", [16, 32], ids=["few rows", "more rows"])
@pytest.mark.parametrize("name", FORMATS)
def test_identity_gives_the_weight(name, rows):
    """Each product has one term: whatever code, statistic or column is misplaced shows."""
    q = weight(150, 32 * 5, name, 32)
    w = reference.dequantize(q.parts, q.spec, BF16)
    for first in range(0, 160, rows):
        x = torch.eye(160, dtype=BF16)[first : first + rows]
        assert not cuda.skinny_reason(q.spec, rows)
        with poisoned_empty():
            got = quant_linear(x, q, backend="cuda")
        assert torch.equal(got, w.t()[first : first + rows])


@pytest.mark.parametrize("rows", [16, 32], ids=["few rows", "more rows"])
@pytest.mark.parametrize("name", FORMATS)
def test_identity_gives_the_rows_of_the_weight(name, rows):
    """dX of unit rows: whatever code, statistic or row is misplaced in the transposed product."""
    q = weight(75, 32 * 9, name, 32)
    w = reference.dequantize(q.parts, q.spec, BF16)
    for first in range(0, 75, rows):
        dy = torch.eye(75, dtype=BF16)[first : first + rows]
        with poisoned_empty():
            assert torch.equal(_dx(dy, q, None, None), w[first : first + rows])


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", CHECKED)
def test_products(name, dtype, emulator):
    block = {} if name in ("int8", "fp8_row", "fp8_tensor") else {"block_size": 32}
    check(5, 160, 70, 0, dtype, format=name, needs="", dll=emulator, seeds=SEEDS, **block)
    check(33, 96, 150, 0, dtype, format=name, needs="x", **block)


@pytest.mark.parametrize("M", [1, 7, 8, 9, 16, 17, 33, 65, 127, 128, 129])
def test_rows(M):
    check(M, 64, 40, 4, BF16, needs="")


@pytest.mark.parametrize("rank", [1, 5, 8, 24, 100])
def test_ranks(rank):
    check(6, 96, 70, rank, BF16, needs="xab")


@pytest.mark.parametrize("dropout_p", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("name", ["nf4", "int8", "int4"])
def test_adapter_and_dropout(name, dropout_p):
    check((2, 9), 160, 72, 8, FP16, format=name, dropout_p=dropout_p)


@pytest.mark.parametrize("adapter_dtype", [FP32, torch.float64], ids=str)
def test_wider_adapters(adapter_dtype):
    i = quant_linear_inputs(9, 64, 40, 8, BF16, adapter_dtype=adapter_dtype)
    check_quant_linear(i, "cuda", "xab")
    result = quant_linear_op(i, "cuda", "ab")
    assert {t.dtype for t in (*result.das, *result.dbs)} == {adapter_dtype}


@pytest.mark.parametrize("layout", ["sliced", "strided", "permuted", "misaligned"])
def test_layouts(layout):
    check(11, 64, 40, 5, BF16, layout=layout, needs="xab")


@pytest.mark.parametrize("K", [1, 2, 5, 7, 33, 45], ids=str)
def test_columns_that_are_dequantized_first(K):
    assert "no multiple of 32" in cuda.skinny_reason(weight(4, K, "nf4", 32).spec, 1)
    check(5, K, 24, 3, BF16)
    check(5, K, 24, 20, FP16)
    check(5, K, 24, 0, BF16, needs="x")


def test_act_order_is_dequantized_first():
    q = shuffled_groups(weight(24, 64, "int4", 32))
    assert cuda.skinny_reason(q.spec, 1) == "act-order groups"
    x = torch.eye(64, dtype=BF16)
    w = reference.dequantize(q.parts, q.spec, BF16)
    assert torch.equal(quant_linear(x, q, backend="cuda"), w.t())


@pytest.mark.parametrize("needs", ["x", "a", "b", "ab", "xb", "c"])
def test_subsets_of_gradients(needs):
    check(9, 64, 40, 8, BF16, needs=needs)


def _rows_alone(q: QuantTensor, x: Tensor, a: Tensor, b: Tensor, rows: int) -> list[Tensor]:
    """Y and S of `rows` rows at a time."""
    parts = [
        cuda.quant_linear_fwd(part, q.parts, q.spec, None, a, b, 0.5, 0.0, None)
        for part in x.split(rows)
    ]
    return [torch.cat(t) for t in zip(*parts, strict=True)]


def _dx(dy: Tensor, q: QuantTensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    x = None if a is None else dy.new_zeros(len(dy), q.spec.columns)
    s = dy.new_zeros(len(dy), 0 if a is None else len(a))
    needs = (True, False, False)
    return cuda.quant_linear_bwd(dy, x, q.parts, q.spec, a, b, s, 0.5, 0.0, None, *needs)[0]


@pytest.mark.parametrize("name", ["nf4", "int8", "int4", "int4_awq"])
@pytest.mark.parametrize(("most", "rows"), [(16, (1, 3, 9, 16)), (128, (17, 34, 64, 128))])
def test_rows_of_dx_do_not_depend_on_each_other(name, most, rows):
    """The sum over N is split between blocks here."""
    torch.manual_seed(0)
    q = weight(1050, 96, name, 32)
    dy = torch.randn(most, 1050).to(BF16)
    a, b = torch.randn(6, 96).to(BF16), torch.randn(1050, 6).to(BF16)
    whole = _dx(dy, q, a, b)
    for some in rows:
        count = most // some * some
        got = torch.cat([_dx(part, q, a, b) for part in dy[:count].split(some)])
        assert torch.equal(got, whole[:count]), some


def test_two_launches_with_an_adapter(emulator):
    """Blocks that ran: shares of the product and of U in one launch, 64 columns each in the other.
    fp32, strided and odd adapters are read as they are."""
    q = weight(200, 1056, "nf4", 32)
    x, dy = torch.randn(3, 1056).to(BF16), torch.randn(3, 200).to(BF16)
    for a, b in [
        (torch.randn(20, 1056), torch.randn(200, 20)),
        (torch.randn(1056, 5).t(), torch.randn(200, 10)[:, ::2]),
    ]:
        ranks = -(-len(a) // 16)
        before = emulator.lk_blocks_run()
        cuda.quant_linear_fwd(x, q.parts, q.spec, None, a, b, 0.5, 0.0, None)
        after = emulator.lk_blocks_run()
        shares = min(8 // (4 + ranks), 9 // 4) or 1
        assert after - before == shares * (4 + ranks) + 4
        _dx(dy, q, a, b)
        assert emulator.lk_blocks_run() - after == (5 + ranks) * 1 + 17


@pytest.mark.parametrize("name", ["nf4", "int8", "int4_awq"])
@pytest.mark.parametrize(("most", "rows"), [(16, (1, 3, 9, 16)), (128, (17, 34, 64, 128))])
def test_rows_do_not_depend_on_each_other(name, most, rows):
    """K is split between blocks here; the split must not depend on the rows either."""
    torch.manual_seed(0)
    q = weight(48, 1056, name, 32)
    x = torch.randn(most, 1056).to(BF16)
    a, b = torch.randn(6, 1056).to(BF16), torch.randn(48, 6).to(BF16)
    y, s = cuda.quant_linear_fwd(x, q.parts, q.spec, None, a, b, 0.5, 0.0, None)
    for some in rows:
        whole = most // some * some
        got = _rows_alone(q, x[:whole], a, b, some)
        assert torch.equal(got[0], y[:whole]) and torch.equal(got[1], s[:whole]), some


@pytest.mark.parametrize("name", ["nf4", "fp8_row", "int4"])
def test_same_bits_in_every_schedule(name, emulator):
    q = weight(80, 1056, name, 32)
    x = torch.randn(19, 1056).to(BF16)
    first = quant_linear(x, q, backend="cuda")
    for seed in SEEDS[1:]:
        emulator.lk_options(seed, 0, LARGE)
        assert torch.equal(quant_linear(x, q, backend="cuda"), first)


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("name", FORMATS)
def test_copies_stay_inside_their_tensors(name, rows, emulator):
    """Once inputs are registered, an asynchronous copy from anywhere else is an error."""
    q = weight(70, 160, name, 32)
    x, a = torch.randn(rows, 160).to(BF16), torch.randn(8, 160).to(BF16)
    b = torch.randn(70, 8).to(BF16)
    want = reference.quant_linear_fwd(x, q.parts, q.spec, None, a, b, 1.0, 0.0, None)[0]
    for t in (x, a, *q.parts):
        emulator.lk_register_memory(t.data_ptr(), t.nbytes)
    try:
        got = cuda.quant_linear_fwd(x, q.parts, q.spec, None, a, b, 1.0, 0.0, None)[0]
        with pytest.raises(RuntimeError, match="skinny_gemm: error"):
            cuda.quant_linear_fwd(x.clone(), q.parts, q.spec, None, None, None, 1.0, 0.0, None)
    finally:
        emulator.lk_clear_memory()
    assert got.shape == want.shape and bool(got.isfinite().all())


@pytest.mark.parametrize("name", FORMATS)
def test_copies_for_dx_stay_inside_their_tensors(name, emulator):
    q = weight(72, 160, name, 32)
    dy, a = torch.randn(20, 72).to(BF16), torch.randn(8, 160).to(BF16)
    b = torch.randn(72, 8).to(BF16)
    for t in (dy, b, *q.parts):
        emulator.lk_register_memory(t.data_ptr(), t.nbytes)
    try:
        got = _dx(dy, q, a, b)
        with pytest.raises(RuntimeError, match="skinny_dgrad: error"):
            _dx(dy.clone(), q, None, None)
    finally:
        emulator.lk_clear_memory()
    assert bool(got.isfinite().all())


@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_planted_in_dx_are_found(fault, rows, emulator):
    inputs = quant_linear_inputs(rows, 96, 1060, 8, BF16, dropout_p=0.25)

    def check_dx() -> None:
        dx = quant_linear_op(inputs, "cuda", "x").dx
        emulator.lk_options(0, 0, LARGE)  # the forward has a test of its own
        got = replace(quant_linear_op(inputs, "cuda", ""), dx=dx)
        oracle = lora_linear_results(inputs.dense, torch.float64, needs="x")
        compare(got, oracle, yardstick(inputs.dense, oracle, "x"), "dx: ")

    check_dx()
    for seed in SEEDS:
        emulator.lk_options(seed, FAULTS[fault], LARGE)
        with pytest.raises(BudgetExceededError):
            check_dx()


@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, rows, emulator):
    inputs = quant_linear_inputs(rows, 1056, 70, 8, BF16, dropout_p=0.25)
    check_quant_linear(inputs, "cuda", "")
    for seed in SEEDS:
        emulator.lk_options(seed, FAULTS[fault], LARGE)
        with pytest.raises(BudgetExceededError):
            check_quant_linear(inputs, "cuda", "")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_random_problems(seed, emulator):
    draw = random.Random(seed)
    emulator.lk_options(seed, 0, draw.choice([LARGE, 99 << 10]))
    for _ in range(5):
        name = draw.choice(CHECKED)
        sizes = {"nf4": (32, 64, 256), "fp4": (32, 128), "fp8_block": (32, 48, 128)}
        sizes |= dict.fromkeys(("int4", "int4_awq"), (16, 32, 40, 128, -1))
        block = {"block_size": draw.choice(sizes[name])} if name in sizes else {}
        check_quant_linear(
            quant_linear_inputs(
                draw.choice([1, 2, 3, 8, 9, 15, 16, 17, 31, 40, 64, 65, 100, 128, 130]),
                draw.choice([8, 31, 32, 64, 96, 160, 256, 288, 512, 1056]),
                draw.choice([1, 2, 7, 9, 15, 16, 17, 63, 65, 100, 129, 200]),
                draw.choice([0, 1, 3, 8, 20, 64]), draw.choice([BF16, FP16]), format=name,
                dropout_p=draw.choice([0.0, 0.3]), **block,
            ),
            "cuda", draw.choice(["", "x", "xab"]),
        )  # fmt: skip


@pytest.mark.parametrize("what", ["scaling", "adapter", "offset"])
def test_a_wrong_entry_is_noticed(what, monkeypatch):
    """The control: another scaling, no adapter, other statistics must exceed the budget."""
    right = cuda._operator("quant_linear_fwd")

    def wrong(x, parts, *rest):
        rest = list(rest)
        if what == "scaling":
            rest[9] *= 1.1
        elif what == "adapter":
            rest[8] = torch.zeros_like(rest[8])
        else:
            parts = [*parts[:5], parts[5] * 1.1]
        return right(x, parts, *rest)

    monkeypatch.setattr(cuda, "_operator", lambda _: wrong)
    with pytest.raises(BudgetExceededError):
        check(9, 128, 40, 8, BF16, needs="")


def test_devices_with_little_shared_memory(emulator):
    emulator.lk_options(0, 0, 99 << 10)
    for name in ("nf4", "int8", "int4"):
        x, q = torch.eye(64, dtype=BF16), weight(40, 64, name, 32)
        w = reference.dequantize(q.parts, q.spec, BF16)
        assert torch.equal(quant_linear(x, q, backend="cuda"), w.t())


def test_reads_of_x_have_no_bank_conflicts():
    """The offsets of skinny_gemm.cuh in Python: eight lanes, eight different 16-byte banks."""
    for pair in range(4):
        for phase in range(4):
            banks = set()
            for lane in range(8 * phase, 8 * phase + 8):
                row, chunk = lane // 4, 4 * (lane % 4) + pair
                banks.add((16 * row + (chunk ^ (chunk >> 3 | (row & 1) << 1))) % 8)
            assert len(banks) == 8


def test_what_the_entry_refuses(emulator):
    q, x = weight(24, 64, "nf4", 32), torch.zeros(3, 64, dtype=BF16)
    entry = cuda._operator("quant_linear_fwd")
    good = [x, *cuda._weight(q.parts, q.spec), None, None, None, 1.0, 1.0, 0, None]

    def refused(position: int, value: object, message: str) -> None:
        changed = [*good[:position], value, *good[position + 1 :]]
        with pytest.raises(RuntimeError, match=message):
            entry(*changed)

    entry(*good)
    refused(0, torch.zeros(3, 32, dtype=BF16), "another number of columns")
    refused(0, torch.zeros(129, 64, dtype=BF16), r"rows are not in 0\.\.128")
    refused(0, x.float(), "dtype is not supported")
    refused(1, list(q.parts[:2]), "parts are missing")
    refused(1, [q.parts[0][:-1], *q.parts[1:]], "another shape")
    refused(1, [q.parts[0], q.parts[1].float(), *q.parts[2:]], "another dtype")
    refused(2, "gguf", "layout 'gguf' is unknown")
    refused(5, 48, "no power of two")
    refused(8, torch.zeros(23), "the bias has another length")
    refused(9, torch.zeros(4, 64, dtype=BF16), "one of lora_a and lora_b is missing")
    with pytest.raises(RuntimeError, match="dtype is not 0, 1 or 2"):
        cuda._operator("quant_dequantize")(*cuda._weight(q.parts, q.spec), 3)
