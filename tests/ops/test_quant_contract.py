"""The registered ops of quant_linear: gradcheck, opcheck, fakes, torch.compile, bad arguments."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import lora_kernels as lk
from lora_kernels.errors import BackendUnavailableError, InvalidArgumentError
from lora_kernels.ops import _registry, quant_linear, quant_lora_linear
from lora_kernels.ops.quant_linear.problem import FORMAT_NAMES
from lora_kernels.testing import assert_within_budget, quant_linear_inputs

OPS = torch.ops.lora_kernels
FWD = OPS.quant_linear_fwd.default
BWD = OPS.quant_linear_bwd.default
DEQUANTIZE = OPS.quant_dequantize.default
SPEC = _registry.find("quant_linear")


@pytest.fixture(params=SPEC.backends)
def backend(request: pytest.FixtureRequest) -> str:
    name = request.param
    able, why = SPEC.supports(name, SPEC.problem(M=9, K=20, N=33, rank=3))
    if not able:
        pytest.skip(f"{name}: {why}")
    return name


def fwd_args(i, backend, adapter=True):
    d = i.dense
    seed = torch.tensor(d.seed) if d.dropout_p else None
    a, b = (d.lora_as[0], d.lora_bs[0]) if adapter else (None, None)
    return (
        d.x, list(i.q.parts), i.q.spec.key, d.biases[0], a, b, 0.7, d.dropout_p, seed, backend,
    )  # fmt: skip


def bwd_args(i, backend, adapter=True, needs=(True, True, True)):
    d = i.dense
    _, parts, key, _, a, b, scaling, p, seed, name = fwd_args(i, backend, adapter)
    _, s = FWD(*fwd_args(i, backend, adapter))
    x = d.x if adapter else None
    return d.dys[0], x, parts, key, a, b, s, scaling, p, seed, *needs, name


def test_registry_names_the_registered_ops():
    assert SPEC.schemas == (DEQUANTIZE.name(), FWD.name(), BWD.name())


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_opcheck(backend, layout, dropout_p, adapter):
    i = quant_linear_inputs(9, 20, 33, 3, torch.float32, layout=layout, dropout_p=dropout_p)
    opcheck(FWD, fwd_args(i, backend, adapter))
    opcheck(BWD, bwd_args(i, backend, adapter))


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_opcheck_of_dequantize(backend, format):
    q = lk.ops.quantize(torch.randn(33, 50), format)
    arguments = (list(q.parts), q.spec.key, torch.bfloat16, backend)
    if format.startswith("fp8"):  # the schema test of torch multiplies arguments, fp8 cannot
        rest = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        opcheck(DEQUANTIZE, arguments, test_utils=rest)
    else:
        opcheck(DEQUANTIZE, arguments)


@pytest.mark.parametrize("format", ["nf4", "int8", "int4", "fp8"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("backend", ["reference", "aten"])
def test_gradcheck(backend, dropout_p, format):
    i = quant_linear_inputs(6, 7, 9, 3, torch.float64, format=format, dropout_p=dropout_p)
    d = i.dense
    leaves = [t.requires_grad_() for t in (d.x, d.lora_as[0], d.lora_bs[0], d.biases[0])]

    def op(x, a, b, bias):
        return quant_lora_linear(
            x, i.q, a, b, 0.7, bias=bias, dropout_p=dropout_p, seed=3, backend=backend
        )

    assert torch.autograd.gradcheck(op, leaves)
    assert torch.autograd.gradcheck(
        lambda x, c: quant_linear(x, i.q, c, backend=backend), [leaves[0], leaves[3]]
    )


def layout_of(t):
    return tuple(t.shape), t.stride(), t.dtype, t.device.type


@pytest.mark.parametrize("m", [0, 1, 9])
@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, True)])
def test_fakes_match_the_real_outputs(backend, m, adapter, needs):
    i = quant_linear_inputs(m, 20, 33, 3, torch.bfloat16, adapter_dtype=torch.float32)
    real = [FWD(*fwd_args(i, backend, adapter)), BWD(*bwd_args(i, backend, adapter, needs))]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(value):
            if isinstance(value, torch.Tensor):
                return mode.from_tensor(value)
            return [fake(v) for v in value] if isinstance(value, list) else value

        f, b = fwd_args(i, backend, adapter), bwd_args(i, backend, adapter, needs)
        faked = [FWD(*map(fake, f)), BWD(*map(fake, b))]
    for got, want in zip(faked, real, strict=True):
        assert [layout_of(t) for t in got] == [layout_of(t) for t in want]


def test_outputs_do_not_alias_inputs(backend):
    i = quant_linear_inputs(5, 20, 20, 3, torch.float32)
    ins = {t.untyped_storage().data_ptr() for t in (i.dense.x, *i.q.parts, *i.dense.lora_as)}
    outs = [*FWD(*fwd_args(i, backend)), *BWD(*bwd_args(i, backend))]
    pointers = [t.untyped_storage().data_ptr() for t in outs]
    assert not ins & set(pointers) and len(set(pointers)) == len(pointers)


def test_compile_once_for_every_m_scaling_and_layer(backend):
    """Layers of one spec share a graph: the weight's statistics are tensors, not constants."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def step(x, q, a, b, bias, scaling):
        return quant_lora_linear(x, q, a, b, scaling, bias=bias, backend=backend)

    compiled = None
    for m, scaling in ((7, 0.5), (33, 0.5), (12, 2.0), (64, -1.25)):
        i = quant_linear_inputs((m,), 40, 50, 8, torch.float32, scaling=scaling, generator_seed=m)
        d = i.dense
        x, a, b = (t.clone().requires_grad_() for t in (d.x, d.lora_as[0], d.lora_bs[0]))
        y = step(x, i.q, a, b, d.biases[0], scaling)
        y.backward(d.dys[0])
        w = d.weights[0]
        exact = d.x.double() @ (w.double() + scaling * b.double() @ a.double()).t() + d.biases[0]
        low = d.x @ w.t() + scaling * (d.x @ a.t() @ b.t()) + d.biases[0]
        assert_within_budget(y, exact.detach(), low.detach(), f"M={m}")
        assert all(t.grad is not None for t in (x, a, b))
        compiled = compiled or counter.frame_count
        assert counter.frame_count == compiled, f"compiled again for M={m}, scaling={scaling}"


@pytest.mark.slow
def test_compile_with_inductor(backend):
    i = quant_linear_inputs(7, 40, 50, 8, torch.float32)
    torch._dynamo.reset()
    step = torch.compile(lambda x: quant_linear(x, i.q, backend=backend).sum(), fullgraph=True)
    assert torch.equal(step(i.dense.x), quant_linear(i.dense.x, i.q, backend=backend).sum())


def test_export_keeps_the_op():
    q = lk.ops.quantize(torch.randn(50, 40))

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = lk.QuantLinear.from_quantized(q)

        def forward(self, x):
            return self.layer(x)

    x = torch.randn(9, 40)
    program = torch.export.export(Layer(), (x,))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert FWD in targets
    assert torch.equal(program.module()(x), Layer()(x))


def test_meta_tensors_give_shapes():
    i = quant_linear_inputs((2, 9), 40, 50, 8, torch.bfloat16)
    d = i.dense
    x, a, b = (t.to("meta") for t in (d.x, d.lora_as[0], d.lora_bs[0]))
    y = quant_lora_linear(x, i.q.to("meta"), a, b, 0.7)
    assert (y.shape, y.dtype, y.device.type) == ((2, 9, 50), torch.bfloat16, "meta")


def test_dropout_draws_what_lora_linear_draws(backend):
    i = quant_linear_inputs(33, 128, 50, 8, torch.float32, dropout_p=0.4)
    d = i.dense
    zero = torch.zeros_like(d.weights[0])
    q = lk.ops.quantize(zero)
    a, b = d.lora_as[0], d.lora_bs[0]
    ours = quant_lora_linear(d.x, q, a, b, 1.0, dropout_p=0.4, seed=11, backend=backend)
    dense = lk.ops.lora_linear(d.x, zero, a, b, 1.0, dropout_p=0.4, seed=11, backend="aten")
    other = lk.ops.lora_linear(d.x, zero, a, b, 1.0, dropout_p=0.4, seed=12, backend="aten")
    exact = lk.ops.lora_linear(
        d.x.double(), zero.double(), a.double(), b.double(), 1.0, dropout_p=0.4, seed=11,
        backend="reference",
    )  # fmt: skip
    assert_within_budget(ours, exact, dense, "with dropout")
    assert (dense - other).norm() > 0.5 * dense.norm()


def test_autocast_and_checkpointing(backend):
    i = quant_linear_inputs(9, 40, 50, 8, torch.float32, dropout_p=0.3)
    d, q = i.dense, i.q
    a, b = d.lora_as[0].requires_grad_(), d.lora_bs[0]
    with torch.autocast("cpu", torch.bfloat16):
        y = quant_lora_linear(d.x, q, a, b, 0.7, backend=backend)
    assert y.dtype == torch.bfloat16

    def layer(x):
        return quant_lora_linear(x, q, a, b, 0.7, dropout_p=0.3, backend=backend)

    x = d.x.clone().requires_grad_()
    torch.manual_seed(5)
    layer(x).sum().backward()
    plain, x.grad = x.grad, None
    torch.manual_seed(5)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, plain)


def test_second_derivatives_are_refused():
    i = quant_linear_inputs(3, 20, 8, 2, torch.float32)
    x = i.dense.x.clone().requires_grad_()
    y = quant_linear(x, i.q)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        g.sum().backward()


Q = lk.ops.quantize(torch.randn(33, 64))
X, A, B = torch.randn(5, 64), torch.randn(4, 64), torch.randn(33, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X, torch.randn(33, 64), A, B, 1.0), {}, "q is a Tensor"),
        ((X[:, :63], Q, A, B, 1.0), {}, r"x has shape \[5, 63\]"),
        ((X.int(), Q, A, B, 1.0), {}, "x has dtype"),
        ((X.to("meta"), Q, A, B, 1.0), {}, "q is on cpu but x is on meta"),
        ((X, Q, A[:, :63], B, 1.0), {}, "lora_a has shape"),
        ((X, Q, A, B[:, :3], 1.0), {}, "lora_b has shape"),
        ((X, Q, None, B, 1.0), {}, "lora_a is None"),
        ((X, Q, A, B, float("nan")), {}, "scaling=nan"),
        ((X, Q, A, B, torch.ones(())), {}, "scaling is a tensor"),
        ((X, Q, A, B, 1.0), {"bias": torch.ones(32)}, "bias has shape"),
        ((X, Q, A, B, 1.0), {"dropout_p": 1.5}, "dropout_p=1.5"),
        ((X, Q, A, B, 1.0), {"dropout_p": 0.5, "seed": -1}, "seed=-1"),
        ((X, Q, A, B, 1.0), {"dropout_p": 0.5, "seed": 0.5}, "seed=0.5"),
        ((X, Q, A, B, 1.0), {"backend": "turbo"}, "backend='turbo'"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, options, message):
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        quant_lora_linear(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_a_backend_by_name_never_falls_back():
    with pytest.raises(BackendUnavailableError, match="backend='cuda' cannot run this problem"):
        quant_linear(X, Q, backend="cuda")
    with pytest.raises(InvalidArgumentError, match=r"q has shape \[3, 4, 16\]"):
        quant_linear(X, lk.ops.quantize(torch.randn(3, 4, 16)))
    with pytest.raises(InvalidArgumentError, match="dtype"):
        lk.ops.dequantize(Q, dtype=torch.int8)
    with pytest.raises(InvalidArgumentError, match="format='nf3'"):
        lk.explain("quant_linear", M=1, K=8, N=8, format="nf3")
    answer = lk.explain("quant_linear", M=1, K=64, N=64, format="int4", dtype="bfloat16")
    assert answer["backend"] in ("aten", "cpu") and answer["reason"]
