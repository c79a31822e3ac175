"""The CUDA C++ kernels of lora_linear, each GEMM by name. What every GPU backend must do is in
test_lora_linear_gpu.py; the tests here that are not marked gpu need none."""

from __future__ import annotations

import pytest
import torch

from lora_kernels._backends import cuda as backend
from lora_kernels.errors import BackendUnavailableError, InvalidArgumentError
from lora_kernels.ops import lora_linear
from lora_kernels.ops.lora_linear import cuda
from lora_kernels.ops.lora_linear.problem import LoraLinearProblem
from lora_kernels.testing import (
    assert_within_budget,
    check_lora_linear,
    lora_linear_inputs,
    lora_linear_op,
    poisoned_empty,
)

DTYPES = (torch.bfloat16, torch.float16)
HOPPER = tuple(name for name in cuda.GEMMS if name.startswith("sm90"))
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(backend.device_reason()), reason=backend.device_reason()),
]
on_gpu = [*GPU, pytest.mark.parametrize("gemm", ["sm80", *HOPPER])]


def marked(marks):
    def apply(function):
        for mark in marks:
            function = mark(function)
        return function

    return apply


@pytest.fixture
def named(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Forces the GEMM of the test's parameter `gemm`."""
    name = request.getfixturevalue("gemm")
    if name in HOPPER and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the sm_90a GEMM needs compute capability 9.0")
    monkeypatch.setenv("LORA_KERNELS_CUDA_GEMM", name)


def check(*args, needs: str = "xab", **kwargs) -> None:
    with poisoned_empty():
        check_lora_linear(lora_linear_inputs(*args, device="cuda", **kwargs), "cuda", needs)


def problem(**changes) -> LoraLinearProblem:
    shapes = {"M": 64, "K": 128, "N": 128, "dtype": "bfloat16", "device": "cuda"}
    return LoraLinearProblem.from_shapes(**{**shapes, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu"}, "x is on cpu"),
        ({"dtype": "float32"}, "dtype torch.float32 is not supported"),
        ({"dtype": "float64"}, "dtype torch.float64 is not supported"),
        ({"rank": 257}, "rank 257 is too large; at most 256"),
        ({"N": (8,) * 9}, "a group of 9 is too large; at most 8"),
        ({"K": 0}, "in_features or out_features is 0"),
        ({"M": 2**31}, "an extent is larger than"),
    ],
)
def test_what_is_not_supported_has_a_reason(changes, reason):
    able, why = cuda.supports(problem(**changes))
    assert not able and reason in why and "\n" not in why


def test_the_reason_of_the_machine_comes_last():
    able, why = cuda.supports(problem())
    assert able == (not backend.device_reason())
    assert why.startswith(backend.device_reason() or "CUDA C++ kernels, ")


@pytest.mark.parametrize(
    ("capability", "changes", "gemm"),
    [
        ((9, 0), {}, "sm_90a GEMM"),
        ((9, 0), {"K": 65}, "sm_80 GEMM (in_features or out_features is no multiple of 8)"),
        ((9, 0), {"N": (64, 65)}, "sm_80 GEMM (in_features or out_features is no multiple of 8)"),
        ((8, 0), {}, "sm_80 GEMM (compute capability 8.0; the sm_90a one needs 9.0)"),
        ((10, 0), {}, "sm_80 GEMM (compute capability 10.0; the sm_90a one needs 9.0)"),
    ],
)
def test_the_choice_of_the_gemm_is_told(monkeypatch, capability, changes, gemm):
    monkeypatch.setattr(backend, "device_reason", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert cuda.supports(problem(**changes)) == (True, f"CUDA C++ kernels, {gemm}")
    monkeypatch.setenv("LORA_KERNELS_CUDA_GEMM", "sm80")
    assert "sm80 GEMM by LORA_KERNELS_CUDA_GEMM" in cuda.supports(problem(**changes))[1]


def test_a_request_by_name_raises_instead_of_falling_back():
    i = lora_linear_inputs(5, 16, 8, 4, torch.bfloat16)
    args = (i.x, i.weights[0], i.lora_as[0], i.lora_bs[0], 1.0)
    with pytest.raises(BackendUnavailableError, match="x is on cpu"):
        lora_linear(*args, backend="cuda")


def test_an_unknown_gemm_is_named(monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_CUDA_GEMM", "sm70")
    with pytest.raises(InvalidArgumentError, match="LORA_KERNELS_CUDA_GEMM='sm70' is unknown"):
        cuda._gemm()


# One row of blocks and an odd number of them (half a cluster idle), k blocks with every number of
# k16 steps, ranks of less than a step, of one block and of several, columns that end inside a box.
SHAPES = [
    (1, 8, 8, 1), (64, 64, 64, 16), (127, 72, 136, 8), (129, 200, 264, 24), (257, 96, 520, 64),
    (300, 1032, 1544, 100), (385, 2048, 256, 256), (1000, 120, 2056, 3),
]  # fmt: skip


@marked(on_gpu)
@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_oracle(gemm, dtype, shape, dropout_p):
    check(*shape, dtype, dropout_p=dropout_p)


@marked(on_gpu)
@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_groups(gemm, dropout_p):
    """Several problems in the forward launch, up to 16 terms and 8 masks in that of dX."""
    if dropout_p > 0.0 and "128x256" in gemm:
        i = lora_linear_inputs(16, 16, (16, 16), 8, torch.bfloat16, dropout_p=0.5, device="cuda")
        with pytest.raises(RuntimeError, match="needs a tile of 128 columns"):
            lora_linear_op(i, "cuda", "x")
        return
    check(260, 264, (264, 72, 8), (16, 5, 130), torch.bfloat16, dropout_p=dropout_p)
    check(140, 136, (40,) * 8, 8, torch.bfloat16, dropout_p=dropout_p)


@marked(on_gpu)
@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bias(gemm, bias_dtype):
    i = lora_linear_inputs(200, 136, 264, 16, torch.bfloat16, device="cuda")
    with_bias = lora_linear_op(i, "cuda", "").ys[0]
    i.biases[0] = i.biases[0].to(bias_dtype)
    assert torch.equal(lora_linear_op(i, "cuda", "").ys[0], with_bias)
    check(200, 136, 264, 16, torch.bfloat16, bias=False)


@marked(on_gpu)
@pytest.mark.usefixtures("named")
def test_more_tiles_than_blocks(gemm):
    """Persistent blocks take several tiles: the ring of stages and the staging go round."""
    check(4100, 512, 4104, 16, torch.bfloat16, dropout_p=0.1)


@marked(on_gpu)
@pytest.mark.usefixtures("named")
def test_bitwise_from_run_to_run(gemm):
    i = lora_linear_inputs(2049, 1032, 2056, 16, torch.bfloat16, dropout_p=0.1, device="cuda")
    first = lora_linear_op(i, "cuda", "xab").named()
    for _ in range(20):
        again = lora_linear_op(i, "cuda", "xab").named()
        assert all(torch.equal(t, again[name]) for name, t in first.items())


@marked(on_gpu)
@pytest.mark.usefixtures("named")
def test_graph(gemm):
    i = lora_linear_inputs(257, 264, 520, 16, torch.bfloat16, dropout_p=0.25, device="cuda")
    want = lora_linear_op(i, "cuda", "").ys[0]
    graph = torch.cuda.CUDAGraph()
    args = (i.x, i.weights[0], i.lora_as[0], i.lora_bs[0], i.scalings[0])
    seed = torch.tensor(i.seed, device="cuda")
    with torch.no_grad(), torch.cuda.graph(graph):
        got = lora_linear(*args, bias=i.biases[0], dropout_p=0.25, seed=seed, backend="cuda")
    got.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got, want)


@marked(GPU)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_gemms_agree(monkeypatch, dtype, dropout_p):
    """All kernels sum in fp32 and round once: Y and dX differ by the order of the sum alone."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the sm_90a GEMM needs compute capability 9.0")
    i = lora_linear_inputs(700, 1032, 1544, 40, dtype, dropout_p=dropout_p, device="cuda")
    monkeypatch.setenv("LORA_KERNELS_CUDA_GEMM", "sm80")
    want = lora_linear_op(i, "cuda", "x")
    for name in HOPPER:
        monkeypatch.setenv("LORA_KERNELS_CUDA_GEMM", name)
        got = lora_linear_op(i, "cuda", "x")
        for a, b in ((got.ys[0], want.ys[0]), (got.dx, want.dx)):
            assert_within_budget(a, b.double(), b, name)


@marked(GPU)
@pytest.mark.parametrize("gemm", HOPPER)
@pytest.mark.usefixtures("named")
@pytest.mark.parametrize(("k", "n"), [(65, 64), (64, 65)])
def test_unaligned_rows_are_refused_by_name_and_served_by_auto(gemm, monkeypatch, k, n):
    i = lora_linear_inputs(33, k, n, 8, torch.bfloat16, device="cuda")
    with pytest.raises(RuntimeError, match="16-byte aligned"):
        lora_linear_op(i, "cuda", "x")
    monkeypatch.setenv("LORA_KERNELS_CUDA_GEMM", "auto")
    check_lora_linear(i, "cuda", "xab")


@marked(GPU)
def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    here = torch.cuda.current_device()
    i = lora_linear_inputs(130, 136, 72, 16, torch.bfloat16, device="cuda:1")
    check_lora_linear(i, "cuda", "xab")
    assert torch.cuda.current_device() == here
