"""The registered op pair: gradcheck, opcheck, fakes, torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from lora_kernels.ops import _registry, grouped_lora_linear, lora_linear
from lora_kernels.testing import (
    LoraLinearInputs,
    assert_within_budget,
    lora_linear_inputs,
    lora_linear_op,
    lora_linear_results,
    yardstick,
)

FWD = torch.ops.lora_kernels.lora_linear_fwd.default
BWD = torch.ops.lora_kernels.lora_linear_bwd.default


def fwd_args(i: LoraLinearInputs, backend: str) -> tuple:
    seed = torch.tensor(i.seed) if i.dropout_p else None
    return (
        i.x, i.weights, i.lora_as, i.lora_bs, i.biases, i.scalings, i.dropout_p, seed, backend,
    )  # fmt: skip


def bwd_args(i: LoraLinearInputs, backend: str, needs=(True, True, True)) -> tuple:
    seed = torch.tensor(i.seed) if i.dropout_p else None
    _, s = FWD(*fwd_args(i, backend))
    return (
        i.dys, i.x, i.weights, i.lora_as, i.lora_bs, s, i.scalings, i.dropout_p, seed,
        *needs, backend,
    )  # fmt: skip


def test_registry_names_the_registered_pair():
    assert _registry.find("lora_linear").schemas == (FWD.name(), BWD.name())


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(backend, require, dtype, layout, dropout_p):
    i = lora_linear_inputs(9, 20, (33, 6), (3, 4), dtype, layout=layout, dropout_p=dropout_p)
    require(i)
    opcheck(FWD, fwd_args(i, backend))
    opcheck(BWD, bwd_args(i, backend))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradcheck(backend, require, groups, dropout_p):
    i = lora_linear_inputs(
        (2, 3), 7, (9, 5)[:groups], (3, 2)[:groups], torch.float64, dropout_p=dropout_p
    )
    require(i)
    leaves = [t.requires_grad_() for t in (i.x, *i.weights, *i.lora_as, *i.lora_bs, *i.biases)]

    def op(x, *flat):
        w, a, b, c = (flat[j * groups : (j + 1) * groups] for j in range(4))
        return tuple(
            grouped_lora_linear(
                x, w, a, b, i.scalings,
                biases=c, dropout_p=dropout_p, seed=i.seed, backend=backend,
            )
        )  # fmt: skip

    assert torch.autograd.gradcheck(op, leaves)


def layout_of(t: torch.Tensor) -> tuple:
    return tuple(t.shape), t.stride(), t.dtype, t.device.type


def flatten(result) -> list[torch.Tensor]:
    return [t for part in result for t in (part if isinstance(part, (list, tuple)) else [part])]


@pytest.mark.parametrize("m", [0, 1, 9])
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "sliced"])
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, True)])
def test_fakes_match_the_real_outputs(backend, require, m, layout, needs):
    i = lora_linear_inputs(
        m, 20, (33, 6), (3, 4), torch.bfloat16, adapter_dtype=torch.float32, layout=layout
    )
    require(i)
    real = [FWD(*fwd_args(i, backend)), BWD(*bwd_args(i, backend, needs))]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(value):
            if isinstance(value, torch.Tensor):
                return mode.from_tensor(value)
            return [fake(v) for v in value] if isinstance(value, list) else value

        f = fwd_args(i, backend)
        b = bwd_args(i, backend, needs)
        faked = [FWD(*map(fake, f)), BWD(*map(fake, b))]
    for what, got, want in zip(("fwd", "bwd"), faked, real, strict=True):
        assert [layout_of(t) for t in flatten(got)] == [layout_of(t) for t in flatten(want)], what


def test_outputs_do_not_alias_inputs(backend, require):
    i = lora_linear_inputs(5, 20, 20, 3, torch.float32, scaling=0.0)
    require(i)
    ins = {t.untyped_storage().data_ptr() for t in (i.x, *i.weights, *i.lora_as, *i.lora_bs)}
    outs = [
        *flatten(FWD(*fwd_args(i, backend))),
        *flatten(BWD(*bwd_args(i, backend))),
    ]
    pointers = [t.untyped_storage().data_ptr() for t in outs]
    assert not ins & set(pointers)
    assert len(set(pointers)) == len(pointers)


def compiled_step(counter, backend: str):
    def step(x, w, a, b, bias, scaling):
        return lora_linear(x, w, a, b, scaling, bias=bias, backend=backend)

    return torch.compile(step, fullgraph=True, dynamic=True, backend=counter)


def check_compiled(step, counter, dtype: torch.dtype) -> None:
    """Every M and every scaling through one compiled function, forward and backward."""
    compiled = None
    for m, scaling in ((7, 0.5), (33, 0.5), (12, 2.0), (129, -1.25), (64, 0.75)):
        i = lora_linear_inputs((m,), 40, 50, 8, dtype, scaling=scaling)
        oracle = lora_linear_results(i, torch.float64)
        low = yardstick(i, oracle)
        x, a, b, bias = (
            t.clone().requires_grad_() for t in (i.x, i.lora_as[0], i.lora_bs[0], i.biases[0])
        )
        y = step(x, i.weights[0], a, b, bias, scaling)
        y.backward(i.dys[0])
        for name, t in (
            ("y[0]", y), ("dx", x.grad), ("da[0]", a.grad), ("db[0]", b.grad),
            ("dbias[0]", bias.grad),
        ):  # fmt: skip
            assert_within_budget(t, oracle.named()[name], low.named()[name], f"M={m} {name}")
        compiled = compiled or counter.frame_count  # the first trace may take two attempts
        assert counter.frame_count == compiled, f"compiled again for M={m}, scaling={scaling}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile_once_for_every_m_and_scaling(backend, require, dtype):
    require(lora_linear_inputs(7, 40, 50, 8, dtype))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    check_compiled(compiled_step(counter, backend), counter, dtype)


@pytest.mark.slow
def test_compile_with_inductor(backend, require):
    require(lora_linear_inputs(7, 40, 50, 8, torch.float32))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    check_compiled(compiled_step(counter, backend), counter, torch.float32)


def test_compile_with_dropout_draws_new_masks(backend, require):
    i = lora_linear_inputs(33, 40, 50, 8, torch.float32)
    require(i)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x, a):
        return lora_linear(x, i.weights[0], a, i.lora_bs[0], 0.7, dropout_p=0.5, backend=backend)

    def run(seed):
        torch.manual_seed(seed)
        a = i.lora_as[0].clone().requires_grad_()
        y = step(i.x, a)
        y.sum().backward()
        return y.detach(), a.grad

    assert all(torch.equal(p, q) for p, q in zip(run(1), run(1), strict=True))
    assert not torch.equal(run(1)[0], run(2)[0])


def test_compiled_group_equals_eager(backend, require):
    i = lora_linear_inputs((2, 9), 40, (50, 18, 7), (8, 3, 1), torch.float32, dropout_p=0.3)
    require(i)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x):
        return grouped_lora_linear(
            x, i.weights, i.lora_as, i.lora_bs, i.scalings,
            biases=i.biases, dropout_p=0.3, seed=i.seed, backend=backend,
        )  # fmt: skip

    for got, want in zip(step(i.x), lora_linear_op(i, backend, "").ys, strict=True):
        assert torch.equal(got, want)


def test_export_keeps_the_op():
    i = lora_linear_inputs(9, 40, 50, 8, torch.float32)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return lora_linear(x, i.weights[0], i.lora_as[0], i.lora_bs[0], 0.7, backend="aten")

    program = torch.export.export(Layer(), (i.x,))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert FWD in targets
    assert torch.equal(program.module()(i.x), Layer()(i.x))


def test_meta_tensors_give_shapes():
    i = lora_linear_inputs((2, 9), 40, 50, 8, torch.bfloat16)
    meta = [t.to("meta") for t in (i.x, i.weights[0], i.lora_as[0], i.lora_bs[0])]
    y = lora_linear(*meta, 0.7)
    assert (y.shape, y.dtype, y.device.type) == ((2, 9, 50), torch.bfloat16, "meta")
