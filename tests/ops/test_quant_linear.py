"""Numbers of quant_linear on every backend and format against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.ops import _registry, dequantize, quant_linear, quant_lora_linear, quantize
from lora_kernels.ops.quant_linear import reference
from lora_kernels.ops.quant_linear.problem import FORMAT_NAMES
from lora_kernels.testing import (
    LAYOUTS,
    BudgetExceededError,
    QuantLinearInputs,
    check_quant_linear,
    quant_linear_inputs,
)

SPEC = _registry.find("quant_linear")
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EVERY_M = [*range(1, 34), 64, 127, 128, 513]


@pytest.fixture(params=SPEC.backends)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def require(backend: str):
    def check(inputs: QuantLinearInputs) -> None:
        s, dense = inputs.q.spec, inputs.dense
        able, why = SPEC.supports(
            backend,
            SPEC.problem(
                M=dense.x.shape[:-1].numel(), K=s.columns, N=s.rows,
                rank=dense.lora_as[0].shape[0] if inputs.adapter else 0,
                format=s.format, layout=s.layout, block_size=s.block_size,
                nested=s.nested_block_size > 0, act_order=s.act_order, dtype=dense.x.dtype,
                dropout_p=dense.dropout_p,
            ),
        )  # fmt: skip
        if not able:
            pytest.skip(f"{backend}: {why}")

    return check


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_formats_and_dtypes(backend, require, format, dtype, rank):
    i = quant_linear_inputs((2, 5), 72, 35, rank, dtype, format=format)
    require(i)
    check_quant_linear(i, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", ["nf4", "int8", "int4", "fp8_block"])
def test_every_number_of_rows(backend, require, format, dtype):
    for m in EVERY_M:
        i = quant_linear_inputs(m, 64, 33, 4, dtype, format=format)
        require(i)
        check_quant_linear(i, backend)


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (7, 31), (33, 100), (5, 64), (130, 257)])
@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_odd_shapes(backend, require, format, shape):
    n, k = shape
    i = quant_linear_inputs(3, k, n, 2, torch.float32, format=format)
    require(i)
    check_quant_linear(i, backend)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_input(backend, require, layout, dropout_p):
    i = quant_linear_inputs(9, 72, 35, 5, torch.bfloat16, layout=layout, dropout_p=dropout_p)
    require(i)
    check_quant_linear(i, backend)


@pytest.mark.parametrize("rank", [1, 3, 8, 64, 100])
def test_ranks_and_wider_adapters(backend, require, rank):
    i = quant_linear_inputs(33, 72, 35, rank, torch.bfloat16, adapter_dtype=torch.float32)
    require(i)
    check_quant_linear(i, backend)


@pytest.mark.parametrize("needs", ["x", "a", "b", "c", "xa", ""])
def test_gradients_that_are_not_needed(backend, require, needs):
    i = quant_linear_inputs(5, 72, 35, 5, torch.float32)
    require(i)
    check_quant_linear(i, backend, needs)


@pytest.mark.parametrize("format", FORMAT_NAMES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dequantize_gives_the_bytes_of_the_reference(backend, format, dtype):
    for shape in ((64, 128), (33, 50), (5, 7)):
        q = quantize(torch.randn(shape), format)
        able, why = SPEC.supports(
            backend,
            SPEC.problem(
                M=0, K=shape[1], N=shape[0], format=q.format, layout=q.layout,
                block_size=q.block_size, nested=q.double_quant, dtype=dtype,
            ),
        )  # fmt: skip
        if not able:
            pytest.skip(f"{backend}: {why}")
        w = dequantize(q, dtype=dtype, backend=backend)
        assert w.dtype == dtype and w.shape == shape and w.is_contiguous()
        assert torch.equal(w, reference.dequantize(q.parts, q.spec, dtype))


@pytest.mark.parametrize("format", FORMAT_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_identity_input_gives_the_weight(backend, require, format, dtype):
    """One term of each sum is not zero, so the result is the dequantized weight exactly."""
    i = quant_linear_inputs(72, 72, 35, 0, dtype, format=format, bias=False)
    require(i)
    y = quant_linear(torch.eye(72, dtype=dtype), i.q, backend=backend)
    assert torch.equal(y.t(), i.dense.weights[0])


def test_results_do_not_change_from_run_to_run(backend, require):
    i = quant_linear_inputs(129, 200, 65, 5, torch.bfloat16, dropout_p=0.2)
    require(i)

    def run():
        x = i.dense.x.clone().requires_grad_()
        a, b = i.dense.lora_as[0].clone().requires_grad_(), i.dense.lora_bs[0]
        y = quant_lora_linear(x, i.q, a, b, 0.7, dropout_p=0.2, seed=3, backend=backend)
        y.sum().backward()
        return y, x.grad, a.grad

    assert all(torch.equal(p, q) for p, q in zip(run(), run(), strict=True))


@pytest.mark.parametrize("m", [0, 1])
def test_zero_rows_and_one_axis(backend, m, require):
    require(quant_linear_inputs(m, 64, 33, 4))
    q = quantize(torch.randn(33, 64))
    x = torch.randn(m, 64, requires_grad=True)
    a = torch.randn(4, 64, requires_grad=True)
    b = torch.randn(33, 4, requires_grad=True)
    y = quant_lora_linear(x, q, a, b, 0.5, backend=backend)
    y.sum().backward()
    assert y.shape == (m, 33) and x.grad.shape == (m, 64) and a.grad.shape == (4, 64)
    if m == 0:
        assert not a.grad.any() and not b.grad.any()
    assert quant_linear(torch.randn(64), q, backend=backend).shape == (33,)


@pytest.mark.parametrize(
    "fault", ["update dropped", "wrong scale", "nibbles swapped", "one block shifted"]
)
def test_a_planted_fault_is_found(fault, monkeypatch):
    """The check above fails for kernels that are wrong in ways that kernels get wrong."""
    from lora_kernels.ops.quant_linear import aten

    i = quant_linear_inputs(9, 128, 65, 5, torch.bfloat16)
    check_quant_linear(i, "aten")
    true_fwd, true_dequantize = aten.quant_linear_fwd, aten.dequantize

    def fwd(x, parts, spec, bias, a, b, scaling, p, seed):
        factor = {"update dropped": 0.0, "wrong scale": 1.1}.get(fault, 1.0)
        return true_fwd(x, parts, spec, bias, a, b, scaling * factor, p, seed)

    def faulty(parts, spec, dtype):
        packed, absmax, *rest = parts
        if fault == "nibbles swapped":
            packed = packed >> 4 | packed << 4
        if fault == "one block shifted":
            absmax = absmax.roll(1)
        return true_dequantize((packed, absmax, *rest), spec, dtype)

    monkeypatch.setattr(aten, "quant_linear_fwd", fwd)
    monkeypatch.setattr(aten, "dequantize", faulty)
    with pytest.raises(BudgetExceededError):
        check_quant_linear(i, "aten")
