"""The CUDA C++ kernels of quant_linear: what they say about a problem, and, marked gpu, what they
give on one. In the emulator: tests/test_emulator_quant_linear.py."""

from __future__ import annotations

import pytest
import torch

from lora_kernels._backends import cuda as backend
from lora_kernels.errors import BackendUnavailableError
from lora_kernels.ops import dequantize, quant_linear, quantize
from lora_kernels.ops.quant_linear import QuantTensor, cuda, reference
from lora_kernels.ops.quant_linear.problem import FORMAT_NAMES, QuantLinearProblem, choose
from lora_kernels.testing import check_quant_linear, moved, poisoned_empty, quant_linear_inputs

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(backend.device_reason()), reason=backend.device_reason()),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_gpu(function):
    for mark in GPU:
        function = mark(function)
    return function


def problem(**changes) -> QuantLinearProblem:
    shapes = {"M": 4, "K": 128, "N": 96, "dtype": "bfloat16", "device": "cuda"}
    return QuantLinearProblem.from_shapes(**{**shapes, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu"}, "on cpu"),
        ({"dtype": "float64"}, "float64 is not supported"),
        ({"dtype": "float32"}, "float32 is not supported for x"),
        ({"K": 0}, "is 0"),
        ({"rank": 257}, "rank 257 is too large"),
        ({"N": 2**24 + 8}, "larger than"),
        ({"block_size": 16}, "block size 16"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_it_does_not_run(changes, reason):
    able, why = cuda.supports(problem(**changes))
    assert not able and reason in why and "\n" not in why


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "packed"),
        ({"M": 129}, "more than 128 rows"),
        ({"K": 136}, "no multiple of 32"),
        ({"format": "int4", "act_order": True}, "act-order"),
        ({"format": "int4", "block_size": 48}, "groups of 48"),
        ({"M": 0, "dtype": "float32"}, "one launch"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_which_path_it_takes(changes, reason, monkeypatch):
    monkeypatch.setattr(backend, "device_reason", lambda: "")
    monkeypatch.setattr(cuda, "_library_reason", lambda: "")
    able, why = cuda.supports(problem(**changes))
    assert able and reason in why, why


def test_an_older_library_is_named(monkeypatch):
    monkeypatch.setattr(backend, "device_reason", lambda: "")
    monkeypatch.setattr(backend, "load", lambda: (object(), ""))
    able, why = cuda.supports(problem())
    assert not able and "build it again" in why


def test_a_request_never_falls_back_and_auto_needs_evidence():
    with pytest.raises(BackendUnavailableError, match="on cpu"):
        quant_linear(torch.randn(2, 64), quantize(torch.randn(8, 64)), backend="cuda")
    assert choose(problem(), "auto")[0] == "aten"


def moved_weight(n: int, k: int, name: str) -> QuantTensor:
    return quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(n)), name).to("cuda")


@on_gpu
@pytest.mark.parametrize("shape", [(130, 160), (33, 45), (512, 1024)], ids=str)
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_dequantized_bits(name, shape):
    q = moved_weight(*shape, name)
    for dtype in DTYPES:
        with poisoned_empty():
            got = dequantize(q, dtype=dtype, backend="cuda").cpu()
        assert torch.equal(got, reference.dequantize(q.to("cpu").parts, q.spec, dtype))


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_quantized_bytes(name, dtype):
    w = torch.randn(130, 257).to(dtype)
    spec = quantize(w, name).spec
    got = cuda.quantize(w.cuda(), spec)
    assert got is not None
    want = reference.quantize(w.cuda(), spec)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@on_gpu
@pytest.mark.parametrize("M", [1, 5, 16, 17, 64, 128, 200])
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_products(name, M):
    for dtype in DTYPES[1:]:
        i = quant_linear_inputs(M, 1056, 200, 12, dtype, format=name, dropout_p=0.25)
        check_quant_linear(moved(i, "cuda"), "cuda")


@on_gpu
@pytest.mark.parametrize(("first", "last"), [(1, 16), (17, 128)])
def test_rows_do_not_depend_on_each_other(first, last):
    q = moved_weight(4096, 4096, "nf4")
    x = torch.randn(last, 4096, device="cuda").to(torch.bfloat16)
    y = quant_linear(x, q, backend="cuda")
    for rows in (first, (first + last) // 2):
        assert torch.equal(quant_linear(x[:rows], q, backend="cuda"), y[:rows])
    assert torch.equal(quant_linear(x, q, backend="cuda"), y)


@on_gpu
def test_side_streams_and_graphs():
    q = moved_weight(256, 1024, "nf4")
    x = torch.randn(8, 1024, device="cuda").to(torch.bfloat16)
    want = quant_linear(x, q, backend="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = quant_linear(x, q, backend="cuda")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = quant_linear(x, q, backend="cuda")
    x.copy_(-x)
    graph.replay()
    assert torch.equal(aside, want) and torch.equal(captured, -want)
