"""DoRA layers with one input: computed together without dropout, against fp64."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from peft_models import QkvBlock, as_fp64, layer, lora_config, results
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.errors import InvalidArgumentError
from lora_kernels.modules import blocks, layer_group
from lora_kernels.ops.dora_linear import grouped_dora_linear
from lora_kernels.testing import BudgetExceededError, assert_within_budget

NAMES = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_rows", blocks.rows())
    blocks.register_block(QkvBlock, NAMES)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes, op = [], layer_group.grouped_dora_linear

    def recorded(x: Tensor, weights, *args, **kwargs) -> list[Tensor]:
        sizes.append(len(weights))
        return op(x, weights, *args, **kwargs)

    monkeypatch.setattr(layer_group, "grouped_dora_linear", recorded)
    return sizes


def block(*targets: str, dtype: torch.dtype = torch.float32, **overrides: object) -> nn.Module:
    """With magnitudes that differ from the norms."""
    torch.manual_seed(0)
    settings = {"target_modules": list(targets or NAMES), "use_dora": True} | overrides
    model = get_peft_model(QkvBlock().to(dtype), lora_config(**settings))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name:
                p.mul_(torch.rand(p.shape) + 0.5)
    return model


def assert_same(got: dict, stock: dict, reference: dict, dtype: torch.dtype) -> None:
    assert got.keys() == stock.keys() == reference.keys()
    for name, value in got.items():
        assert value.dtype == stock[name].dtype
        assert_within_budget(value, reference[name], stock[name].to(dtype), name)


@pytest.mark.parametrize("frozen", ["", "magnitude", "lora_A"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_and_gradients(dtype, frozen, calls):
    model = block(dtype=dtype, rank_pattern={"k_proj": 7}, alpha_pattern={"v_proj": 3})
    for name, p in model.named_parameters():
        if frozen and frozen in name and "q_proj" in name:
            p.requires_grad_(False)
    x = torch.randn(3, 11, 48).to(dtype)
    reference, stock = results(as_fp64(model), x.double()), results(model, x)
    (group,) = lk.apply(model).groups
    assert (group["members"], group["status"]) == (list(NAMES), "fused")
    assert_same(results(model, x), stock, reference, dtype)
    assert calls == [3]
    with torch.no_grad():
        for p in layer(model, "v_proj").lora_magnitude_vector.parameters():
            p.mul_(1.5)
    with pytest.raises(BudgetExceededError):
        assert_same(results(model, x), stock, reference, dtype)


def test_autocast_and_no_gradients(calls):
    model, x = block(), torch.randn(9, 48)
    reference = results(as_fp64(model), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        stock = results(model, x)
        lk.apply(model)
        fused = results(model, x)
        with torch.no_grad():
            again = model(x)
    assert calls == [3, 3] and torch.equal(again, fused["y"])
    assert_same(fused, stock, reference, torch.bfloat16)


def test_layers_that_stay_by_themselves(calls):
    (group,) = lk.apply(block(lora_dropout=0.1)).groups
    assert "DoRA with dropout" in group["reason"]
    (group,) = lk.apply(block("v_proj", dtype=torch.bfloat16)).groups
    assert group["reason"] == "only v_proj has an adapter"
    model = block("q_proj", "k_proj")
    model.add_adapter("plain", lora_config(target_modules=["v_proj"]))
    model.base_model.set_adapter(["default", "plain"])
    (group,) = lk.apply(model).groups
    assert group["reason"] == "some of the adapters are DoRA"
    model = block()
    lk.apply(model)
    layer(model, "q_proj").lora_dropout["default"] = nn.Dropout(0.5)
    model.train()(torch.randn(3, 48))
    layer(model, "k_proj").base_layer.weight.requires_grad_()
    model.eval()(torch.randn(3, 48)).sum().backward()
    assert layer(model, "k_proj").base_layer.weight.grad is not None and calls == []


def test_compiled_one_by_one():
    torch.compiler.reset()
    model = block()
    lk.apply(model)
    x = torch.randn(5, 48, requires_grad=True)
    want = torch.autograd.grad(model(x).square().sum(), x)[0]
    graph = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(graph(x).square().sum(), x)[0]
    assert_within_budget(got, want.double(), want)


def test_layers_of_this_package(calls):
    torch.manual_seed(0)
    layers = [lk.LoRALinear(48, n, r=4, dora=True, bias=True) for n in (48, 24, 24)]
    for made in layers:
        nn.init.normal_(made.lora_B, std=0.3)
    m = lk.LoRAQKV.from_layers(*layers, num_heads=4, num_kv_heads=2)
    x = torch.randn(2, 5, 48)
    got = [t.flatten(2) for t in m(x)]
    want = [made(x) for made in layers]
    assert calls == [3]
    for a, b, made in zip(got, want, layers, strict=True):
        twin = as_fp64(made)
        assert_within_budget(a, twin(x.double()).detach(), b.detach())


def test_messages():
    w, a, b, m = torch.zeros(6, 8), torch.zeros(2, 8), torch.zeros(6, 2), torch.ones(6)
    x = torch.randn(3, 8)
    with pytest.raises(InvalidArgumentError, match="one entry per member; got weights=2, lora_as"):
        grouped_dora_linear(x, [w, w], [a], [b], [m], [1.0])
    with pytest.raises(InvalidArgumentError, match="magnitude has shape"):
        grouped_dora_linear(x, [w], [a], [b], [m[:5]], [1.0])
    with pytest.raises(InvalidArgumentError, match="scaling=nan"):
        grouped_dora_linear(x, [w], [a], [b], [m], [float("nan")])
    with pytest.raises(InvalidArgumentError, match=r"weights\[0\] requires a gradient"):
        grouped_dora_linear(x, [w.clone().requires_grad_()], [a], [b], [m], [1.0])
    assert grouped_dora_linear(x[:0], [w], [a], [b], [m], [1.0])[0].shape == (0, 6)
