"""quant_linear's Triton kernels in the interpreter: bytes of the formats, and the linear layer
against the fp64 oracle on the dequantized weight.

Not collected by itself: the interpreter holds for a whole process, so suite_runner.py runs this
file in a process of its own with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from lora_kernels._backends import triton_interpreter
from lora_kernels.errors import BackendUnavailableError
from lora_kernels.ops import quant_linear, quantize
from lora_kernels.ops.quant_linear import (
    QuantTensor,
    configs,
    formats,
    reference,
    triton_decode,
    triton_gemm,
)
from lora_kernels.ops.quant_linear import triton as host
from lora_kernels.ops.quant_linear.problem import FORMAT_NAMES, QuantLinearProblem, supports
from lora_kernels.testing import (
    BudgetExceededError,
    QuantLinearInputs,
    check_quant_linear,
    poisoned_empty,
    quant_linear_inputs,
)

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
TELLING_M = (1, 17, 127)
EVERY_M = (*range(1, 34), 64, 127, 128, 513)


def check(*args, needs: str = "xabc", **kwargs) -> QuantLinearInputs:
    inputs = quant_linear_inputs(*args, **kwargs)
    with poisoned_empty():
        check_quant_linear(inputs, "triton", needs)
    return inputs


def with_act_order(q: QuantTensor) -> QuantTensor:
    """The same codes with groups in another order along k."""
    parts = q.named_parts()
    shuffled = parts["g_idx"][torch.randperm(q.shape[1])]
    spec = replace(q.spec, act_order=True)
    return QuantTensor(spec, {**parts, "g_idx": shuffled.contiguous()})


def with_layout(q: QuantTensor, layout: str) -> QuantTensor:
    return QuantTensor(replace(q.spec, layout=layout), q.parts)


# Formats. Equality of bytes, nothing less.


def assert_bytes(q: QuantTensor, dtype: torch.dtype) -> None:
    with poisoned_empty():
        w = host.dequantize(q.parts, q.spec, dtype)
    want = reference.dequantize(q.parts, q.spec, dtype)
    assert w.dtype == dtype and w.shape == want.shape and w.is_contiguous()
    assert torch.equal(w, want)


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_dequantize_gives_the_bytes_of_the_reference(format):
    for shape, dtype in (((64, 128), BF16), ((33, 50), FP32), ((5, 7), FP16), ((5, 7), FP64)):
        assert_bytes(quantize(torch.randn(shape), format), dtype)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (257, 130), (40, 96), (8, 4096)])
def test_flat_blocks_of_every_kind(shape, block_size, double_quant):
    """Odd tails, blocks that straddle rows, tensors of any shape."""
    assert_bytes(quantize(torch.randn(shape), "nf4", block_size, double_quant), BF16)


@pytest.mark.parametrize("block_size", [1, 24, 32, 64, -1])
def test_int4_groups_orders_and_both_versions(block_size):
    for shape in ((24, 64), (19, 75)):
        q = quantize(torch.randn(shape), "int4", block_size)
        assert_bytes(q, BF16)
        assert_bytes(with_layout(q, formats.GPTQ_V1), BF16)
        assert_bytes(with_act_order(q), BF16)
        assert_bytes(quantize(torch.randn(shape), "int4_awq", block_size), BF16)


def test_every_byte_of_fp8():
    packed = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(4, 64)
    spec = quantize(torch.randn(4, 64), "fp8_row").spec
    w = host.dequantize((packed, torch.full((4,), 0.75)), spec, FP32)
    want = reference.dequantize((packed, torch.full((4,), 0.75)), spec, FP32)
    assert torch.equal(w.nan_to_num(7.0), want.nan_to_num(7.0)) and int(w.isnan().sum()) == 2


def test_fp8_squares_that_no_tile_fits():
    for side in (32, 40, 128):
        assert_bytes(quantize(torch.randn(100, 130), "fp8_block", side), BF16)


QUANTIZED = ("nf4", "fp4", "int8", "fp8_row")


@pytest.mark.parametrize("format", QUANTIZED)
def test_quantize_gives_the_bytes_of_the_reference(format):
    cases = (
        ((20, 96), None, FP32), ((7, 131), None, FP16),
        ((9, 64), 32, FP64), ((3, 1500), 4096, BF16),
    )  # fmt: skip
    for shape, block, dtype in cases:
        w = torch.randn(shape).to(dtype)
        spec = quantize(w, format, block if format in ("nf4", "fp4") else None).spec
        for each in (spec, replace(spec, nested_block_size=0)):
            same_parts(host.quantize(w, each), reference.quantize(w, each))


def same_parts(got, want) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        same = (t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in (a, b))
        assert torch.equal(*same)


@pytest.mark.parametrize("format", QUANTIZED)
def test_quantize_at_the_edges(format):
    """Ties between neighbouring codes, zero blocks, subnormal and huge values."""
    rows = torch.zeros(6, 64)
    if format in ("nf4", "fp4"):
        code = formats.code_table(format).sort().values
        rows[0, :16], rows[0, 16:31] = code, (code[:-1] + code[1:]) / 2
        rows[1] = -rows[0]
    else:
        rows[0] = torch.arange(64) / 2 - 16
        rows[1] = torch.linspace(-2, 2, 64).exp2() * 2.0**-9
    rows[2] = torch.randn(64) * 1e-40
    rows[3] = torch.randn(64) * 1e-30
    rows[4] = torch.randn(64) * 1e35
    spec = quantize(rows, format).spec
    same_parts(host.quantize(rows, spec), reference.quantize(rows, spec))


def test_what_has_no_quantization_kernel_says_so():
    for format in ("int4", "int4_awq", "fp8_tensor", "fp8_block"):
        q = quantize(torch.randn(8, 64), format)
        assert host.quantize(torch.randn(8, 64), q.spec) is None
    assert host.quantize(torch.empty(0, 64), quantize(torch.empty(0, 64)).spec) is None


# The linear layer.


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_formats(format):
    check(5, 96, 72, 5, BF16, format=format, dropout_p=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_formats_and_dtypes(format, dtype, rank):
    check((2, 5), 72, 35, rank, dtype, format=format)
    check(9, 257, 130, rank, dtype, format=format)


@pytest.mark.parametrize("m", TELLING_M)
def test_numbers_of_rows(m):
    check(m, 64, 72, 4, BF16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("format", ["nf4", "int8", "int4", "fp8_block"])
def test_every_number_of_rows(format, dtype):
    for m in EVERY_M:
        check(m, 64, 33, 4, dtype, format=format)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_more_rows_are_dequantized(dropout_p, monkeypatch):
    calls = []
    real = host.dequantize
    monkeypatch.setattr(host, "dequantize", lambda *a: calls.append(a) or real(*a))
    check(130, 70, 40, 5, BF16, dropout_p=dropout_p)
    check(130, 70, 40, 0, BF16, needs="x")
    assert len(calls) == 4


@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 31), (130, 65)])
def test_odd_shapes(n, k):
    for format in ("nf4", "int4", "int4_awq"):
        check(3, k, n, 2, FP32, format=format)


@pytest.mark.parametrize("rank", [1, 40, 130])
def test_ranks_and_wider_adapters(rank):
    check(19, 72, 35, rank, BF16, adapter_dtype=FP32, dropout_p=0.1)


@pytest.mark.parametrize("layout", ["permuted", "misaligned"])
def test_layouts(layout):
    check(9, 72, 35, 5, FP16, layout=layout, dropout_p=0.3)


@pytest.mark.parametrize("needs", ["x", "a", "b", ""])
def test_only_what_is_needed(needs):
    check(5, 72, 35, 5, FP32, needs=needs)


@pytest.mark.parametrize("format", ["int4", "nf4"])
def test_groups_that_straddle(format):
    i = quant_linear_inputs(9, 130, 35, 5, BF16, format=format, block_size=32)
    if format == "int4":
        q = with_act_order(i.q)
        dense = replace(i.dense, weights=[reference.dequantize(q.parts, q.spec, BF16)])
        i = QuantLinearInputs(q, dense, True)
    check_quant_linear(i, "triton")


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_identity_input_gives_the_weight(format):
    """One term of each sum is not zero, so the result is the dequantized weight exactly."""
    q = quantize(torch.randn(40, 96), format)
    want = reference.dequantize(q.parts, q.spec, BF16)
    eye = torch.eye(96, dtype=BF16)
    assert torch.equal(quant_linear(eye, q, backend="triton").t(), want)
    x = torch.zeros(40, 96, dtype=BF16, requires_grad=True)
    quant_linear(x, q, backend="triton").backward(torch.eye(40, dtype=BF16))
    assert torch.equal(x.grad, want)


def test_large_scalings_of_fp16_stay_finite():
    """s S leaves the range of fp16: it is the finished update that is scaled."""
    i = quant_linear_inputs(9, 64, 48, 4, FP16, scaling=3000.0, bias=False)
    d = i.dense
    y, s = host.quant_linear_fwd(
        64 * d.x, i.q.parts, i.q.spec, None, d.lora_as[0], d.lora_bs[0] / 64, 3000.0, 0.0, None
    )
    assert (3000.0 * s.double()).abs().max() > 65504
    assert y.isfinite().all()


def test_splits_change_rounding_only():
    for splits in (1, 3):
        with configs.forced(walk=configs.Walk(64, 64, splits)):
            check(9, 832, 40, 5, BF16, needs="")
    with configs.forced(walk=configs.Walk(32, 32, 3)):
        check(9, 70, 400, 5, BF16, needs="x")


def test_tiles_of_the_batch_change_nothing():
    """Steps in flight and rows per program are no part of the result."""
    i = quant_linear_inputs(20, 200, 40, 5, FP32)
    d = i.dense

    def run(rows: int, ahead: int):
        with ordered_sums(), configs.forced(launch=configs.Launch(rows, 4, ahead)):
            return host.quant_linear_fwd(
                d.x, i.q.parts, i.q.spec, d.biases[0], d.lora_as[0], d.lora_bs[0], 0.5, 0.0, None
            )

    first = run(16, 1)
    for other in (run(32, 4),):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@contextmanager
def ordered_sums():
    """Products as a matrix unit makes them: every element its own sum, in the order of k. The
    interpreter calls BLAS, which sums in another order for another shape."""
    with triton_interpreter.exact():
        builder = interpreter.InterpreterBuilder
        right = builder.create_dot

        def create_dot(self, a, b, d, *rest):
            left, rows = (_wide(h) for h in (a, b))
            total = d.data.astype(np.float32)
            for k in range(left.shape[1]):
                total = total + left[:, k : k + 1] * rows[k : k + 1]
            return interpreter.TensorHandle(total, d.dtype.scalar)

        builder.create_dot = create_dot
        exact, triton_interpreter.exact = triton_interpreter.exact, _nothing
        try:
            yield
        finally:
            builder.create_dot, triton_interpreter.exact = right, exact


@contextmanager
def _nothing():
    yield


def _wide(handle) -> np.ndarray:
    if "bf16" in str(handle.dtype):
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32)


@pytest.mark.parametrize("format", ["nf4"])
def test_a_row_does_not_depend_on_the_batch(format):
    """Bit for bit, forward and backward, split sums and the adapter included."""
    i = quant_linear_inputs(65, 512, 40, 5, BF16, format=format, dropout_p=0.2)
    d, dy = i.dense, i.dense.dys[0]
    seed = torch.tensor(3)

    def run(m: int):
        a, b = d.lora_as[0], d.lora_bs[0]
        parts, spec = i.q.parts, i.q.spec
        y, s = host.quant_linear_fwd(d.x[:m], parts, spec, d.biases[0], a, b, 0.5, 0.2, seed)
        dx, _, _ = host.quant_linear_bwd(
            dy[:m], d.x[:m], parts, spec, a, b, s, 0.5, 0.2, seed, True, False, False
        )
        return y, s, dx

    with ordered_sums(), configs.forced(walk=configs.Walk(64, 64, 2)):
        whole = run(65)
        for m in (1, 17):
            for part, full in zip(run(m), whole, strict=True):
                assert torch.equal(part, full[:m])


def test_run_to_run_bitwise():
    i = quant_linear_inputs(20, 200, 65, 5, BF16, dropout_p=0.2)
    d = i.dense
    args = (d.x, i.q.parts, i.q.spec, None, d.lora_as[0], d.lora_bs[0], 0.5, 0.2, torch.tensor(3))
    first, second = host.quant_linear_fwd(*args), host.quant_linear_fwd(*args)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_inputs_are_not_written():
    i = quant_linear_inputs(9, 72, 35, 5, BF16)
    tensors = [i.dense.x, *i.q.parts, *i.dense.lora_as, *i.dense.lora_bs, *i.dense.dys]
    before = [t.clone() for t in tensors]
    check_quant_linear(i, "triton")
    assert all(torch.equal(t, old) for t, old in zip(tensors, before, strict=True))


def test_refusals_name_the_reason():
    q = quantize(torch.randn(8, 64))
    with pytest.raises(BackendUnavailableError, match=r"dtype torch\.float64") as caught:
        quant_linear(torch.randn(2, 64, dtype=torch.float64), q, backend="triton")
    assert "\n" not in str(caught.value)
    for shapes, why in (
        ({"rank": 257}, "rank 257 is too large; at most 256"),
        ({"K": 0}, "in_features or out_features is 0"),
    ):
        able, said = supports("triton", QuantLinearProblem(**{"M": 1, "K": 8, "N": 8, **shapes}))
        assert not able and why in said


# Planted faults: each must break a check above, or they prove nothing.


def _low_nibble_first(right):
    def values(tile, code, LAYOUT, FAST, R, C):
        packed, *rest = tile
        return right(((packed >> 4) | (packed << 4), *rest), code, LAYOUT, FAST, R, C)

    return values


def _shifted_block(right):
    return lambda parts, block, *rest: right(parts, block * 0, *rest)


def _shifted_mask(right):
    return lambda seed, rows, *rest: right(seed, rows + 1, *rest)


def _split_left_out(right):
    return lambda partial, m, c, inside, width, stride, splits, R, C: right(
        partial, m, c, inside, width, stride, splits - 1, R, C
    )


FAULTS = {
    "nibbles swapped": (triton_gemm, "values", _low_nibble_first),
    "scale of another block": (triton_decode, "absmax_of", _shifted_block),
    "mask shifted by a row": (triton_gemm, "keep_tile", _shifted_mask),
    "a split left out": (triton_gemm, "_sum_of_splits", _split_left_out),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_noticed(monkeypatch, fault):
    module, name, spoil = FAULTS[fault]
    i = quant_linear_inputs(9, 128, 40, 5, BF16, dropout_p=0.3, double_quant=False)
    check_quant_linear(i, "triton")
    monkeypatch.setattr(module, name, spoil(getattr(module, name)))
    with pytest.raises(BudgetExceededError):
        check_quant_linear(i, "triton")
