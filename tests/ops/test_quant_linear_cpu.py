"""The compiled kernels of quantized weights: every instruction set, format and number of rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lora_kernels._backends import cpu as library_loader
from lora_kernels.ops.quant_linear import reference
from lora_kernels.ops.quant_linear.formats import QuantSpec
from lora_kernels.ops.quant_linear.problem import QuantLinearProblem
from lora_kernels.testing import BudgetExceededError, assert_within_budget

library, reason = library_loader.load()
if library is not None and not hasattr(library, "quant_linear_bwd"):
    library, reason = None, "lora_kernels._C was built without quant_linear"
pytestmark = pytest.mark.skipif(library is None, reason=reason)
if library is not None:
    from lora_kernels.ops.quant_linear import cpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (*range(1, 34), 64, 127, 128, 513)
# format, layout, N, K, block, nested block, act-order
WEIGHTS = {
    "nf4": ("nf4", "flat", 65, 192, 64, 0, False),
    "nf4 nested": ("nf4", "flat", 33, 320, 64, 256, False),
    "nf4 blocks of 32, nested": ("nf4", "flat", 34, 192, 32, 256, False),
    "nf4 large blocks": ("nf4", "flat", 48, 512, 256, 256, False),
    "nf4 straddling blocks": ("nf4", "flat", 31, 192, 128, 256, False),
    "nf4 ragged": ("nf4", "flat", 37, 100, 64, 256, False),
    "fp4 odd": ("fp4", "flat", 17, 77, 64, 0, False),
    "int8": ("int8", "int8_row", 33, 192, 64, 0, False),
    "int8 ragged": ("int8", "int8_row", 40, 131, 64, 0, False),
    "gptq": ("int4", "gptq", 48, 256, 128, 0, False),
    "gptq first version, ragged": ("int4", "gptq_v1", 49, 200, 32, 0, False),
    "gptq act-order": ("int4", "gptq", 40, 192, 64, 0, True),
    "gptq groups of 32": ("int4", "gptq", 35, 192, 32, 0, False),
    "gptq act-order, ragged": ("int4", "gptq", 33, 150, 64, 0, True),
    "gptq one group": ("int4", "gptq", 33, 136, 136, 0, False),
    "awq": ("int4", "awq", 41, 192, 64, 0, False),
    "fp8 rows": ("fp8", "fp8_row", 33, 70, 64, 0, False),
    "fp8 tensor": ("fp8", "fp8_tensor", 32, 128, 64, 0, False),
    "fp8 squares": ("fp8", "fp8_block", 130, 150, 128, 0, False),
    "fp8 squares of 64": ("fp8", "fp8_block", 70, 200, 64, 0, False),
}
Parts = tuple[Tensor, ...]


def make(name: str) -> tuple[QuantSpec, Parts]:
    fmt, layout, n, k, block, nested, act_order = WEIGHTS[name]
    spec = QuantSpec(fmt, layout, (n, k), torch.float32, block, nested)
    parts = reference.quantize(torch.randn(n, k), spec)
    if act_order:
        *rest, groups = parts
        parts = (*rest, groups[torch.randperm(k)].contiguous())
        spec = replace(spec, act_order=True)
    return spec, parts


def operands(spec: QuantSpec, m: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, dy, bias, A, B; the low-rank term is as large as the base term."""
    n, k = spec.shape
    scale = 1.0 / max(1, rank) ** 0.5
    return (
        torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype), torch.randn(n).to(dtype),
        torch.randn(rank, k).to(dtype), (scale * torch.randn(n, rank)).to(dtype),
    )  # fmt: skip


def plain(x: Tensor, parts: Parts, spec: QuantSpec, bias: Tensor | None = None) -> Tensor:
    return cpu.quant_linear_fwd(x, parts, spec, bias, None, None, 0.0, 0.0, None)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_dequantize_and_identity(isa, weight, dtype):
    spec, parts = make(weight)
    w = reference.dequantize(parts, spec, dtype)
    assert torch.equal(cpu.dequantize(parts, spec, dtype), w)
    assert torch.equal(plain(torch.eye(spec.columns, dtype=dtype), parts, spec), w.t())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_fp8_code(isa, dtype):
    spec = QuantSpec("fp8", "fp8_tensor", (4, 64), torch.float32, 64, 0)
    _, *scales = reference.quantize(torch.ones(4, 64), spec)
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(4, 64)
    got = cpu.dequantize((codes, *scales), spec, dtype)
    want = reference.dequantize((codes, *scales), spec, dtype)
    assert want.isnan().sum() == 2
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(0.0), want.nan_to_num(0.0))
    finite = torch.where(want.isnan(), 0, codes.view(torch.uint8)).view(torch.float8_e4m3fn)
    y = plain(torch.eye(64, dtype=dtype), (finite, *scales), spec)
    assert torch.equal(y, reference.dequantize((finite, *scales), spec, dtype).t())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 70])
def test_an_fp8_nan_reaches_its_results_alone(isa, m, dtype):
    spec, (codes, scale) = make("fp8 squares")
    x = 1.0 + torch.rand(m, spec.columns).to(dtype)
    before = plain(x, (codes, scale), spec)
    for column, code in ((3, 0x7F), (149, 0xFF)):
        bad = codes.view(torch.uint8).clone()
        bad[129, column] = code
        y = plain(x, (bad.view(torch.float8_e4m3fn), scale), spec)
        assert y[:, 129].isnan().all()
        assert torch.equal(y[:, :129], before[:, :129])


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("uneven", [False, True])
def test_act_order_of_equal_and_of_unequal_groups(isa, uneven, dropout_p):
    """Sorted by group where the groups are whole, as they came where they are not."""
    spec, parts = make("gptq act-order")
    if uneven:
        groups = parts[3].clone()
        groups[groups == 1] = 2
        groups[7] = 1
        parts = (*parts[:3], groups)
    for dtype in DTYPES:
        x, _, bias, a, b = operands(spec, 5, 4, dtype)
        seed = torch.tensor([9]) if dropout_p else None
        tail = (bias, a, b, 0.7, dropout_p, seed)
        w = reference.dequantize(parts, spec, dtype)
        assert torch.equal(cpu.dequantize(parts, spec, dtype), w)
        y, s = cpu.quant_linear_fwd(x, parts, spec, *tail)
        wide = (t.double() for t in (x, w, bias, a, b))
        y64, s64 = _oracle_fwd(*wide, *tail[3:])
        low_y, low_s = reference.quant_linear_fwd(x, parts, spec, *tail)
        assert_within_budget(y, y64, low_y, "y")
        assert_within_budget(s, s64, low_s, "s")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["flat", "int8_row"])
def test_quantize_gives_the_bytes_of_the_reference(isa, layout, dtype):
    for n, k, block, nested in (
        (65, 192, 64, 0), (37, 101, 64, 256), (3, 5, 32, 256), (9, 4097, 4096, 256), (40, 96, 32, 0)
    ):  # fmt: skip
        w = torch.randn(n, k).to(dtype)
        w[1] = 0.0
        w[0, :2] = torch.tensor([1e-30, -3e4])
        formats = ("nf4", "fp4") if layout == "flat" else ("int8",)
        for fmt in formats:
            spec = QuantSpec(fmt, layout, (n, k), torch.float32, block, nested)
            made, want = cpu.quantize(w, spec), reference.quantize(w, spec)
            assert len(made) == len(want)
            assert all(torch.equal(a, b) for a, b in zip(made, want, strict=True)), (fmt, n, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_every_number_of_rows(isa, weight, dtype):
    """The fp64 oracle for 513 rows, and the same bits for each number of rows below."""
    spec, parts = make(weight)
    x, _, bias, a, b = operands(spec, max(ROWS), 5, dtype)
    args = (parts, spec, bias, a, b, 0.7, 0.0, None)
    y, s = cpu.quant_linear_fwd(x, *args)
    w = reference.dequantize(parts, spec, dtype)
    d = torch.Tensor.double
    s64 = d(x) @ d(a).t()
    y64 = d(x) @ d(w).t() + 0.7 * s64 @ d(b).t() + d(bias)
    low_y, low_s = reference.quant_linear_fwd(x, *args)
    assert_within_budget(y, y64, low_y, "y")
    assert_within_budget(s, s64, low_s, "s")
    for m in ROWS:
        part, s_part = cpu.quant_linear_fwd(x[:m], *args)
        assert torch.equal(part, y[:m]), m
        assert torch.equal(s_part, s[:m]), m
    assert torch.equal(plain(x[100:103], parts, spec), plain(x, parts, spec)[100:103])


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", ["nf4 nested", "nf4 ragged", "int8", "gptq", "fp8 squares"])
def test_forward_and_gradients(isa, weight, dtype, dropout_p):
    spec, parts = make(weight)
    for m, rank in ((1, 3), (70, 16), (33, 40)):
        x, dy, bias, a, b = operands(spec, m, rank, dtype)
        seed = torch.tensor([11]) if dropout_p else None
        tail = (a, b, 0.6, dropout_p, seed)
        y, s = cpu.quant_linear_fwd(x, parts, spec, bias, *tail)
        w = reference.dequantize(parts, spec, dtype).double()
        wide = tuple(t.double() for t in (a, b))
        y64, s64 = _oracle_fwd(x.double(), w, bias.double(), *wide, 0.6, dropout_p, seed)
        low_y, low_s = reference.quant_linear_fwd(x, parts, spec, bias, *tail)
        assert_within_budget(y, y64, low_y, "y")
        assert_within_budget(s, s64, low_s, "s")
        got = cpu.quant_linear_bwd(dy, x, parts, spec, a, b, s, 0.6, dropout_p, seed, *[True] * 3)
        low = reference.quant_linear_bwd(
            dy, x, parts, spec, a, b, s, 0.6, dropout_p, seed, True, True, True
        )
        want = _oracle_bwd(dy.double(), x.double(), w, *wide, s.double(), 0.6, dropout_p, seed)
        for name, g, v, plainly in zip(("dx", "da", "db"), got, want, low, strict=True):
            assert_within_budget(g, v, plainly, name)


def _dropped(t: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    from lora_kernels.ops._philox import drop, keep_scale

    return t if seed is None else drop(t, seed, dropout_p) * keep_scale(dropout_p)


def _oracle_fwd(x, w, bias, a, b, scaling, dropout_p, seed):
    s = _dropped(x, dropout_p, seed) @ a.t()
    return x @ w.t() + scaling * s @ b.t() + bias, s


def _oracle_bwd(dy, x, w, a, b, s, scaling, dropout_p, seed):
    ds = scaling * dy @ b
    dx = dy @ w + _dropped(ds @ a, dropout_p, seed)
    return dx, ds.t() @ _dropped(x, dropout_p, seed), scaling * dy.t() @ s


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    "weight",
    [
        ("nf4", "flat", 611, 1216, 64, 256, False),
        ("int8", "int8_row", 590, 1229, 64, 0, False),
        ("int4", "gptq", 611, 1152, 128, 0, False),
        ("int4", "awq", 97, 1176, 56, 0, False),
        ("fp8", "fp8_row", 594, 1216, 64, 0, False),
    ],
    ids=lambda weight: weight[1],
)
def test_long_rows_in_blocks(isa, weight, dropout_p):
    """Several blocks and panels in both directions, more rows than one chunk."""
    fmt, layout, n, k, block, nested, _ = weight
    spec = QuantSpec(fmt, layout, (n, k), torch.float32, block, nested)
    parts = reference.quantize(torch.randn(spec.shape), spec)
    x, dy, bias, a, b = operands(spec, 600, 40, torch.bfloat16)
    seed = torch.tensor([3]) if dropout_p else None
    tail = (0.5, dropout_p, seed)
    y, s = cpu.quant_linear_fwd(x, parts, spec, bias, a, b, *tail)
    w = reference.dequantize(parts, spec, torch.bfloat16).double()
    x64, dy64, bias64, a64, b64, s64 = (t.double() for t in (x, dy, bias, a, b, s))
    y64, _ = _oracle_fwd(x64, w, bias64, a64, b64, *tail)
    low, _ = reference.quant_linear_fwd(x, parts, spec, bias, a, b, *tail)
    assert_within_budget(y, y64, low, "y")
    flags = (True, False, False)
    dx, _, _ = cpu.quant_linear_bwd(dy, None, parts, spec, a, b, s, *tail, *flags)
    low_dx, _, _ = reference.quant_linear_bwd(dy, x, parts, spec, a, b, s, *tail, *flags)
    dx64, _, _ = _oracle_bwd(dy64, x64, w, a64, b64, s64, *tail)
    assert_within_budget(dx, dx64, low_dx, "dx")


@pytest.mark.parametrize("weight", ["nf4 nested", "int8 ragged", "awq", "fp8 squares"])
def test_bitwise_equal_from_run_to_run_and_for_any_threads(isa, threads, weight):
    spec, parts = make(weight)
    x, dy, bias, a, b = operands(spec, 150, 8, torch.bfloat16)
    seed = torch.tensor([3])
    results = []
    for count in (1, 2, 2, 3):
        torch.set_num_threads(count)
        y, s = cpu.quant_linear_fwd(x, parts, spec, bias, a, b, 0.6, 0.2, seed)
        dx, _, _ = cpu.quant_linear_bwd(
            dy, x, parts, spec, a, b, s, 0.6, 0.2, seed, True, False, False
        )
        results.append((y, s, dx))
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


def test_strided_operands_and_wide_adapters(isa):
    spec, parts = make("nf4")
    n, k = spec.shape
    x, dy, _, a, b = operands(spec, 40, 6, torch.bfloat16)
    y, s = cpu.quant_linear_fwd(x, parts, spec, None, a, b, 0.6, 0.0, None)
    apart = torch.full((40, k + 9), float("nan"), dtype=x.dtype)
    apart[:, 3 : k + 3] = x
    columns = x.t().contiguous().t()
    turned = b.t().contiguous().t()
    for given, b_given in ((apart[:, 3 : k + 3], b), (columns, turned)):
        again = cpu.quant_linear_fwd(given, parts, spec, None, a, b_given, 0.6, 0.0, None)
        assert torch.equal(again[0], y) and torch.equal(again[1], s)
    wide = cpu.quant_linear_fwd(x, parts, spec, None, a.float(), b.float(), 0.6, 0.0, None)
    assert torch.equal(wide[0], y)
    _, da, db = cpu.quant_linear_bwd(
        dy, x, parts, spec, a.float(), b.float(), s, 0.6, 0.0, None, False, True, True
    )
    assert da.dtype == db.dtype == torch.float32 and da.shape == a.shape and db.shape == (n, 6)


def test_dequantize_into_a_tensor_and_past_the_cache(isa):
    spec = QuantSpec("nf4", "flat", (1031, 1088), torch.float32, 64, 256)
    parts = reference.quantize(torch.randn(spec.shape), spec)
    for dtype in DTYPES:
        out = torch.full(spec.shape, float("nan"), dtype=dtype)
        assert cpu.dequantize(parts, spec, dtype, out).data_ptr() == out.data_ptr()
        assert torch.equal(out, reference.dequantize(parts, spec, dtype))


def test_an_int4_copy_follows_its_weight():
    cpu.clear()
    spec, parts = make("gptq")
    x = torch.randn(3, spec.columns)
    first = plain(x, parts, spec)
    kept = cpu.repacked_bytes()
    assert kept >= parts[0].nbytes
    assert torch.equal(plain(x, parts, spec), first) and cpu.repacked_bytes() == kept
    parts[2].mul_(2.0)
    assert torch.equal(plain(x, parts, spec), 2.0 * first)
    del parts
    assert cpu.repacked_bytes() == 0


def test_auto_leaves_many_rows_to_the_library_where_there_are_no_tiles(isa):
    for m, few in ((0, True), (1, True), (16, True), (513, False)):
        problem = QuantLinearProblem.from_shapes(M=m, K=64, N=64, dtype=torch.bfloat16)
        able, why = cpu.preferred(problem)
        assert cpu.supports(problem)[0]
        assert able == (few or isa == "amx"), why
        assert why and (able or "rows" in why)


@pytest.mark.parametrize("fmt, layout", [("nf4", "flat"), ("int8", "int8_row")])
def test_large_weights_moved_to_large_pages_keep_their_bytes(fmt, layout):
    """A backward of many rows may move the pages of the codes."""
    columns = 4096 if fmt == "nf4" else 2048
    spec = QuantSpec(fmt, layout, (2176, columns), torch.float32, 64, 0)
    parts = cpu.quantize(torch.randn(spec.shape), spec)
    before = [p.clone() for p in parts]
    x, dy = torch.randn(70, columns).bfloat16(), torch.randn(70, 2176).bfloat16()
    y = plain(x, parts, spec)
    tail = (None, None, x.new_empty(70, 0), 0.0, 0.0, None, True, False, False)
    dx = cpu.quant_linear_bwd(dy, None, parts, spec, *tail)[0]
    assert all(torch.equal(p, q) for p, q in zip(parts, before, strict=True))
    assert torch.equal(plain(x, parts, spec), y)
    wide = reference.dequantize(before, spec, torch.bfloat16)
    assert_within_budget(dx, dy.double() @ wide.double(), dy @ wide, "dx")


def test_bad_parts_raise(isa):
    spec, parts = make("nf4 nested")
    x = torch.randn(2, spec.columns)
    with pytest.raises(RuntimeError, match="part absmax"):
        plain(x, (parts[0], parts[1][:-1], *parts[2:]), spec)
    with pytest.raises(RuntimeError, match="accepted: 6"):
        plain(x, parts[:3], spec)
    with pytest.raises(RuntimeError, match="x is"):
        plain(x[:, 1:], parts, spec)
    spec, parts = make("gptq act-order")
    wrong = parts[3].clone()
    wrong[5] = 3
    with pytest.raises(RuntimeError, match="g_idx holds 3 at 5"):
        plain(torch.randn(2, spec.columns), (*parts[:3], wrong), spec)


def _swap_nibbles(parts: Parts) -> Parts:
    p = parts[0]
    return ((p >> 4) | (p << 4), *parts[1:])


MISTAKES = {
    "nibbles swapped": lambda parts, spec, x, tail: (_swap_nibbles(parts), spec, x, tail),
    "scales of the next block": lambda parts, spec, x, tail: (
        (parts[0], parts[1].roll(1), *parts[2:]), spec, x, tail
    ),
    "one code off": lambda parts, spec, x, tail: (
        (torch.cat([parts[0][:-1], parts[0][-1:] ^ 0x80]), *parts[1:]), spec, x, tail
    ),
    "offset of the statistics dropped": lambda parts, spec, x, tail: (
        (*parts[:5], torch.zeros(())), spec, x, tail
    ),
    "another table": lambda parts, spec, x, tail: (
        (*parts[:2], parts[2].flip(0), *parts[3:]), spec, x, tail
    ),
    "low-rank term dropped": lambda parts, spec, x, tail: (
        parts, spec, x, (*tail[:3], 0.0, *tail[4:])
    ),
    "scaling off by 5 %": lambda parts, spec, x, tail: (
        parts, spec, x, (*tail[:3], 1.05 * tail[3], *tail[4:])
    ),
    "another dropout mask": lambda parts, spec, x, tail: (
        parts, spec, x, (*tail[:5], tail[5] + 1)
    ),
    "bias dropped": lambda parts, spec, x, tail: (parts, spec, x, (None, *tail[1:])),
    "last column of x left out": lambda parts, spec, x, tail: (
        parts, spec, torch.cat([x[:, :-1], torch.zeros_like(x[:, -1:])], 1), tail
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_planted_mistakes_break_the_budget(isa, mistake):
    spec, parts = make("nf4 nested")
    dtype = torch.bfloat16
    x, _, bias, a, b = operands(spec, 40, 8, dtype)
    tail = (bias, a, b, 0.7, 0.2, torch.tensor([5]))
    w = reference.dequantize(parts, spec, dtype).double()
    y64, _ = _oracle_fwd(x.double(), w, bias.double(), a.double(), b.double(), *tail[3:])
    low, _ = reference.quant_linear_fwd(x, parts, spec, *tail)
    if mistake is not None:
        parts, spec, x, tail = MISTAKES[mistake](parts, spec, x, tail)
    y, _ = cpu.quant_linear_fwd(x, parts, spec, *tail)
    if mistake is None:
        assert_within_budget(y, y64, low, "y")
        return
    with pytest.raises(BudgetExceededError):
        assert_within_budget(y, y64, low, "y")
