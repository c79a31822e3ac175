"""QuantLinear and QuantLoRALinear as modules: state dicts, moves, training, replacement."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.errors import InvalidArgumentError
from lora_kernels.modules.quant_linear import QuantLinear
from lora_kernels.modules.quant_lora_linear import QuantLoRALinear
from lora_kernels.ops.quant_linear import FORMAT_NAMES


@pytest.fixture(autouse=True)
def _one_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense and quantized layers then run the same library products, and give the same bits."""
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "aten")


@pytest.fixture(params=FORMAT_NAMES)
def format(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def linear() -> nn.Linear:
    return nn.Linear(50, 33)


def test_forward_is_the_op(format, linear):
    layer = QuantLinear.from_linear(linear, format)
    x = torch.randn(2, 3, 50)
    expected = lk.ops.quant_linear(x, lk.ops.quantize(linear.weight.detach(), format), linear.bias)
    assert torch.equal(layer(x), expected)
    assert (layer.in_features, layer.out_features, layer.bias is linear.bias) == (50, 33, True)
    assert not layer.weight.requires_grad


def test_state_dict_round_trip(format, linear):
    layer, x = QuantLinear.from_linear(linear, format), torch.randn(4, 50)
    state = layer.state_dict()
    for other in (QuantLinear(50, 33, format=format), QuantLinear(50, 33, format=format)):
        other.load_state_dict(state)
        assert other.quant_weight.equal(layer.quant_weight)
        assert torch.equal(other(x), layer(x))
    meta = QuantLinear(50, 33, format=format, device="meta")
    assert set(meta.state_dict()) == set(state)
    meta.load_state_dict(state, assign=True)
    assert torch.equal(meta(x), layer(x))
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.quant_weight.equal(layer.quant_weight)


def test_a_full_precision_state_dict_is_quantized_on_loading(format, linear):
    layer = QuantLinear(50, 33, format=format)
    layer.load_state_dict(linear.state_dict())
    assert layer.quant_weight.equal(lk.ops.quantize(linear.weight.detach(), format))
    assert torch.equal(layer.bias, linear.bias)


def test_other_block_sizes_and_no_nested_statistics_load(linear):
    source = QuantLinear.from_linear(linear, "nf4", 128, False, quant_storage=torch.bfloat16)
    layer = QuantLinear(50, 33)
    layer.load_state_dict(source.state_dict())
    assert layer.quant_weight.equal(source.quant_weight)
    assert layer.weight.dtype == torch.bfloat16
    assert {"nested_absmax", "nested_code", "offset"}.isdisjoint(dict(layer.named_buffers()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("weight"), "weight is missing"),
        (lambda s: s.pop("weight.absmax"), "weight.absmax is missing"),
        (lambda s: s.update({"weight.absmax": s["weight.absmax"][:-1]}), "weight.absmax has shape"),
        (lambda s: s.update(bias=torch.zeros(3)), "size mismatch for bias"),
        (lambda s: s.update(extra=torch.zeros(3)), "Unexpected key"),
    ],
)
def test_a_bad_state_dict_is_refused(linear, change, message):
    state = dict(QuantLinear.from_linear(linear).state_dict())
    change(state)
    layer = QuantLinear(50, 33)
    before = layer.quant_weight.clone()
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    if "weight" in message:
        assert layer.quant_weight.equal(before)


def test_another_layer_is_refused(linear):
    state = QuantLinear.from_linear(linear).state_dict()
    for layer in (QuantLinear(50, 34), QuantLinear(50, 33, format="fp4")):
        with pytest.raises(RuntimeError, match="this layer"):
            layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Missing key"):
        QuantLinear(50, 33).load_state_dict({"bias": torch.zeros(33)})


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double(), lambda m: m.float(),
        lambda m: m.to(torch.bfloat16), lambda m: m.type(torch.float16), lambda m: m.to("cpu"),
        copy.deepcopy, lambda m: m.share_memory(),
    ],
)  # fmt: skip
@pytest.mark.parametrize("storage", [None, torch.bfloat16])
def test_no_conversion_touches_the_weight(linear, convert, storage):
    layer = QuantLinear.from_linear(linear, quant_storage=storage)
    before = layer.quant_weight.clone()
    parameter = layer.weight
    after = convert(layer)
    assert after.quant_weight.equal(before)
    if after is layer:
        assert after.weight is parameter
    adapted = QuantLoRALinear.from_quant_linear(layer, 4)
    convert(adapted)
    assert adapted.quant_weight.equal(before)


def test_conversions_reach_bias_and_adapter(linear):
    layer = QuantLoRALinear.from_quant_linear(QuantLinear.from_linear(linear), 4)
    layer.to(torch.bfloat16)
    assert {layer.bias.dtype, layer.lora_A.dtype, layer.lora_B.dtype} == {torch.bfloat16}
    layer.to("meta")
    assert layer.weight.is_meta and layer.absmax.is_meta and layer.lora_A.is_meta


def test_packed_data_that_was_converted_is_refused(linear):
    """What PEFT's prepare_model_for_kbit_training does to parameters of 16 bits."""
    layer = QuantLinear.from_linear(linear, quant_storage=torch.bfloat16)
    layer.weight.data = layer.weight.data.to(torch.float32)
    with pytest.raises(InvalidArgumentError, match="converted to float32"):
        layer(torch.randn(2, 50))


def test_pickle_and_deepcopy(format, linear):
    layer, x = QuantLinear.from_linear(linear, format), torch.randn(2, 50)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), layer(x))
    if not format.startswith("fp8"):  # torch cannot pickle float8 outside of torch.save
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_compute_dtype(linear):
    layer = QuantLinear.from_linear(linear, compute_dtype=torch.bfloat16)
    x = torch.randn(4, 50)
    plain = QuantLinear.from_linear(linear)
    assert torch.equal(layer(x), plain(x.bfloat16()).float())
    with torch.autocast("cpu", torch.bfloat16):
        assert plain(x).dtype == torch.bfloat16


@pytest.mark.parametrize("quant", ["nf4", "int8", "int4", "fp8"])
def test_replace_modules_quantizes_and_trains(quant):
    model = nn.Sequential(nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 7))
    dense = copy.deepcopy(model)
    report = lk.replace_modules(model, r=4, quant=quant)
    assert [e.status for e in report.layers] == ["fused", "fused"]
    assert all(isinstance(model[i], QuantLoRALinear) for i in (0, 2))
    expected = copy.deepcopy(dense)
    for i in (0, 2):
        expected[i].weight.data = lk.ops.dequantize(model[i].quant_weight)
    x = torch.randn(16, 20)
    assert torch.equal(model(x), expected(x))
    target = torch.randn(16, 7)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    assert len(optimizer.param_groups[0]["params"]) == 4
    packed = [model[i].quant_weight.clone() for i in (0, 2)]
    losses = []
    for _ in range(20):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(model[i].quant_weight.equal(p) for i, p in zip((0, 2), packed, strict=True))


def test_replace_modules_adapts_layers_that_are_quantized_already():
    model = nn.Sequential(QuantLinear.from_linear(nn.Linear(20, 33), "int8"), nn.Linear(33, 7))
    weight = model[0].quant_weight
    lk.replace_modules(model, r=4)
    assert isinstance(model[0], QuantLoRALinear) and isinstance(model[1], lk.LoRALinear)
    assert not isinstance(model[1], QuantLinear)
    assert model[0].quant_weight.equal(weight)


def test_a_weight_with_nan_is_named_and_nothing_changes():
    model = nn.Sequential(nn.Linear(20, 33), nn.Linear(33, 7))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(InvalidArgumentError, match=r"'1.weight' has 1 NaN or infinite"):
        lk.replace_modules(model, quant="nf4")
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_modules_kept_in_fp32_are_not_quantized():
    model = nn.ModuleDict({"wi": nn.Linear(8, 8), "wo": nn.Linear(8, 8)})
    model._keep_in_fp32_modules = ["wo"]
    report = lk.replace_modules(model, quant="nf4")
    assert type(model["wo"]) is nn.Linear
    assert {e.name: e.status for e in report.layers} == {"wi": "fused", "wo": "stock"}


def test_adapter_files_go_both_ways(tmp_path):
    model = nn.Sequential(nn.Linear(20, 33), nn.Linear(33, 7))
    dense = copy.deepcopy(model)
    lk.replace_modules(model, r=4, quant="nf4")
    for layer in model:
        nn.init.normal_(layer.lora_B)
    lk.save_adapter(model, tmp_path)
    quantized = nn.Sequential(*(QuantLinear.from_linear(m) for m in dense))
    lk.load_adapter(quantized, tmp_path)
    x = torch.randn(5, 20)
    assert isinstance(quantized[0], QuantLoRALinear)
    assert torch.equal(quantized(x), model(x))
    lk.load_adapter(dense, tmp_path)
    assert type(dense[0]) is lk.LoRALinear
    assert torch.equal(dense[0].lora_B, model[0].lora_B)


def test_dropout_and_switches():
    layer = QuantLoRALinear(20, 33, r=4, dropout=0.5)
    layer.load_state_dict({"weight": torch.randn(33, 20)}, strict=False)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(9, 20)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.adapter_enabled = False
    assert torch.equal(layer(x), lk.ops.quant_linear(x, layer.quant_weight, layer.bias))


def test_an_encoder_layer_with_quantized_linears_calls_them():
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    lk.replace_modules(encoder, r=2, quant="nf4", targets=["linear1", "linear2"])
    for layer in (encoder.linear1, encoder.linear2):
        nn.init.normal_(layer.lora_B)
    assert encoder.activation_relu_or_gelu == 0  # torch's fused kernel would read packed weights
    with torch.no_grad():
        assert encoder(torch.randn(2, 5, 16)).isfinite().all()


@pytest.mark.parametrize("storage", [None, torch.float32])
def test_compiles_without_a_graph_break(storage):
    model = nn.Sequential(nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 7))
    for i in (0, 2):
        model[i] = QuantLinear.from_linear(model[i], quant_storage=storage)
    lk.replace_modules(model, r=4)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 20)
    y = compiled(x)
    y.sum().backward()
    assert torch.equal(y, model(x))
    assert model[0].lora_B.grad is not None
