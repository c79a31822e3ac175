"""quant_linear's Triton kernels on a GPU: bytes of every format, and rows that do not depend on
the batch, which the interpreter shows for the order of sums but not for matrix units.

Marked gpu: part of make gpu-check. Without a GPU every test skips and says so.
"""

from __future__ import annotations

import pytest
import torch

import lora_kernels as lk
from lora_kernels._backends import triton as backend
from lora_kernels.ops.quant_linear import FORMAT_NAMES, reference
from lora_kernels.testing import quant_linear_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.skipif(backend.load()[0] is None, reason=backend.load()[1]),
]
BF16 = torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_dequantize_gives_the_bytes_of_the_reference(format, dtype):
    for shape in ((512, 1024), (33, 50), (257, 130)):
        q = lk.ops.quantize(torch.randn(shape), format).to("cuda")
        got = lk.ops.dequantize(q, dtype=dtype, backend="triton")
        assert torch.equal(got, reference.dequantize(q.parts, q.spec, dtype))


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8", "fp8_row"])
def test_quantize_gives_the_bytes_of_the_reference(format):
    from lora_kernels.ops.quant_linear import triton as host

    for shape in ((512, 1024), (33, 51)):
        w = torch.randn(shape, device="cuda")
        spec = lk.ops.quantize(w.cpu(), format).spec
        parts = host.quantize(w, spec)
        assert parts is not None
        for got, want in zip(parts, reference.quantize(w, spec), strict=True):
            assert torch.equal(got.float(), want.float())


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("format", ["nf4", "int8", "int4", "int4_awq", "fp8_block"])
@pytest.mark.parametrize(("n", "k"), [(1024, 4096), (136, 2000)])
def test_a_row_does_not_depend_on_the_batch(format, dtype, n, k):
    i = quant_linear_inputs(128, k, n, 8, dtype, format=format, dropout_p=0.1)
    d, q = i.dense, i.q.to("cuda")
    x, a, b, dy = (t.cuda() for t in (d.x, d.lora_as[0], d.lora_bs[0], d.dys[0]))

    def run(m: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = x[:m].clone().requires_grad_()
        y = lk.ops.quant_lora_linear(
            rows, q, a, b, 0.5, dropout_p=0.1, seed=3, backend="triton"
        )  # fmt: skip
        y.backward(dy[:m])
        assert rows.grad is not None
        return y.detach(), rows.grad

    whole = run(128)
    for m in (1, 2, 15, 16, 17, 32, 33, 64, 65, 127):
        for part, full in zip(run(m), whole, strict=True):
            assert torch.equal(part, full[:m]), m
