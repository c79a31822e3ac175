"""LoRAEmbedding and LoRAConv against the written-out weight, autograd and PEFT's layers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.modules.lora_conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
from lora_kernels.modules.lora_embedding import LoRAEmbedding
from lora_kernels.testing import BudgetExceededError, assert_within_budget

CONVS = {1: (nn.Conv1d, LoRAConv1d), 2: (nn.Conv2d, LoRAConv2d), 3: (nn.Conv3d, LoRAConv3d)}
FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def strengthen(layer):
    """An update as large as the weight."""
    with torch.no_grad():
        for factor in layer.factors().values():
            factor.normal_()
        size = layer.updates()["weight"].norm() / layer.weight.double().norm()
        list(layer.factors().values())[1].div_(size)
    return layer


def written_out(layer, dtype):
    """(weight W + s B A with gradients for A and B, A, B) in `dtype`."""
    a, b = (f.detach().to(dtype).requires_grad_() for f in layer.factors().values())
    if isinstance(layer, nn.Embedding):
        update = (b @ a).t()
    else:
        update = (b.flatten(1) @ a.flatten(1)).view(layer.weight.shape)
    return layer.weight.detach().to(dtype) + layer.scaling * update, a, b


def reference(layer, x, dtype):
    weight, a, b = written_out(layer, dtype)
    if isinstance(layer, nn.Embedding):
        if layer.padding_idx is not None:  # as in PEFT the padding row of A alone is left out
            chosen = F.embedding(x, a.t(), layer.padding_idx)
            weight = layer.weight.detach().to(dtype)
            return weight[x] + layer.scaling * (chosen @ b.t()), None, a, b
        y, leaf = weight[x], None
    else:
        leaf = x.detach().to(dtype).requires_grad_()
        bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        padding, padded = layer.padding, leaf
        if layer.padding_mode != "zeros":
            padded = F.pad(leaf, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
            padding = 0
        axes = layer.weight.dim() - 2
        y = FUNCTIONS[axes](padded, weight, bias, layer.stride, padding, layer.dilation)
    return y, leaf, a, b


def results(y, leaf, a, b):
    generator = torch.Generator().manual_seed(3)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    a.grad = b.grad = None
    y.backward(dy)
    found = {"y": y.detach(), "da": a.grad, "db": b.grad}
    return found if leaf is None else found | {"dx": leaf.grad}


def check(layer, x):
    leaf = None if isinstance(layer, nn.Embedding) else x.detach().clone().requires_grad_()
    got = results(layer(x if leaf is None else leaf), leaf, *layer.factors().values())
    exact = results(*reference(layer, x, torch.float64))
    low = results(*reference(layer, x, layer.weight.dtype))
    for name, t in got.items():
        assert_within_budget(t, exact[name], low[name].to(layer.weight.dtype), name)


@pytest.mark.parametrize("padding_idx", [None, 0, -2])
@pytest.mark.parametrize("rslora", [False, True])
def test_embedding(padding_idx, rslora):
    layer = strengthen(LoRAEmbedding(11, 6, padding_idx, r=3, alpha=5, rslora=rslora))
    x = torch.randint(0, 11, (4, 5))
    x[0, 0] = 0
    check(layer, x)
    if padding_idx is not None:
        assert not layer.lora_embedding_A.grad[:, padding_idx].any()


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"stride": 2, "padding": 1},
        {"dilation": 2, "bias": False},
        {"padding": "same", "padding_mode": "circular"},
        {"padding": 1, "padding_mode": "replicate"},
    ],
    ids=str,
)
def test_convolutions(axes, form):
    layer = strengthen(CONVS[axes][1](4, 6, 3, r=2, alpha=5, **form))
    check(layer, torch.randn(2, 4, *(7, 8, 6)[:axes]))


def test_kernels_that_differ_by_axis_and_pointwise_ones():
    check(strengthen(LoRAConv2d(3, 5, (1, 4), stride=(2, 1), r=2)), torch.randn(2, 3, 6, 7))
    check(strengthen(LoRAConv2d(3, 5, 1, r=2)), torch.randn(2, 3, 6, 7))
    check(strengthen(LoRAConv1d(3, 5, 3, r=2)), torch.randn(3, 9))  # without a batch axis


LAYERS = {
    "embedding": (lambda: nn.Embedding(11, 6), LoRAEmbedding.from_embedding,
                  lambda: torch.randint(0, 11, (4, 5))),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), LoRAConv1d.from_conv, lambda: torch.randn(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), LoRAConv2d.from_conv, lambda: torch.randn(2, 4, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), LoRAConv3d.from_conv,
               lambda: torch.randn(2, 4, 5, 4, 4)),
}  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS)
def test_new_adapter_changes_nothing_and_weights_are_shared(kind):
    make, convert, data = LAYERS[kind]
    plain, x = make().eval(), data()
    layer = convert(plain, r=2)
    assert layer.weight is plain.weight and not layer.training
    assert torch.equal(layer(x), plain(x))
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {
        n for n, _ in layer.named_parameters() if n.startswith("lora_")
    }
    assert set(plain.state_dict()) < set(layer.state_dict())
    strengthen(layer)
    assert not torch.equal(layer(x), plain(x))
    layer.adapter_enabled = False
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_merge_and_unmerge(kind, exact):
    make, convert, data = LAYERS[kind]
    layer, x = strengthen(convert(make(), r=2, alpha=3)), data()
    before = layer.weight.detach().clone()
    want, low = (reference(layer, x, d)[0] for d in (torch.float64, torch.float32))
    layer.merge(exact=exact)
    assert_within_budget(layer(x), want, low)
    with pytest.raises(BudgetExceededError):
        assert_within_budget(layer.weight, before.double(), before)
    layer.unmerge()
    if exact:
        assert torch.equal(layer.weight, before)
    else:
        bound = before * (1 + torch.finfo(before.dtype).eps)
        assert_within_budget(layer.weight, before.double(), bound)


def test_merge_of_nan_is_refused():
    layer = strengthen(LoRAEmbedding(5, 4, r=2))
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.lora_embedding_B[0, 0] = torch.nan
    with pytest.raises(InvalidArgumentError, match="NaN"):
        layer.merge()
    assert torch.equal(layer.weight, before) and not layer.merged


@pytest.mark.parametrize("kind", LAYERS)
def test_low_precision_base_has_an_fp32_adapter(kind):
    make, convert, data = LAYERS[kind]
    x = data()
    layer = strengthen(convert(make().bfloat16(), r=2))
    y = layer(x if kind == "embedding" else x.bfloat16())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(f.grad.dtype == torch.float32 for f in layer.factors().values())


def test_dropout_of_convolutions_is_on_the_adapter_path_in_training_alone():
    layer = strengthen(LoRAConv1d(4, 6, 3, r=2, dropout=1.0))
    x = torch.randn(2, 4, 9)
    plain = nn.Conv1d.forward(layer, x)
    assert torch.equal(layer.train()(x), plain)
    assert not torch.equal(layer.eval()(x), plain)


@pytest.mark.parametrize("kind", ["embedding", "conv1d", "conv2d", "conv3d"])
def test_agrees_with_peft(kind):
    peft = pytest.importorskip("peft")
    make, convert, data = LAYERS[kind]
    plain, x = make().double(), data()
    x = x if kind == "embedding" else x.double()
    layer = strengthen(convert(copy.deepcopy(plain), r=2, alpha=3))
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(plain), config).double()
    state = {f"base_model.model.0.{name}": f for name, f in layer.factors().items()}
    loaded = peft.set_peft_model_state_dict(model, {k: v.detach() for k, v in state.items()})
    assert loaded.unexpected_keys == []
    want = model(x)
    assert_within_budget(layer(x), want, want)


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda: LoRAEmbedding.from_embedding(nn.Embedding(5, 4, max_norm=1.0)), "max_norm"),
        (lambda: LoRAEmbedding.from_embedding(nn.Embedding(5, 4, sparse=True)), "sparse"),
        (lambda: LoRAEmbedding.from_embedding(nn.Linear(5, 4)), "accepted: exactly"),
        (lambda: LoRAConv2d.from_conv(nn.Conv2d(4, 4, 3, groups=2)), "2 groups"),
        (lambda: LoRAConv2d.from_conv(nn.Conv1d(4, 4, 3)), "it is a Conv1d; accepted: Conv2d"),
        (lambda: LoRAConv2d.from_conv(nn.ConvTranspose2d(4, 4, 3)), "accepted: exactly"),
        (lambda: LoRAConv1d(4, 4, 3, r=0), "r=0"),
        (lambda: LoRAConv1d(4, 4, 3, dropout=2.0), "dropout=2.0"),
        (lambda: LoRAEmbedding(4, 4, alpha=0), "alpha=0"),
    ],
)
def test_what_cannot_be_adapted(make, fragment):
    with pytest.raises(InvalidArgumentError) as caught:
        make()
    assert fragment in str(caught.value) and "\n" not in str(caught.value)
