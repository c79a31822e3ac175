"""PEFT over quantized layers: stock and fused, on QuantLinear and on bitsandbytes' layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model

import lora_kernels as lk
from lora_kernels.errors import StrictFallbackError
from lora_kernels.integrations.peft import quant_linear
from lora_kernels.modules.quant_linear import QuantLinear
from lora_kernels.testing import assert_within_budget


class Net(nn.Module):
    def __init__(self, wrap) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = wrap(nn.Linear(128, 96))
        self.second = wrap(nn.Linear(96, 64, bias=False))

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def ours(format="nf4"):
    return lambda linear: QuantLinear.from_linear(linear, format)


def bitsandbytes_layer(kind):
    """A wrap for Net: linear -> a layer of bitsandbytes on its weights."""
    bnb = pytest.importorskip("bitsandbytes")

    def wrap(linear):
        k, n, bias = linear.in_features, linear.out_features, linear.bias is not None
        if kind == "int8":
            layer = bnb.nn.Linear8bitLt(k, n, bias, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(
                k, n, bias, quant_type=kind[:3], compress_statistics="dq" in kind
            )
        layer.load_state_dict(linear.state_dict())
        return layer.to("cpu") if kind != "int8" else _quantize_8bit(bnb, layer)

    return wrap


def _quantize_8bit(bnb, layer):
    scaled, scb, _ = bnb.functional.int8_vectorwise_quant(layer.weight.data.half())
    layer.weight = bnb.nn.Int8Params(
        scaled, requires_grad=False, has_fp16_weights=False, CB=scaled, SCB=scb
    )
    return layer


def adapted(wrap, kind="", **options):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["first", "second"], **options)
    net = Net(wrap)
    if kind:
        net.is_loaded_in_4bit, net.is_loaded_in_8bit = kind != "int8", kind == "int8"
    model = get_peft_model(net, config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model


def dense_twin(model, dtype):
    """The same model on the dequantized weights, in `dtype`."""
    twin = nn.ModuleDict()
    for name in ("first", "second"):
        layer = model.base_model.model.get_submodule(name)
        base = quant_linear.quantized_base(layer.get_base_layer())[0]
        w = base.q.dequantize(torch.float32).to(dtype)
        w = w + layer.get_delta_weight("default").detach().to(dtype)
        linear = nn.Linear(*reversed(w.shape), bias=base.bias is not None, dtype=dtype)
        linear.weight.data = w
        if base.bias is not None:
            linear.bias.data = base.bias.detach().to(dtype)
        twin[name] = linear
    return lambda x: twin["second"](torch.relu(twin["first"](x)))


def counted(monkeypatch):
    calls = []
    op = quant_linear.quant_lora_linear

    def count(*args, **kwargs):
        calls.append(1)
        return op(*args, **kwargs)

    monkeypatch.setattr(quant_linear, "quant_lora_linear", count)
    return calls


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8", "int4", "fp8"])
def test_stock_peft_on_quant_linear_then_fused(format, monkeypatch):
    model = adapted(ours(format))
    x = torch.randn(9, 128)
    stock = model(x)
    stock.sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == 4
    model.zero_grad()
    calls = counted(monkeypatch)
    report = lk.apply(model)
    assert [e.status for e in report.layers] == ["fused", "fused"]
    fused = model(x)
    assert len(calls) == 2
    fused.sum().backward()
    exact, low = dense_twin(model, torch.float64)(x.double()), dense_twin(model, torch.float32)(x)
    assert_within_budget(fused, exact.detach(), stock.detach(), f"{format} output")
    assert_within_budget(stock, exact.detach(), low.detach(), f"{format} stock output")
    assert set(gradients) == {n for n, p in model.named_parameters() if p.grad is not None}
    assert lk.unapply(model) == 2
    assert torch.equal(model(x), stock)


def test_all_linear_and_saved_adapters(tmp_path):
    model = get_peft_model(Net(ours()), LoraConfig(r=4, target_modules="all-linear"))
    lk.apply(model)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 128)
    loaded = PeftModel.from_pretrained(Net(ours()), tmp_path)
    lk.apply(loaded)
    assert torch.equal(loaded(x), model(x))
    on_dense = PeftModel.from_pretrained(Net(lambda linear: linear), tmp_path)
    assert torch.isfinite(on_dense(x)).all()


def test_an_adapter_of_this_package_loads_in_peft(tmp_path):
    model = Net(ours())
    lk.replace_modules(model, r=4)
    for layer in (model.first, model.second):
        nn.init.normal_(layer.lora_B)
    lk.save_adapter(model, tmp_path)
    x = torch.randn(3, 128)
    loaded = PeftModel.from_pretrained(Net(ours()), tmp_path)
    lk.apply(loaded)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq", "fp4", "int8"])
def test_layers_of_bitsandbytes(kind, monkeypatch):
    model = adapted(bitsandbytes_layer(kind), kind).train()
    layer = model.base_model.model.first
    assert type(layer).__module__ == "peft.tuners.lora.bnb"
    stock_class = type(layer)
    calls = counted(monkeypatch)
    report = lk.apply(model)
    assert [e.status for e in report.layers] == ["fused", "fused"], str(report)
    assert isinstance(layer, stock_class) and repr(layer).startswith("lora.Linear")
    x = torch.randn(9, 128, requires_grad=True)
    y = model(x)
    assert len(calls) == 2
    y.sum().backward()
    twin = dense_twin(model, torch.float32)
    exact = dense_twin(model, torch.float64)(x.detach().double())
    assert_within_budget(y, exact.detach(), twin(x.detach()).detach(), f"{kind} output")
    assert len([p for p in model.parameters() if p.grad is not None]) == 4
    gradient = x.grad.clone()
    other = x.detach().clone().requires_grad_()
    twin(other).sum().backward()
    wide = x.detach().double().requires_grad_()
    dense_twin(model, torch.float64)(wide).sum().backward()
    assert_within_budget(gradient, wide.grad, other.grad, f"{kind} dx")
    with model.disable_adapter():
        model(x)
    assert len(calls) == 2
    assert lk.unapply(model) == 2
    assert type(layer) is stock_class


def test_bitsandbytes_packed_for_its_own_kernels_stays_stock(monkeypatch, caplog):
    model = adapted(bitsandbytes_layer("nf4"), "nf4")
    lk.apply(model)
    layer = model.base_model.model.first.get_base_layer()
    layer.weight.quant_state.packing_format_for_cpu = True
    reason = quant_linear.quantized_base(layer)[1]
    assert "packed for bitsandbytes" in reason
    layer.weight.quant_state.packing_format_for_cpu = False
    assert quant_linear.quantized_base(layer)[1] == ""


def test_variants_and_hooks_run_pefts_forward(monkeypatch):
    calls = counted(monkeypatch)
    model = adapted(ours())
    lk.apply(model)
    x = torch.randn(2, 128)
    model.base_model.model.first.get_base_layer().register_forward_hook(lambda *a: None)
    model(x)
    assert len(calls) == 1
    monkeypatch.setenv("LORA_KERNELS_STRICT", "1")
    with pytest.raises(StrictFallbackError, match="base_layer has hooks"):
        model(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_dropout_autocast_and_compute_dtype(dtype):
    model = adapted(lambda m: QuantLinear.from_linear(m, compute_dtype=dtype), lora_dropout=0.5)
    lk.apply(model)
    x = torch.randn(9, 128)
    assert model(x).dtype == torch.float32
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_merge_and_unmerge_of_peft():
    model = adapted(ours("int8"))
    lk.apply(model)
    x = torch.randn(5, 128)
    before = model(x).detach()
    base = model.base_model.model.first.get_base_layer()
    packed = base.quant_weight.clone()
    with pytest.warns(UserWarning, match="quantized weight"):
        model.merge_adapter()
    assert not base.quant_weight.equal(packed)
    merged = model(x).detach()
    # Eight bits keep the adapter: closer to the adapted model than to the plain one.
    with pytest.warns(UserWarning, match="quantized weight"):
        model.unmerge_adapter()
    with model.disable_adapter():
        plain = model(x).detach()
    assert (merged - before).norm() < 0.2 * (plain - before).norm()
    copied = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="quantized weight"):
        unloaded = copied.merge_and_unload()
    assert type(unloaded.first) is QuantLinear


def test_compiled_fused_layers_equal_eager():
    model = adapted(ours()).eval()
    lk.apply(model)
    x = torch.randn(5, 128)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))


def gptqmodel_layer(kind, linear):
    """A stand-in with the attributes of GPTQModel's torch kernels; that package is not installed
    here, so what is held is the reading of this structure and PEFT's own layer around it."""
    name = {"gptq": "TorchQuantLinear", "awq": "AwqTorchLinear"}[kind]
    q = lk.ops.quantize(linear.weight.detach(), "int4" if kind == "gptq" else "int4_awq", 32)

    class Layer(nn.Module):
        bits, pack_dtype, group_size, adapter = 4, torch.int32, 32, None
        in_features, out_features = linear.in_features, linear.out_features

        def qzero_format(self):
            return 2

        def forward(self, x):
            return nn.functional.linear(x, q.dequantize(x.dtype), self.bias)

    Layer.__name__ = Layer.__qualname__ = name
    Layer.__module__ = "gptqmodel.nn_modules.qlinear.torch"
    layer = Layer()
    for part, t in q.named_parts().items():
        layer.register_buffer(part, t)
    layer.bias = None if linear.bias is None else linear.bias.detach()
    return layer


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_structure_of_gptqmodel_layers(kind, monkeypatch):
    from peft.tuners.lora.awq import AwqLoraLinear
    from peft.tuners.lora.gptq import GPTQLoraLinear

    torch.manual_seed(0)
    base = gptqmodel_layer(kind, nn.Linear(128, 96))
    stock_class = GPTQLoraLinear if kind == "gptq" else AwqLoraLinear
    layer = stock_class(base, "default", config=LoraConfig(r=4), r=4, lora_alpha=8)
    nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    model, calls = nn.Sequential(layer), counted(monkeypatch)
    x = torch.randn(5, 128, requires_grad=True)
    stock = model(x)
    report = lk.apply(model)
    assert [e.status for e in report.layers] == ["fused"], str(report)
    fused = model(x)
    assert len(calls) == 1 and isinstance(layer, stock_class)
    q = quant_linear.quantized_base(base)[0].q
    w = q.dequantize(torch.float32).double() + layer.scaling["default"] * (
        layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    )
    exact = x.double() @ w.t() + base.bias.double()
    assert_within_budget(fused, exact.detach(), stock.detach(), kind)
    fused.sum().backward()
    assert layer.lora_A["default"].weight.grad is not None and x.grad is not None
    base.bits = 3
    assert "3 bits" in quant_linear.quantized_base(base)[1]
    assert lk.unapply(model) == 1
