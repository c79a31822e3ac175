"""PEFT's merging over a QuantLinear: the same with and without `apply`, for every format."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model

import lora_kernels as lk
from lora_kernels.errors import QuantizedWeightError
from lora_kernels.modules.quant_linear import QuantLinear

FORMATS = ("nf4", "fp4", "int8", "int4", "int4_awq", "fp8", "fp8_block")
pytestmark = pytest.mark.filterwarnings("ignore:merging into a quantized weight")


class Net(nn.Module):
    def __init__(self, format: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        block = {"block_size": 32} if format in ("int4", "int4_awq") else {}
        self.first = QuantLinear.from_linear(nn.Linear(64, 64, bias=False), format, **block)
        self.second = nn.Linear(64, 8)

    def forward(self, x):
        return self.second(self.first(x))


def adapted(format: str, **options):
    config = LoraConfig(r=4, target_modules=["first", "second"], **options)
    model = get_peft_model(Net(format), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.5)
    return model.eval()


def packed(model) -> lk.QuantTensor:
    first = getattr(model, "base_model", model)
    first = getattr(first, "model", first).first
    return getattr(first, "base_layer", first).quant_weight


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_without_apply_as_with_it(format, safe):
    stock, fused = adapted(format), adapted(format)
    lk.apply(fused)
    before = packed(stock).dequantize(torch.float32)
    for model in (stock, fused):
        model.merge_adapter(safe_merge=safe)
    assert packed(stock).equal(packed(fused))
    layer = stock.base_model.model.first
    wanted = before + layer.get_delta_weight("default")
    got = packed(stock).dequantize(torch.float32)
    assert (got - wanted).norm() < 0.2 * (wanted - before).norm()
    assert torch.equal(stock(torch.eye(64)), fused(torch.eye(64)))
    for model in (stock, fused):
        model.unmerge_adapter()
    assert packed(stock).equal(packed(fused)) and not layer.merged


def test_unloading_leaves_quantized_layers():
    model = adapted("int8")
    x = torch.randn(3, 64)
    want = model(x)
    unloaded = model.merge_and_unload()
    assert type(unloaded.first) is QuantLinear and type(unloaded.second) is nn.Linear
    assert (unloaded(x) - want).norm() < 0.05 * want.norm()


def test_plain_layers_merge_as_before():
    model = adapted("nf4")
    layer = model.base_model.model.second
    want = layer.base_layer.weight + layer.get_delta_weight("default")
    model.merge_adapter()
    assert torch.equal(layer.base_layer.weight, want)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("bias", "has none to merge it into"), ("variant", "plain LoRA can")],
)
def test_what_cannot_be_merged_changes_nothing(kind, message):
    model = adapted("int8")
    before = copy.deepcopy(packed(model))
    layer = model.base_model.model.first
    if kind == "bias":
        layer.lora_B["default"].bias = nn.Parameter(torch.ones(64))
    else:
        layer.lora_variant["default"] = object()
    with pytest.raises(QuantizedWeightError, match=message) as caught:
        model.merge_adapter()
    assert "\n" not in str(caught.value)
    assert packed(model).equal(before) and not layer.merged


def test_peft_may_be_imported_later():
    code = """
import torch
import lora_kernels as lk
from lora_kernels.modules.quant_linear import QuantLinear
layer = torch.nn.Sequential(QuantLinear.from_linear(torch.nn.Linear(64, 64), "int8"))
from peft import LoraConfig, get_peft_model
model = get_peft_model(layer, LoraConfig(target_modules=["0"], init_lora_weights=False)).eval()
before = layer[0].base_layer.quant_weight.clone()
model.merge_adapter(safe_merge=True)
assert not layer[0].base_layer.quant_weight.equal(before)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
