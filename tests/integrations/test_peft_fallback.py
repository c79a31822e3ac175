"""What cannot be fused runs PEFT's forward, with the reason said once; strict mode raises."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from peft import IA3Config, get_peft_model
from peft.tuners.lora.layer import Linear
from peft_models import CASES, Calls, Mlp, layer, lora_config, mlp
from torch import nn
from torch.nn.utils import parametrizations, prune

import lora_kernels as lk
from lora_kernels.errors import StrictFallbackError
from lora_kernels.integrations.peft import FusedLoraLinear

Change = Callable[[nn.Module], None]


class _Subclass(nn.Linear):
    pass


class _Marked(torch.Tensor):
    pass


def _hook(*args: object) -> None:
    return None


def _become_subclass(up: nn.Module) -> None:
    up.base_layer.__class__ = _Subclass


def _zero_partition(up: nn.Module) -> None:
    up.base_layer.weight.ds_id = 7


def _own_forward(up: nn.Module) -> None:
    up.lora_A["default"].forward = up.lora_A["default"].forward


# Name -> (change of the LoRA layer `up`, its reason).
LAYER_CASES: dict[str, tuple[Change, str]] = {
    "forward hook on base_layer": (
        lambda up: up.base_layer.register_forward_hook(_hook),
        "base_layer has hooks, which run only when it is called",
    ),
    "forward pre-hook on lora_A": (
        lambda up: up.lora_A["default"].register_forward_pre_hook(_hook),
        "lora_A has hooks, which run only when it is called",
    ),
    "backward hook on lora_B": (
        lambda up: up.lora_B["default"].register_full_backward_hook(_hook),
        "lora_B has hooks, which run only when it is called",
    ),
    "backward pre-hook on lora_dropout": (
        lambda up: up.lora_dropout["default"].register_full_backward_pre_hook(_hook),
        "lora_dropout has hooks, which run only when it is called",
    ),
    "pruned base_layer": (
        lambda up: prune.l1_unstructured(up.base_layer, "weight", 0.5),
        "base_layer has hooks, which run only when it is called",
    ),
    "accelerate-style forward on lora_A": (
        _own_forward,
        "lora_A has a forward of its own on the instance",
    ),
    "subclass of nn.Linear": (
        _become_subclass,
        "base_layer is test_peft_fallback._Subclass, not torch.nn.Linear",
    ),
    "parametrized base_layer": (
        lambda up: parametrizations.weight_norm(up.base_layer),
        "base_layer is torch.nn.utils.parametrize.ParametrizedLinear, not torch.nn.Linear",
    ),
    "lora_A of another class": (
        lambda up: up.lora_A.update({"default": _Subclass(20, 4, bias=False)}),
        "lora_A or lora_B is test_peft_fallback._Subclass, not torch.nn.Linear",
    ),
    "lora_A with a bias": (
        lambda up: up.lora_A.update({"default": nn.Linear(20, 4)}),
        "lora_A has a bias",
    ),
    "another dropout": (
        lambda up: up.lora_dropout.update({"default": nn.AlphaDropout(0.0)}),
        "lora_dropout is torch.nn.modules.dropout.AlphaDropout, not torch.nn.Dropout",
    ),
    "dropout in place": (
        lambda up: up.lora_dropout.update({"default": nn.Dropout(0.0, inplace=True)}),
        "lora_dropout works in place",
    ),
    "tensor parallel": (
        lambda up: setattr(up.base_layer, "_hf_tp_plan", "colwise"),
        "base_layer is tensor parallel",
    ),
    "tensor as scaling": (
        lambda up: up.scaling.update({"default": torch.tensor(2.0)}),
        "scaling is a Tensor, not a number",
    ),
    "infinite scaling": (lambda up: up.scaling.update({"default": float("inf")}), "scaling is inf"),
    "ZeRO-3": (_zero_partition, "base_layer.weight is partitioned by DeepSpeed ZeRO-3"),
    "tensor subclass": (
        lambda up: setattr(
            up.base_layer, "weight",
            nn.Parameter(up.base_layer.weight.detach().as_subclass(_Marked)),
        ),
        "base_layer.weight is a test_peft_fallback._Marked, not a plain tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYER_CASES)
def test_layer_changed_before_apply(case: str, fused_calls: Calls) -> None:
    change, reason = LAYER_CASES[case]
    model, x = mlp(), torch.randn(5, 20)
    up = layer(model, "up")
    change(up)
    stock = up(x)
    report = lk.apply(model)
    assert [(e.status, e.reason) for e in report.layers] == [
        ("stock", reason),
        ("fused", ""),
        ("fused", ""),
    ]
    assert type(up) is Linear
    assert torch.equal(up(x).nan_to_num(), stock.nan_to_num())
    assert fused_calls.take() == 0
    layer(model, "mid")(torch.randn(5, 37))
    assert fused_calls.take() == 1


@pytest.mark.parametrize("case", LAYER_CASES)
def test_layer_changed_after_apply(
    case: str, fused_calls: Calls, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, reason = LAYER_CASES[case]
    model, x = mlp(), torch.randn(5, 20)
    lk.apply(model)
    up = layer(model, "up")
    change(up)
    with caplog.at_level(logging.WARNING, "lora_kernels"):
        outputs = [up(x), up(x)]
    assert fused_calls.take() == 0
    assert type(up) is FusedLoraLinear
    (record,) = caplog.records
    assert record.getMessage().endswith(f": {reason}")
    monkeypatch.setenv("LORA_KERNELS_STRICT", "1")
    with pytest.raises(StrictFallbackError, match="LORA_KERNELS_STRICT"):
        up(x)
    lk.unapply(model)
    for y in outputs:
        assert torch.equal(y.nan_to_num(), up(x).nan_to_num())


def test_hook_registered_later_fires_and_is_forgotten(fused_calls: Calls) -> None:
    model, x, seen = mlp(), torch.randn(5, 20), []
    lk.apply(model)
    up = layer(model, "up")
    fused = up(x)
    handle = up.lora_A["default"].register_forward_hook(lambda m, i, o: seen.append(o.shape))
    fused_calls.take()
    up(x)
    assert seen == [torch.Size([5, 4])] and fused_calls.take() == 0
    handle.remove()
    assert torch.equal(up(x), fused) and fused_calls.take() == 1


VARIANTS = {
    "aLoRA": (
        {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"},
        "the adapter is a LoRA variant (ALoraLinearVariant)",
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_stay_stock(variant: str) -> None:
    overrides, reason = VARIANTS[variant]
    case = CASES["llama"]
    model, ids = case.peft_model(**overrides), case.inputs()["input_ids"]
    stock = model(input_ids=ids).logits
    report = lk.apply(model)
    assert {(e.status, e.reason) for e in report.layers} == {("stock", reason)}
    assert torch.equal(model(input_ids=ids).logits, stock)


def test_other_layer_types_stay_stock() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.head = nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.conv(x).mean((2, 3)))

    model = get_peft_model(Net(), lora_config(target_modules=["conv", "head"]))
    conv, head = lk.apply(model).layers
    assert conv.reason == "peft.tuners.lora.layer.Conv2d has no fused path"
    assert head.status == "fused"


def test_subclass_of_lora_linear_stays_stock() -> None:
    class Own(Linear):
        pass

    config = lora_config(target_modules=["up"])
    config._register_custom_module({nn.Linear: Own})
    (entry,) = lk.apply(get_peft_model(Mlp(), config)).layers
    assert entry.status == "stock" and "is a subclass of lora.Linear" in entry.reason


def test_weights_on_meta_are_expected_to_be_loaded(
    fused_calls: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = mlp(), torch.randn(5, 20)
    up = layer(model, "up")
    weight = up.lora_A["default"].weight.detach().clone()
    up.lora_A.to("meta")
    assert len(lk.apply(model).fused) == 3
    with caplog.at_level(logging.WARNING, "lora_kernels"):
        assert up(x).shape == (5, 37)
    assert "lora_A.weight is on meta but base_layer.weight is on cpu" in caplog.text
    up.lora_A["default"].weight = nn.Parameter(weight)
    assert fused_calls.take() == 0
    up(x)
    assert fused_calls.take() == 1


def test_forward_on_the_layer_instance_stays_stock() -> None:
    model = mlp()
    up = layer(model, "up")
    up.forward = up.forward
    assert lk.apply(model).layers[0].reason == "the layer has a forward of its own on the instance"


def test_ia3_model_has_no_lora_layer() -> None:
    model = get_peft_model(Mlp(), IA3Config(target_modules=["up"], feedforward_modules=[]))
    assert lk.apply(model).layers == []
