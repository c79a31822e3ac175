"""lora_linear on a GPU: every backend there, streams, graphs, and what `auto` picks.

Marked gpu: part of make gpu-check. Without a GPU every test skips and says so.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lora_kernels as lk
from lora_kernels.ops import _registry, grouped_lora_linear, lora_linear
from lora_kernels.testing import (
    LoraLinearInputs,
    assert_within_budget,
    check_lora_linear,
    lora_linear_inputs,
    lora_linear_op,
    poisoned_empty,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["aten", "triton", "cuda"])
def gpu_backend(request: pytest.FixtureRequest) -> str:
    return request.param


def check(inputs: LoraLinearInputs, backend: str, needs: str = "xwabc") -> None:
    require(inputs, backend)
    with poisoned_empty():
        check_lora_linear(inputs, backend, needs)


def require(inputs: LoraLinearInputs, backend: str) -> None:
    spec = _registry.find("lora_linear")
    able, why = spec.supports(
        backend,
        spec.problem(
            M=inputs.x.shape[:-1].numel(), K=inputs.x.shape[-1],
            N=tuple(w.shape[0] for w in inputs.weights),
            rank=tuple(a.shape[0] for a in inputs.lora_as), dtype=inputs.x.dtype,
            weight_dtype=inputs.weights[0].dtype, dropout_p=inputs.dropout_p, device="cuda",
        ),
    )  # fmt: skip
    if not able:
        pytest.skip(f"{backend}: {why}")


def made(*args, **kwargs) -> LoraLinearInputs:
    return lora_linear_inputs(*args, device="cuda", **kwargs)


# Most of the time goes into compiling: one dtype sees every case, the others the telling ones.
RANKS = [(r, torch.bfloat16) for r in (1, 3, 4, 8, 12, 16, 24, 64, 100, 128, 256)]


@pytest.mark.parametrize(
    ("rank", "dtype"), [*RANKS, *((r, d) for d in DTYPES[1:] for r in (5, 64))], ids=str
)
def test_ranks(gpu_backend, dtype, rank):
    check(made(137, 200, 264, rank, dtype), gpu_backend)


@pytest.mark.parametrize("m", [0, 1, 7, 127, 129, 4097])
def test_rows(gpu_backend, m):
    check(made(m, 264, 136, 16, torch.bfloat16), gpu_backend)


@pytest.mark.parametrize("kn", [(1, 1), (8, 8), (65, 131), (520, 1032), (1030, 514)], ids=str)
def test_features_that_fit_no_tile(gpu_backend, kn):
    check(made(70, *kn, 16, torch.bfloat16), gpu_backend)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_odd_features_in_other_dtypes(gpu_backend, dtype):
    check(made(70, 65, 131, 16, dtype), gpu_backend)


@pytest.mark.parametrize(
    ("dropout_p", "dtype"),
    [(0.1, torch.bfloat16), (0.5, torch.float32), (0.5, torch.float16), (1.0, torch.bfloat16)],
)
@pytest.mark.parametrize("n", [(264,), (264, 72, 72)], ids=str)
def test_dropout(gpu_backend, dtype, dropout_p, n):
    check(made(200, 328, n, 16, dtype, dropout_p=dropout_p), gpu_backend, "xab")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_backend_drops_the_same_elements(gpu_backend, dtype):
    """The rows of W = 0, A = B = I show the mask; it is that of the CPU."""
    k, m = 200, 150
    eye, zero = torch.eye(k, dtype=dtype), torch.zeros(k, k, dtype=dtype)
    ones = torch.ones(m, k, dtype=dtype)
    i = LoraLinearInputs(
        x=ones, weights=[zero], lora_as=[eye], lora_bs=[eye], biases=[None], scalings=[1.0],
        dropout_p=0.3, seed=2**40 + 3, dys=[ones],
    )  # fmt: skip
    here = lora_linear_op(i, "aten", "x")
    there = i.with_layout("contiguous")
    gpu = LoraLinearInputs(
        x=there.x.cuda(), weights=[zero.cuda()], lora_as=[eye.cuda()], lora_bs=[eye.cuda()],
        biases=[None], scalings=[1.0], dropout_p=0.3, seed=i.seed, dys=[ones.cuda()],
    )  # fmt: skip
    require(gpu, gpu_backend)
    got = lora_linear_op(gpu, gpu_backend, "x")
    assert torch.equal(got.ys[0].cpu() != 0, here.ys[0] != 0)
    assert torch.equal(got.dx.cpu() != 0, here.dx != 0)


@pytest.mark.parametrize("ranks", [(16, 16, 16), (4, 100, 1)], ids=str)
def test_groups(gpu_backend, ranks):
    check(made(300, 264, (264, 72, 40), ranks, torch.bfloat16), gpu_backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [(136,), (136, 72)], ids=str)
def test_wider_adapters(gpu_backend, dtype, n):
    inputs = made(300, 264, n, 16, dtype, adapter_dtype=torch.float32)
    check(inputs, gpu_backend)
    result = lora_linear_op(inputs, gpu_backend, "ab")
    assert {t.dtype for t in (*result.das, *result.dbs)} == {torch.float32}


@pytest.mark.parametrize("layout", ["sliced", "strided", "permuted", "misaligned"])
def test_layouts(gpu_backend, layout):
    check(made(70, 136, 72, 16, torch.bfloat16, layout=layout), gpu_backend)


@pytest.mark.parametrize("needs", ["x", "a", "b", "ab", "xa", "xb"])
def test_subsets_of_gradients(gpu_backend, needs):
    check(made(130, 136, (72, 40), 16, torch.bfloat16), gpu_backend, needs)


def test_a_real_layer(gpu_backend):
    check(made(2048, 4096, 4096, 16, torch.bfloat16), gpu_backend, "xab")


def test_run_to_run_bitwise(gpu_backend):
    inputs = made(2049, 1032, (520, 264), 16, torch.bfloat16, dropout_p=0.1)
    require(inputs, gpu_backend)
    first, *others = (lora_linear_op(inputs, gpu_backend, "xab").named() for _ in range(3))
    for other in others:
        for name, t in first.items():
            assert torch.equal(t, other[name]), name


def test_work_goes_to_the_current_stream(gpu_backend):
    """The operands become right late on a side stream: work elsewhere would see the old ones."""
    inputs = made(2048, 2048, 2048, 16, torch.bfloat16)
    require(inputs, gpu_backend)
    want = lora_linear_op(inputs, gpu_backend, "xab").named()
    torch.cuda.synchronize()
    right = inputs.x.clone()
    busy = torch.randn(4096, 4096, device="cuda")
    side = torch.cuda.Stream()
    inputs.x.fill_(float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(20):
            busy = busy @ busy * 1e-3
        inputs.x.copy_(right)
        got = lora_linear_op(inputs, gpu_backend, "xab").named()
    side.synchronize()
    for name, t in want.items():
        assert_within_budget(got[name], t.double(), t, name)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_a_graph_replays_the_step(gpu_backend, dropout_p):
    """Forward and backward are captured once; a replay on other values is the eager result."""
    inputs = made(512, 520, (264, 136), 16, torch.bfloat16, dropout_p=dropout_p)
    require(inputs, gpu_backend)
    seed = torch.tensor(11, device="cuda")
    leaves = [t.requires_grad_() for t in (inputs.x, *inputs.lora_as, *inputs.lora_bs)]
    x, a0, a1, b0, b1 = leaves

    def step() -> tuple[torch.Tensor, ...]:
        ys = grouped_lora_linear(
            x, inputs.weights, (a0, a1), (b0, b1), inputs.scalings,
            dropout_p=dropout_p, seed=seed, backend=gpu_backend,
        )  # fmt: skip
        return (*ys, *torch.autograd.grad(ys, leaves, inputs.dys))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for t in (*leaves, seed):
            t.copy_(t.flip(0) if t.dim() else t + 1)
    graph.replay()
    replayed = [t.detach().clone() for t in captured]
    # The library may take another product in a graph: equal to rounding.
    for got, want in zip(replayed, step(), strict=True):
        assert_within_budget(got, want.detach().double(), want.detach())


def test_nothing_waits_for_the_device(gpu_backend):
    inputs = made(256, 264, 136, 16, torch.bfloat16)
    require(inputs, gpu_backend)
    lora_linear_op(inputs, gpu_backend, "xab")
    torch.cuda.set_sync_debug_mode("error")
    try:
        leaves = [t.requires_grad_() for t in (inputs.x, inputs.lora_as[0], inputs.lora_bs[0])]
        x, a, b = leaves
        y = lora_linear(x, inputs.weights[0], a, b, 0.5, backend=gpu_backend)
        torch.autograd.grad(y, leaves, inputs.dys[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(gpu_backend, dtype):
    i = made(130, 136, 72, 16, torch.float32, bias=False)
    require(made(130, 136, 72, 16, dtype), gpu_backend)
    leaves = [t.requires_grad_() for t in (i.x, i.lora_as[0], i.lora_bs[0])]
    with torch.autocast("cuda", dtype=dtype):
        y = lora_linear(
            leaves[0], i.weights[0], leaves[1], leaves[2], i.scalings[0], backend=gpu_backend
        )
    assert y.dtype == dtype
    grads = torch.autograd.grad(y, leaves, i.dys[0].to(dtype))
    assert {g.dtype for g in grads} == {torch.float32}


def test_auto_says_what_it_picked_and_why():
    answer = lk.explain("lora_linear", M=8192, K=4096, N=4096, dtype="bfloat16", device="cuda")
    assert answer["backend"] in ("aten", "triton", "cuda")
    if answer["backend"] == "aten":
        for name in ("triton", "cuda"):
            assert f"{name}: " in answer["reason"]
    else:
        assert "of the time of aten" in answer["reason"]
    check_lora_linear(made(130, 136, 72, 16, torch.bfloat16), None)


def test_no_masked_copy_in_fp32_or_int64():
    """Dropout through the library products stays near two tensors of the size of x."""
    i = made(4096, 4096, 4096, 16, torch.bfloat16, dropout_p=0.1)
    lora_linear_op(i, "aten", "xab")
    leaves = [t.requires_grad_() for t in (i.x, i.lora_as[0], i.lora_bs[0])]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = lora_linear(leaves[0], i.weights[0], leaves[1], leaves[2], 2.0, dropout_p=0.1,
                    seed=3, backend="aten")  # fmt: skip
    torch.autograd.grad(y, leaves, i.dys[0])
    size = 4096 * 4096 * 2
    assert torch.cuda.max_memory_allocated() - before < 4.5 * size


def test_importing_starts_nothing_on_the_device():
    code = "import torch, lora_kernels, lora_kernels.ops; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
