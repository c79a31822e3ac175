"""Merging adapters over quantized weights: the base, the format kept, and the residuals."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.errors import InvalidArgumentError, QuantizedWeightError
from lora_kernels.modules.quant_linear import QuantLinear
from lora_kernels.testing import assert_within_budget


def model_with_adapters(quant="nf4", size=1.0, dtype=torch.float32):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 7)).to(dtype)
    model = copy.deepcopy(dense)
    lk.replace_modules(model, r=4, quant=quant)
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_B, std=size * 0.05)
    return dense, model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quant", ["nf4", "int8", "int4", "fp8"])
def test_onto_the_dequantized_weight_nothing_changes(quant, dtype):
    _, model = model_with_adapters(quant, dtype=dtype)
    x = torch.randn(9, 64, dtype=dtype)
    layer, y = model[0], model[0](x)
    w = layer.quant_weight.dequantize(torch.float64)
    update = layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    report = lk.merge(model)
    assert list(report) == ["0", "2"]
    assert type(model[0]) is nn.Linear and model[0].weight.dtype == dtype
    assert not model[0].weight.requires_grad
    assert_within_budget(model[0].weight, w + update, (w + update).to(dtype), "merged weight")
    exact = x.double() @ (w + update).t() + layer.bias.double()
    assert_within_budget(model[0](x), exact, y, "merged output")
    residual = report.residuals["0"]
    assert residual.stored == str(dtype).removeprefix("torch.")
    assert residual.norm <= torch.finfo(dtype).eps * (w + update).norm().item()
    # By Cauchy-Schwarz; eps for the sums of the report itself.
    bound = residual.norm / residual.update_norm + torch.finfo(torch.float32).eps
    assert abs(residual.survival - 1) <= bound
    norm = torch.tensor(residual.update_norm)
    assert_within_budget(norm, update.norm(), update.float().norm(), "norm of the update")


def test_onto_the_original_weight(tmp_path):
    from safetensors.torch import save_file

    dense, model = model_with_adapters()
    file = tmp_path / "w.safetensors"
    save_file({f"backbone.{k}": v for k, v in dense.state_dict().items()}, file)
    layer = model[0]
    update = layer.scaling * layer.lora_B @ layer.lora_A
    expected = dense[0].weight + update
    lk.merge(model, onto=file)
    assert torch.equal(model[0].weight, expected)


def test_requantized_and_what_survives():
    """Small updates drown in the rounding of four bits, large ones and eight bits keep them."""
    survival = {}
    for size in (0.02, 5.0):
        for format in ("nf4", "int8"):
            _, model = model_with_adapters(size=size)
            report = lk.merge(model, requantize=format)
            assert type(model[0]) is QuantLinear and model[0].format == format
            survival[size, format] = report.residuals["0"].survival
            assert report.residuals["0"].norm > 0
    assert survival[0.02, "nf4"] < 0.5
    assert survival[0.02, "int8"] > survival[0.02, "nf4"]
    assert survival[5.0, "nf4"] > 0.9
    assert survival[5.0, "int8"] > 0.99


def test_requantize_true_keeps_the_format():
    _, model = model_with_adapters("int4")
    lk.merge(model, requantize=True)
    assert (model[0].format, model[0].spec.layout, model[0].spec.block_size) == ("int4", "gptq", 64)


def test_mixed_models_and_the_report():
    model = nn.Sequential(QuantLinear.from_linear(nn.Linear(16, 8)), nn.Linear(8, 8))
    lk.replace_modules(model, r=2)
    for layer in model:
        nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 16)
    before = model(x)
    report = lk.merge(model)
    assert list(report) == ["0", "1"] and list(report.residuals) == ["0"]
    assert model[1].merged and type(model[0]) is nn.Linear
    assert_within_budget(model(x), model.double()(x.double()), before.detach(), "merged model")
    assert json.loads(json.dumps(report.to_dict()))["merged"] == ["0", "1"]
    assert str(report).splitlines()[-1] == "2 layers merged"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"exact": True}, InvalidArgumentError, "exact=True"),
        ({"requantize": "nf5"}, InvalidArgumentError, "requantize='nf5'"),
        ({"onto": 3}, InvalidArgumentError, "onto=3"),
        ({"onto": "missing.safetensors"}, QuantizedWeightError, "missing.safetensors"),
    ],
)
def test_bad_arguments_leave_the_model(options, error, message):
    _, model = model_with_adapters()
    before = copy.deepcopy(model)
    with pytest.raises(error, match=message):
        lk.merge(model, **options)
    x = torch.randn(2, 64)
    assert torch.equal(model(x), before(x)) and type(model[0]) is lk.QuantLoRALinear


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    from safetensors.torch import save_file

    _, model = model_with_adapters()
    save_file({"0.weight": torch.zeros(48, 63)}, tmp_path / "a.safetensors")
    with pytest.raises(QuantizedWeightError, match=r"0.weight has shape \[48, 63\]"):
        lk.merge(model, onto=tmp_path / "a.safetensors")
    save_file({"other.weight": torch.zeros(48, 64)}, tmp_path / "b.safetensors")
    with pytest.raises(QuantizedWeightError, match="lacks it"):
        lk.merge(model, onto=tmp_path / "b.safetensors")
    assert type(model[0]) is lk.QuantLoRALinear


def test_onto_needs_a_quantized_layer():
    model = nn.Sequential(nn.Linear(8, 8))
    lk.replace_modules(model, r=2)
    with pytest.raises(InvalidArgumentError, match="there is none"):
        lk.merge(model, requantize="nf4")


def test_an_adapter_with_infinity_is_refused():
    _, model = model_with_adapters()
    with torch.no_grad():
        model[2].lora_B[0, 0] = float("inf")
    with pytest.raises(InvalidArgumentError, match="'2' would give a weight with NaN"):
        lk.merge(model)
    assert type(model[0]) is lk.QuantLoRALinear
