"""Quantized layers with one input: computed together, the same results, one converted x."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from peft_models import results

import lora_kernels as lk
from lora_kernels.errors import InvalidArgumentError
from lora_kernels.integrations.peft import quant_linear
from lora_kernels.modules import blocks, layer_group
from lora_kernels.modules.layer_group import group_of
from lora_kernels.modules.quant_linear import QuantLinear
from lora_kernels.ops import quantize
from lora_kernels.ops.quant_linear import grouped_quant_lora_linear
from lora_kernels.testing import assert_within_budget

NAMES = ("q_proj", "k_proj", "v_proj")


class Block(nn.Module):
    def __init__(self, wrap) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj = wrap(nn.Linear(64, 96, bias=False))
        self.k_proj, self.v_proj = wrap(nn.Linear(64, 32)), wrap(nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_rows", blocks.rows())
    blocks.register_block(Block, NAMES)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes, op = [], layer_group.grouped_quant_lora_linear

    def recorded(x: Tensor, qs, *args, **kwargs) -> list[Tensor]:
        sizes.append(len(qs))
        return op(x, qs, *args, **kwargs)

    monkeypatch.setattr(layer_group, "grouped_quant_lora_linear", recorded)
    return sizes


def ours(compute_dtype=None):
    def wrap(linear: nn.Linear) -> QuantLinear:
        made = QuantLinear.from_linear(linear, "nf4")
        made.compute_dtype = compute_dtype
        return made

    return wrap


def bitsandbytes_layer(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, quant_type="nf4",
        compute_dtype=torch.bfloat16,
    )  # fmt: skip
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def adapted(wrap, **options) -> nn.Module:
    block = Block(wrap)
    block.is_loaded_in_4bit = wrap is bitsandbytes_layer
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(NAMES), **options)
    model = get_peft_model(block, config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    return model


def exact_dx(model: nn.Module, x: Tensor) -> Tensor:
    """dX of the dequantized weights and the adapters, in fp64."""
    x = x.detach().double().requires_grad_()
    outs = []
    for name in NAMES:
        layer = model.base_model.model.get_submodule(name)
        base = quant_linear.quantized_base(layer.get_base_layer())[0]
        w = base.q.dequantize(torch.float32).double()
        a, b = (p["default"].weight.detach().double() for p in (layer.lora_A, layer.lora_B))
        y = F.linear(x, w) + layer.scaling["default"] * (x @ a.t() @ b.t())
        outs.append(y if base.bias is None else y + base.bias.detach().double())
    y = torch.cat(outs, -1)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).double()
    return torch.autograd.grad(y, x, dy)[0]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("wrap", "dtype"),
    [(ours(), torch.bfloat16), (ours(torch.bfloat16), torch.float32),
     (bitsandbytes_layer, torch.float32), (bitsandbytes_layer, torch.bfloat16)],
    ids=["ours", "ours-converted", "bitsandbytes-converted", "bitsandbytes"],
)  # fmt: skip
def test_the_bits_of_separate_layers_but_for_dx(wrap, dtype, dropout, calls, monkeypatch):
    model = adapted(wrap, lora_dropout=dropout).train()
    x = torch.randn(3, 11, 64).to(dtype)
    with monkeypatch.context() as off:
        off.setenv("LORA_KERNELS_DISABLE", "grouped_lora_linear")
        (group,) = lk.apply(model).groups
        assert "LORA_KERNELS_DISABLE" in group["reason"]
        torch.manual_seed(2)
        separate = results(model, x)
    (group,) = lk.apply(model).groups
    assert (group["members"], group["status"]) == (list(NAMES), "fused") and calls == []
    torch.manual_seed(2)
    together = results(model, x)
    assert calls == [3] and together.keys() == separate.keys()
    for name, t in together.items():
        assert t.dtype == separate[name].dtype
        assert name == "dx" or torch.equal(t, separate[name]), name
    if dropout == 0.0:
        low = separate["dx"].bfloat16()
        assert_within_budget(together["dx"], exact_dx(model, x), low, "dx")
    lk.unapply(model)
    assert all(group_of(m) is None for m in model.modules())


def test_a_converted_x_is_kept_once():
    """Three converted copies for layers one by one, one for the group."""
    kept = []
    for disabled in (True, False):
        model = adapted(ours(torch.bfloat16))
        with pytest.MonkeyPatch.context() as patch:
            if disabled:
                patch.setenv("LORA_KERNELS_DISABLE", "grouped_lora_linear")
            lk.apply(model)
        storages: dict[int, int] = {}

        def pack(t: Tensor, storages: dict[int, int] = storages) -> Tensor:
            if t.dtype == torch.bfloat16 and t.shape == (40, 64):
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(torch.randn(40, 64, requires_grad=True))
        kept.append(sum(storages.values()))
        del y
    assert kept == [3 * 40 * 64 * 2, 40 * 64 * 2]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_the_masks(reentrant, calls):
    model = adapted(ours(torch.bfloat16), lora_dropout=0.3).train()
    lk.apply(model)
    x = torch.randn(17, 64)
    found = []
    for run in (model, lambda t: checkpoint(model, t, use_reentrant=reentrant)):
        torch.manual_seed(5)
        model.zero_grad(set_to_none=True)
        t = x.clone().requires_grad_()
        run(t).square().sum().backward()
        found.append([t.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert calls == [3] * 3
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_layers_of_this_package(calls):
    torch.manual_seed(0)
    m = lk.LoRAQKV(64, 4, 2, r={"q_proj": 4, "v_proj": 2}, quant="nf4", dropout=0.2)
    for name, p in m.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 5, 64)
    torch.manual_seed(3)
    q, k, v = m(x)
    assert calls == [2]
    torch.manual_seed(3)
    want = m.q_proj(x), m.k_proj(x), m.v_proj(x)
    for got, one in zip((q, k, v), want, strict=True):
        assert torch.equal(got.flatten(2), one)
    model = nn.Sequential(Block(ours()))
    lk.replace_modules(model, r=4)
    assert [g["members"] for g in lk.apply(model).groups] == [list(NAMES)]
    model(torch.randn(3, 64))
    assert calls == [2, 3]
    lk.unapply(model)
    assert type(model[0].q_proj) is lk.QuantLoRALinear


def test_dense_and_quantized_layers_are_not_mixed():
    block = Block(ours())
    block.k_proj = nn.Linear(64, 32)
    model = get_peft_model(block, LoraConfig(target_modules=list(NAMES)))
    (group,) = lk.apply(model).groups
    assert (group["status"], group["reason"]) == ("stock", "the layers have different dtypes")
    model(torch.randn(2, 64))


def test_compiled_one_by_one():
    torch.compiler.reset()
    model = adapted(ours())
    lk.apply(model)
    x = torch.randn(5, 64, requires_grad=True)
    want = torch.autograd.grad(model(x).square().sum(), x)[0]
    graph = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(graph(x).square().sum(), x)[0]
    assert_within_budget(got, want.double(), want)


def test_messages():
    q, a, b = quantize(torch.randn(32, 64)), torch.zeros(2, 64), torch.zeros(32, 2)
    x = torch.randn(3, 64)
    with pytest.raises(InvalidArgumentError, match="one entry per member; got qs=2, lora_as=1"):
        grouped_quant_lora_linear(x, [q, q], [a], [b, b], [1.0, 1.0])
    with pytest.raises(InvalidArgumentError, match="dropout_p=2"):
        grouped_quant_lora_linear(x, [q], [a], [b], [1.0], dropout_p=2)
    with pytest.raises(InvalidArgumentError, match="lora_b"):
        grouped_quant_lora_linear(x, [q, q], [a, a], [b, b.t()], [1.0, 1.0])
    y = grouped_quant_lora_linear(x.requires_grad_(), [q], [a], [b], [1.0])[0]
    with pytest.raises(RuntimeError, match="second derivatives"):
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        dx.sum().backward()
    assert grouped_quant_lora_linear(x[:0], [q], [a], [b], [1.0])[0].shape == (0, 32)
