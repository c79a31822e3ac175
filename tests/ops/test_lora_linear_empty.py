"""Extents of zero: the result and every gradient have the right shape and value."""

from __future__ import annotations

import pytest
import torch

import lora_kernels as lk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 0, 4), (3, 4, 0), (0, 4, 4)], ids=str)
def test_zero_extent(shape, dtype):
    m, k, n = shape
    x = torch.randn(m, k, dtype=dtype, requires_grad=True)
    w, bias = torch.randn(n, k, dtype=dtype), torch.randn(n, dtype=dtype)
    a = torch.randn(2, k, requires_grad=True)
    b = torch.randn(n, 2, requires_grad=True)
    y = lk.ops.lora_linear(x, w, a, b, 0.5, bias=bias)
    assert torch.equal(y, bias.expand(m, n))
    y.backward(torch.ones_like(y))
    for parameter in (x, a, b):
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
