"""Calls without gradients that the compiled library does whole: the bits of the long way, and its
answers to everything that is not plain."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lora_kernels as lk
from lora_kernels.errors import BackendUnavailableError, InvalidArgumentError
from lora_kernels.ops import (
    gated_activation,
    grouped_lora_linear,
    lora_linear,
    rms_norm,
)
from lora_kernels.ops._eager import library_call
from lora_kernels.ops.lora_linear import set_pack_policy

pytestmark = pytest.mark.skipif(
    library_call("lora_linear_eager") is None, reason="the compiled library is not there"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def layer(k, n, r, dtype, adapter=None, bias=True):
    adapter = adapter or dtype
    w = (torch.randn(n, k) / k**0.5).to(dtype)
    a, b = torch.randn(r, k).to(adapter), torch.randn(n, r).to(adapter)
    return w, a, b, torch.randn(n).to(dtype) if bias else None


def taken(x, members, scalings=None):
    """What the library answers by itself; None where it declines."""
    ws, as_, bs, biases = zip(*members, strict=True)
    scalings = scalings or (0.5,) * len(members)
    return library_call("lora_linear_eager")(x, ws, as_, bs, scalings, biases)


def with_gradients(x, members):
    ws, as_, bs, biases = zip(*members, strict=True)
    as_ = [a.clone().requires_grad_() for a in as_]
    return [
        y.detach() for y in grouped_lora_linear(x, ws, as_, bs, (0.5,) * len(ws), biases=biases)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapter", [None, torch.float32], ids=["same", "fp32"])
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [((1, 1), [(40, 3)]), ((2, 3), [(7, 1), (64, 5)]), ((5,), [(33, 4)]), ((2, 17, 3), [(9, 130)])],
)
def test_lora_linear_has_the_bits_of_the_long_way(isa, dtype, adapter, shape, sizes):
    torch.manual_seed(0)
    k = 37
    x = torch.randn(*shape, k).to(dtype)
    members = [layer(k, n, r, dtype, adapter, bias=g == 0) for g, (n, r) in enumerate(sizes)]
    want = with_gradients(x, members)  # which packs the weights, too
    got = taken(x, members)
    assert got is not None
    for y, z in zip(got, want, strict=True):
        assert y.dtype == dtype and y.shape == (*shape, y.shape[-1])
        assert torch.equal(y, z)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 5), (3,), (2, 4, 33)])
def test_norms_and_activations_have_the_bits_of_the_long_way(isa, dtype, shape):
    torch.manual_seed(0)
    x, up = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight = torch.randn(shape[-1])
    for w in (None, weight, weight.to(dtype)):
        y = library_call("rms_norm_eager")(x, w, 1e-6, 1.0)
        long = rms_norm(x.clone().requires_grad_(), w, 1e-6, 1.0).detach()
        assert y.shape == x.shape and torch.equal(y, long)
    for kind in ("silu", "gelu", "gelu_tanh", "relu", "relu_squared"):
        for u in (None, up, up.t().contiguous().t() if up.dim() == 2 else up):
            h = library_call("gated_activation_eager")(x, u, kind)
            long = gated_activation(x.clone().requires_grad_(), u, kind).detach()
            assert h.shape == x.shape and torch.equal(h, long)


def test_strides_that_only_a_copy_can_read():
    torch.manual_seed(0)
    x = torch.randn(37, 6).t()
    w, a, b, bias = layer(37, 40, 3, torch.float32)
    wide = torch.randn(40, 80)
    for weight in (w, wide[:, ::2][:, :37], wide[:, 3:40]):
        members = [(weight, a.t().contiguous().t(), b, bias)]
        got = taken(x, members)
        assert got is not None and torch.equal(got[0], with_gradients(x, members)[0])


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_what_is_not_plain_goes_the_long_way():
    torch.manual_seed(0)
    x = torch.randn(4, 37)
    member = layer(37, 40, 3, torch.float32)
    assert taken(x, [member]) is not None
    w, a, b, bias = member
    odd = {
        "a gradient": (x, (w, a.clone().requires_grad_(), b, bias)),
        "a gradient of x": (x.clone().requires_grad_(), member),
        "a trained weight": (x, (w.clone().requires_grad_(), a, b, bias)),
        "dtypes": (x.double(), tuple(t.double() for t in member)),
        "another dtype of W": (x, (w.bfloat16(), a, b, bias)),
        "K": (x[:, :36], member),
        "rank": (x, (w, a[:2], b, bias)),
        "bias": (x, (w, a, b, bias[:3])),
        "empty": (x[:0], member),
        "a scalar": (x[0, 0], member),
        "meta": (x.to("meta"), tuple(t.to("meta") for t in member)),
        "a subclass": (x.as_subclass(type("Own", (torch.Tensor,), {})), member),
    }
    for name, (given, changed) in odd.items():
        assert taken(given, [changed]) is None, name
    for scaling in (float("nan"), float("inf"), torch.ones(()), "1"):
        assert taken(x, [member], (scaling,)) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert taken(x, [member]) is None
    with Seen() as mode:
        assert taken(x, [member]) is None
        lora_linear(x, w, a, b, 0.5, bias=bias)
    assert any("lora_linear_fwd" in name for name in mode.names)
    assert torch.func.vmap(lambda row: torch.ones(()) * (taken(row, [member]) is None))(x).all()
    with torch.no_grad():
        assert taken(x.clone().requires_grad_(), [member]) is not None
    negated = torch.complex(x, x).conj().imag
    assert negated.is_neg() and taken(negated, [member]) is None
    assert torch.equal(lora_linear(negated, w, a, b, 0.5), lora_linear(-x, w, a, b, 0.5))


def test_the_environment_decides(monkeypatch):
    x, member = torch.randn(4, 37), layer(37, 40, 3, torch.float32)
    w, a, b, _ = member
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "triton")
    assert taken(x, [member]) is None
    with pytest.raises(BackendUnavailableError):
        lora_linear(x, w, a, b, 0.5)
    with pytest.raises(BackendUnavailableError):
        rms_norm(x)
    with pytest.raises(BackendUnavailableError):
        gated_activation(x)
    monkeypatch.delenv("LORA_KERNELS_BACKEND")
    monkeypatch.setenv("LORA_KERNELS_DISABLE", "cpu")
    assert taken(x, [member]) is None


def test_messages_stay():
    x = torch.randn(4, 37)
    w, a, b, bias = layer(37, 40, 3, torch.float32)
    with pytest.raises(InvalidArgumentError, match="lora_b has shape"):
        lora_linear(x, w, a, b[:, :2], 0.5, bias=bias)
    with pytest.raises(InvalidArgumentError, match="eps"):
        rms_norm(x, eps=-1.0)
    with pytest.raises(InvalidArgumentError, match="kind"):
        gated_activation(x, kind="swish")


def test_a_changed_weight_is_packed_again():
    if lk.explain("lora_linear", M=8, K=64, N=64, dtype=torch.bfloat16)["backend"] != "cpu":
        pytest.skip("no packed copies are kept on this machine")
    torch.manual_seed(0)
    set_pack_policy(None)
    x = torch.randn(8, 64).bfloat16()
    w, a, b, bias = layer(64, 64, 4, torch.bfloat16)
    assert taken(x, [(w, a, b, bias)]) is None  # nothing packed yet
    first = lora_linear(x, w, a, b, 0.5, bias=bias)
    again = taken(x, [(w, a, b, bias)])
    assert again is not None and torch.equal(again[0], first)
    w.mul_(2)
    assert taken(x, [(w, a, b, bias)]) is None
    doubled = lora_linear(x, w, a, b, 0.5, bias=bias)
    assert not torch.equal(doubled, first)
    w.data.mul_(0.5)  # past the version counter, as PEFT merges
    assert torch.equal(lora_linear(x, w, a, b, 0.5, bias=bias), first)
    set_pack_policy(None)
