"""PEFT's DoRA layers on the fused op: outputs and every gradient, against fp64."""

from __future__ import annotations

import pytest
import torch
from peft_models import CASES, Calls, as_fp64, layer, lora_config, mlp, run
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.testing import BudgetExceededError, assert_within_budget


def results(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    module.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    y = module(x)
    y.backward(dy.to(y.dtype))
    grads = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad} | grads


def dora(**overrides: object) -> nn.Module:
    """With magnitudes that differ from the norms."""
    model = mlp(use_dora=True, **overrides)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name:
                p.mul_(torch.rand(p.shape) + 0.5)
    return model


@pytest.mark.parametrize("target", ["up", "mid"])
@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
)
def test_layer(base: torch.dtype, adapter: torch.dtype, target: str, fused_calls: Calls) -> None:
    model = dora()
    module = layer(model, target).to(base)
    for part in (module.lora_A, module.lora_B, module.lora_magnitude_vector):
        part.to(adapter)
    x = torch.randn(2, 65, module.in_features).to(base)
    dy = torch.randn(2, 65, module.out_features).to(base)
    reference = results(as_fp64(module), x.double(), dy.double())
    stock = results(module, x, dy)
    with lk.applied(model) as report:
        assert len(report.fused) == 3
        fused = results(module, x, dy)
    assert fused_calls.take() == 1
    low = {n: t if n in ("y", "dx") else t.to(base) for n, t in stock.items()}
    assert fused.keys() == stock.keys() and len(fused) == 5
    for name, value in fused.items():
        assert value.dtype == stock[name].dtype, name
        assert_within_budget(value, reference[name], low[name], name)


def test_model_switching_and_merging(fused_calls: Calls) -> None:
    case = CASES["gpt2"]
    model, inputs = case.peft_model(use_dora=True), case.inputs()
    reference, stock = run(as_fp64(model), inputs), run(model, inputs)
    report = lk.apply(model)
    assert len(report.fused) == case.layers
    fused = run(model, inputs)
    assert fused_calls.take() == case.layers
    for name, value in fused.items():
        assert_within_budget(value, reference[name], stock[name], name)
    with model.disable_adapter():
        model(**inputs)
    model.merge_adapter()
    merged = model(**inputs).logits
    assert fused_calls.take() == 0
    assert_within_budget(merged, reference["logits"], stock["logits"], factor=4.0)
    model.unmerge_adapter()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "magnitude" in n).mul_(1.5)
    with pytest.raises(BudgetExceededError):
        assert_within_budget(model(**inputs).logits, reference["logits"], stock["logits"])


def test_dropout_passes_through_the_base_weight(fused_calls: Calls) -> None:
    """At rate 1 PEFT leaves the base layer; at less the mean over many draws is that of stock."""
    model = dora(lora_dropout=1.0).train()
    up, x = layer(model, "up"), torch.randn(9, 20)
    stock = up(x)
    lk.apply(model)
    assert_within_budget(up(x), stock.double(), stock)
    assert fused_calls.take() == 1
    up.lora_dropout["default"].p = 0.3
    with torch.no_grad():
        fused = torch.stack([up(x) for _ in range(2000)])
        lk.unapply(model)
        torch_draws = torch.stack([up(x) for _ in range(2000)])
    error = (fused.mean(0) - torch_draws.mean(0)) / (fused.std(0) + torch_draws.std(0))
    assert error.abs().mean() < 0.05
    assert 0.9 < (fused.std(0) / torch_draws.std(0)).mean() < 1.1


def test_autocast(fused_calls: Calls) -> None:
    model = dora()
    module = layer(model, "up")
    x, dy = torch.randn(33, 20), torch.randn(33, 37)
    reference = results(as_fp64(module), x.double(), dy.double())
    with torch.autocast("cpu", torch.bfloat16):
        stock = results(module, x, dy)
        lk.apply(model)
        fused = results(module, x, dy)
    assert fused_calls.take() == 1
    for name, value in fused.items():
        assert value.dtype == stock[name].dtype, name
        assert_within_budget(value, reference[name], stock[name].bfloat16(), name)


def test_hooks_on_the_magnitude_keep_the_layer_stock(fused_calls: Calls) -> None:
    model, x, seen = dora(), torch.randn(5, 20), []
    lk.apply(model)
    up = layer(model, "up")
    handle = up.lora_magnitude_vector["default"].register_forward_hook(lambda *_: seen.append(1))
    up(x)
    assert seen == [1] and fused_calls.take() == 0
    handle.remove()
    up(x)
    assert fused_calls.take() == 1


def test_a_dora_and_a_plain_adapter_take_turns(fused_calls: Calls) -> None:
    model, x = dora(), torch.randn(5, 20)
    model.add_adapter("plain", lora_config(target_modules=["up", "mid", "down"]))
    found = []
    for fuse in (False, True):
        if fuse:
            lk.apply(model)
        for name in ("default", "plain"):
            model.set_adapter(name)
            found.append(model(x).detach())
    assert fused_calls.take() == 6
    double = as_fp64(model)
    lk.unapply(double)
    for i, name in enumerate(("default", "plain")):
        double.set_adapter(name)
        assert_within_budget(found[2 + i], double(x.double()).detach(), found[i])
