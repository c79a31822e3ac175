"""Modules with a norm in front of their projections, which makes S of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.errors import InvalidArgumentError
from lora_kernels.modules import input_norm
from lora_kernels.testing import BudgetExceededError, assert_within_budget

WIDTH = 24
MAKERS = {
    "qkv": lambda **k: lk.LoRAQKV(WIDTH, 4, 2, r={"q_proj": 3, "k_proj": 2, "v_proj": 5}, **k),
    "q and v": lambda **k: lk.LoRAQKV(WIDTH, 4, 2, r={"q_proj": 3, "v_proj": 5}, qk_norm=True, **k),
    "joint": lambda **k: lk.LoRAQKV(WIDTH, 4, 2, r=4, fused_qkv=True, **k),
    "attention": lambda **k: lk.LoRAAttention(WIDTH, 4, 2, r=4, **k),
    "mlp": lambda **k: lk.LoRAMLP(WIDTH, 40, r=4, **k),
    "mlp, kept": lambda **k: lk.LoRAMLP(WIDTH, 40, "gelu", r=4, recompute=False, **k),
    "mlp, plain gate": lambda **k: lk.LoRAMLP(WIDTH, 40, r={"up_proj": 4, "down_proj": 3}, **k),
    "mlp, two layers": lambda **k: lk.LoRAMLP(WIDTH, 40, "gelu", gated=False, r=4, **k),
}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Columns of each S that a norm made."""
    found, op = [], input_norm.rms_norm

    def recorded(*args: Any, **kwargs: Any) -> Any:
        y, s = op(*args, **kwargs)
        found.append(s.shape[-1])
        return y, s

    monkeypatch.setattr(input_norm, "rms_norm", recorded)
    return found


def module(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    built = MAKERS[name](input_norm=True, **options)
    with torch.no_grad():
        for key, p in built.named_parameters():
            if "lora_B" in key or "norm" in key:
                p.copy_(torch.rand_like(p) + 0.5)
    return built


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    y = model(x)
    y = torch.cat([t.flatten() for t in (y if isinstance(y, tuple) else (y,))])
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad} | grads


def assert_same(got: dict, low: dict, exact: dict) -> None:
    assert got.keys() == low.keys() == exact.keys()
    for name, value in got.items():
        assert value.dtype == low[name].dtype
        assert_within_budget(value, exact[name], low[name], name, 2.0 if name == "y" else 3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MAKERS)
def test_results_and_gradients(name: str, dtype: torch.dtype, made: list[int]) -> None:
    ours = module(name, fused_shrink=True).to(dtype)
    stock = copy.deepcopy(ours)
    stock.fused_shrink = False
    x = torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)
    exact, low = results(copy.deepcopy(stock).double(), x.double()), results(stock, x)
    assert made == []
    got = results(ours, x)
    assert len(made) == 1
    assert_same(got, low, exact)


def test_a_planted_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = module("qkv", fused_shrink=True)
    x = torch.randn(3, 7, WIDTH)
    exact = results(copy.deepcopy(model).double(), x.double())
    model.fused_shrink = False
    low = results(model, x)
    model.fused_shrink, op = True, input_norm.rms_norm
    monkeypatch.setattr(
        input_norm, "rms_norm", lambda *a, **k: (lambda y, s: (y, 1.1 * s))(*op(*a, **k))
    )
    with pytest.raises(BudgetExceededError):
        assert_same(results(model, x), low, exact)


@pytest.mark.parametrize("why", ["auto", "dropout", "disabled", "hook", "autocast", "inference"])
def test_calls_in_which_the_layers_make_it(why: str, made: list[int]) -> None:
    options: dict[str, Any] = {"dropout": 0.3} if why == "dropout" else {}
    model = module("mlp", fused_shrink="auto" if why == "auto" else True, **options)
    x = torch.randn(5, WIDTH)
    if why == "disabled":
        model.gate_proj.adapter_enabled = model.up_proj.adapter_enabled = False
    if why == "hook":
        model.input_norm.register_forward_hook(lambda m, a, y: 2.0 * y)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"),
        torch.inference_mode(why == "inference"),
    ):
        torch.manual_seed(3)
        y = model(x)
        model.fused_shrink = False
        torch.manual_seed(3)
        assert torch.equal(model(x), y)
    assert made == []


def test_existing_layers_other_norms_and_a_wrong_switch(made: list[int]) -> None:
    layers = [lk.LoRALinear(WIDTH, 8, r=2) for _ in range(3)]
    norm = nn.LayerNorm(WIDTH)
    x = torch.randn(4, WIDTH)
    for front, count in ((norm, 0), (nn.RMSNorm(WIDTH), 1)):
        model = lk.LoRAQKV.from_layers(
            *layers, num_heads=2, input_norm=front, fused_shrink=True
        )  # fmt: skip
        q, _, _ = model(x)
        assert len(made) == count
        assert_within_budget(
            q.flatten(-2), copy.deepcopy(layers[0]).double()(front.double()(x.double())),
            layers[0](front.float()(x)), "q",
        )  # fmt: skip
    with pytest.raises(InvalidArgumentError, match="fused_shrink='always'; accepted: True, False"):
        lk.LoRAMLP(WIDTH, 40, fused_shrink="always")
