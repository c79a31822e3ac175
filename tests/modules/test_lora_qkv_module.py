"""LoRAQKV and LoRAAttention on the op that projects and rotates in one call."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import lora_kernels as lk
from lora_kernels.modules import lora_qkv as module
from lora_kernels.testing import assert_within_budget

SIZES = {"hidden_size": 48, "num_heads": 6, "num_kv_heads": 2}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    count = {"lora_qkv": 0, "rope": 0}
    for name in count:
        op = getattr(module, name)

        def counted(*args: object, _op=op, _name=name, **kwargs: object) -> object:
            count[_name] += 1
            return _op(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    return count


def build(cls: type = lk.LoRAQKV, dtype: torch.dtype = torch.float32, **options: object):
    torch.manual_seed(0)
    made = cls(**SIZES, r=4, dtype=dtype, **options)
    for name, p in made.named_parameters():
        with torch.no_grad():
            if "lora_B" in name:
                p.normal_(std=0.3)
    return made


def inputs(dtype: torch.dtype, S: int = 7, R: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, S, 48, generator=generator, dtype=torch.float64).to(dtype)
    angle = torch.rand(S, R // 2, generator=generator)
    return x, torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)


def outcome(qkv: torch.nn.Module, x: Tensor, *tables: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    outs = qkv(x, *tables)
    outs = outs if isinstance(outs, tuple) else (outs,)
    generator = torch.Generator().manual_seed(2)
    total = sum(
        (t.double() * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum()
        for t in outs
    )
    total.backward()
    grads = {n: p.grad for n, p in qkv.named_parameters() if p.grad is not None}
    qkv.zero_grad()
    return {"dx": x.grad, **{f"out{i}": t.detach() for i, t in enumerate(outs)}, **grads}


def apart(qkv: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(qkv), "_rotated_projections", lambda *_: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"fused_qkv": True}, {"interleaved": True}], ids=str)
@pytest.mark.parametrize("R", [8, 6])
def test_the_same_numbers_as_apart(R, options, dtype, calls, monkeypatch):
    qkv = build(dtype=dtype, **options)
    i, wide = inputs(dtype, R=R), inputs(torch.float64, R=R)
    got = outcome(qkv, *i)
    assert calls == {"lora_qkv": 1, "rope": 0}
    double = copy.deepcopy(qkv).double()
    apart(qkv, monkeypatch)
    low, exact = outcome(qkv, *i), outcome(double, i[0].double(), *wide[1:])
    assert calls == {"lora_qkv": 1, "rope": 2}
    assert got.keys() == low.keys() == exact.keys()
    for name, t in got.items():
        assert_within_budget(t, exact[name], low[name], name, 3.0)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_dropout_draws_what_it_drew(rate, calls, monkeypatch):
    qkv, i = build(dropout=rate), inputs(torch.float32)
    torch.manual_seed(5)
    got = qkv(*i)
    apart(qkv, monkeypatch)
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(got, qkv(*i), strict=True))
    assert calls == {"lora_qkv": 1, "rope": 1}


def test_positions_and_packed_rows(calls):
    qkv, (x, cos, sin) = build(), inputs(torch.float32)
    ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    want = qkv(x, cos[ids[0]], sin[ids[0]])
    for given, positions in ((x, ids), (x, ids[0]), (x[0], ids[0])):
        got = qkv(given, cos, sin, positions)
        first = [t if given.dim() == 3 else t[0] for t in want]
        assert all(torch.equal(a, b) for a, b in zip(got, first, strict=True))
    assert calls["rope"] == 0


@pytest.mark.parametrize(
    "options",
    [{"qk_norm": True}, {"r": {"q_proj": 4, "v_proj": 4}}, {"dropout": {"q_proj": 0.5}}],
    ids=str,
)
def test_what_has_to_be_calls_of_its_own(options, calls):
    torch.manual_seed(0)
    qkv = lk.LoRAQKV(**SIZES, **options)
    q, k, v = qkv(*inputs(torch.float32))
    assert calls == {"lora_qkv": 0, "rope": 1} and q.shape == (2, 7, 6, 8)
    assert k.shape == v.shape == (2, 7, 2, 8)


def test_hooks_run_and_merged_layers_compute_by_themselves(calls):
    qkv, i = build(), inputs(torch.float32)
    want = qkv(*i)
    seen = []
    handle = qkv.k_proj.register_forward_hook(lambda *_: seen.append(1))
    got = qkv(*i)
    assert seen == [1] and calls == {"lora_qkv": 1, "rope": 1}
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_without_a_rotation_nothing_is_rotated(calls):
    qkv, (x, *_) = build(), inputs(torch.float32)
    qkv(x)
    assert calls == {"lora_qkv": 0, "rope": 0}


def test_attention_uses_it_too(calls, monkeypatch):
    block, i = build(lk.LoRAAttention), inputs(torch.float32)
    got = outcome(block, *i)
    assert calls == {"lora_qkv": 1, "rope": 0}
    double = copy.deepcopy(block).double()
    apart(block, monkeypatch)
    low, exact = outcome(block, *i), outcome(double, *inputs(torch.float64))
    for name, t in got.items():
        assert_within_budget(t, exact[name], low[name], name, 3.0)


def test_compiled_modules_trace_the_parts(calls):
    qkv, i = build(), inputs(torch.float32)
    want = outcome(qkv, *i)
    torch._dynamo.reset()
    got = outcome(torch.compile(qkv, fullgraph=True, backend="aot_eager"), *i)
    torch._dynamo.reset()
    assert calls["lora_qkv"] == 1
    assert {name.removeprefix("_orig_mod.") for name in got} == set(want)
    assert all(torch.equal(t, want[name.removeprefix("_orig_mod.")]) for name, t in got.items())
