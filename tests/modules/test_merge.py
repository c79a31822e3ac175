"""merge and unmerge: numbers, exact restoration, refusals that leave the model alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from adapter_models import Net, adapted_net, assert_unchanged, net_input, state, strengthen
from torch import nn

import lora_kernels as lk
from lora_kernels.errors import InvalidArgumentError
from lora_kernels.modules.lora_linear import adapters_disabled
from lora_kernels.testing import assert_within_budget

LAYERS = ["inp", "layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down", "head"]


def single(dtype=torch.float32, **options):
    options = {"r": 4, "alpha": 6, "dtype": dtype, **options}
    return nn.Sequential(strengthen(lk.LoRALinear(24, 20, **options)))


def folded(layer, dtype):
    """W + s B A, with DoRA's rescaling, in plain PyTorch."""
    w, a, b = (t.detach().to(dtype) for t in (layer.weight, layer.lora_A, layer.lora_B))
    merged = w + layer.scaling * (b @ a)
    if layer.dora:
        merged *= (layer.lora_magnitude_vector.detach().to(dtype) / merged.norm(dim=1))[:, None]
    return merged


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merged_weight_is_rounded_once(dtype, dora):
    model = single(dtype, dora=dora, rslora=True)
    layer = model[0]
    wide, low = folded(layer, torch.float64), folded(layer, torch.float32).to(dtype)
    original = layer.weight.clone()
    assert lk.merge(model) == ["0"]
    assert layer.merged
    assert_within_budget(layer.weight, wide, low)
    if dtype != torch.float32:
        # The nearest value nearly everywhere, unlike adding an update that was rounded before.
        twice = original + (wide - original.double()).to(dtype)
        nearest = wide.to(dtype)
        assert 10 * (layer.weight != nearest).sum() < (twice != nearest).sum()


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"rslora": True}], ids=str)
def test_merged_model_computes_the_same(options):
    base, model = adapted_net(**options)
    x = net_input()
    wide = copy.deepcopy(model).double()(x.double())
    with torch.no_grad():
        before = model(x)
        assert lk.merge(model) == LAYERS
        assert_within_budget(model(x), wide, plain_merged(base, model)(x))
        assert not torch.equal(base(x), before)


def plain_merged(base, model):
    """The base net with the merged weights: nothing but nn.Linear."""
    plain = copy.deepcopy(base)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" not in k})
    return plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_exact_unmerge_restores_every_bit(dora, dtype):
    model = single(dtype, dora=dora)
    weight = model[0].weight.clone()
    x = torch.randn(3, 24).to(dtype)
    y = model(x)
    assert lk.merge(model, exact=True) == lk.unmerge(model) == ["0"]
    assert torch.equal(model[0].weight, weight) and torch.equal(model(x), y)
    assert not model[0].merged and not model[0]._unmerge_state


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_unmerge_subtracts_to_rounding(dora):
    model = single(dora=dora)
    layer = model[0]
    weight = layer.weight.clone()
    update = layer.scaling * (layer.lora_B @ layer.lora_A)
    ratio = torch.ones(20, 1)
    if dora:
        ratio = layer.lora_magnitude_vector[:, None] / (weight + update).norm(dim=1, keepdim=True)
    plain = folded(layer, torch.float32) / ratio - update
    lk.merge(model)
    lk.unmerge(model)
    assert_within_budget(layer.weight, weight.double(), plain)
    assert not layer.merged


def test_subtracting_in_bf16_cannot_restore():
    """Why exact=True exists; fails when unmerge always restores and the note can go."""
    model = single(torch.bfloat16)
    weight = model[0].weight.clone()
    lk.merge(model)
    lk.unmerge(model)
    assert not torch.equal(model[0].weight, weight)


def test_merging_twice_and_unmerging_twice_changes_nothing():
    _, model = adapted_net()
    assert lk.merge(model) == LAYERS
    weight = model.head.weight.clone()
    assert lk.merge(model) == [] and torch.equal(model.head.weight, weight)
    lk.unmerge(model)
    weight = model.head.weight.clone()
    assert lk.unmerge(model) == [] and torch.equal(model.head.weight, weight)


def test_merged_layers_stay_merged_in_training_and_give_the_adapter_no_gradient():
    model = single(dropout=0.5)
    lk.merge(model)
    model.train()
    x = torch.randn(3, 24, requires_grad=True)
    y = model(x)
    assert torch.equal(y, nn.functional.linear(x, model[0].weight, model[0].bias))
    y.sum().backward()
    assert x.grad is not None and model[0].lora_A.grad is None


def test_a_merged_adapter_cannot_be_disabled():
    model = single()
    lk.merge(model)
    with pytest.raises(InvalidArgumentError, match="unmerge"), adapters_disabled(model):
        pass
    model[0].adapter_enabled = False
    with pytest.raises(InvalidArgumentError, match="unmerge"):
        model(torch.randn(2, 24))


def test_the_version_counter_moves():
    model = single()
    versions = [model[0].weight._version]
    for step in (lk.merge, lk.unmerge):
        step(model)
        versions.append(model[0].weight._version)
    assert versions[0] < versions[1] < versions[2]


def test_shared_layers_are_merged_once():
    layer = strengthen(lk.LoRALinear(8, 8, r=2))
    model = nn.ModuleDict({"a": layer, "b": layer})
    want = folded(layer, torch.float32)
    assert lk.merge(model) == ["a"]
    assert_within_budget(layer.weight, want.double(), want)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
def test_a_copy_of_a_merged_model_unmerges(duplicate):
    model = single(dora=True)
    weight = model[0].weight.clone()
    lk.merge(model, exact=True)
    twin = duplicate(model)
    lk.unmerge(twin)
    assert torch.equal(twin[0].weight, weight) and model[0].merged


def test_kept_copies_are_not_in_the_state_dict():
    model = single()
    keys = set(model.state_dict())
    lk.merge(model, exact=True)
    assert set(model.state_dict()) == keys


def test_like_peft():
    peft = pytest.importorskip("peft")
    base, model = adapted_net(dora=True)
    theirs = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True),
    )
    lk.merge(copy.deepcopy(model))
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, lk.LoRALinear):
                other = theirs.base_model.model.get_submodule(name)
                other.lora_A["default"].weight.copy_(layer.lora_A)
                other.lora_B["default"].weight.copy_(layer.lora_B)
                other.lora_magnitude_vector["default"].weight.copy_(layer.lora_magnitude_vector)
    wide = {n: folded(m, torch.float64) for n, m in model.named_modules() if hasattr(m, "lora_A")}
    lk.merge(model)
    theirs.merge_adapter()
    for name, weight in wide.items():
        other = theirs.base_model.model.get_submodule(name).weight
        assert_within_budget(model.get_submodule(name).weight, weight, other, name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_result_that_is_not_finite_is_refused(value):
    _, model = adapted_net()
    with torch.no_grad():
        model.head.lora_B[0, 0] = value
    before = state(model)
    with pytest.raises(InvalidArgumentError, match="'head' would give a weight with NaN"):
        lk.merge(model)
    assert_unchanged(model, before)
    lk.merge(model, safe=False)
    assert model.head.merged and not model.head.weight.isfinite().all()


def test_overflow_of_the_weights_dtype_is_refused():
    model = single(torch.float16)
    with torch.no_grad():
        model[0].lora_A.fill_(1e3)
        model[0].lora_B.fill_(1e3)
    with pytest.raises(InvalidArgumentError, match="infinity"):
        lk.merge(model)


def test_a_magnitude_of_zero_needs_the_exact_way():
    model = single(dora=True)
    with torch.no_grad():
        model[0].lora_magnitude_vector[2] = 0
    weight = model[0].weight.clone()
    lk.merge(model, exact=True)
    lk.unmerge(model)
    assert torch.equal(model[0].weight, weight)
    lk.merge(model)
    merged = model[0].weight.clone()
    with pytest.raises(InvalidArgumentError, match="unmerging"):
        lk.unmerge(model)
    assert torch.equal(model[0].weight, merged) and model[0].merged


def test_tied_weights_are_refused():
    model = nn.Module()
    model.embed = nn.Embedding(11, 24)
    model.lm_head = nn.Linear(24, 11, bias=False)
    model.lm_head.weight = model.embed.weight
    lk.replace_modules(model)
    before = state(model)
    with pytest.raises(InvalidArgumentError, match=r"'lm_head'.*'embed.weight'"):
        lk.merge(model)
    assert_unchanged(model, before)


def test_models_that_are_refused():
    with pytest.raises(InvalidArgumentError, match="no LoRALinear"):
        lk.merge(Net())
    with pytest.raises(InvalidArgumentError, match="no LoRALinear"):
        lk.unmerge(Net())
    with pytest.raises(InvalidArgumentError, match="meta device"):
        lk.merge(lk.LoRALinear(3, 3, device="meta"))
    with pytest.raises(InvalidArgumentError, match="is a list"):
        lk.merge([])
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["head"]))
    with pytest.raises(InvalidArgumentError, match=r"merge_adapter\(\)"):
        lk.merge(theirs)
    with pytest.raises(InvalidArgumentError, match=r"unmerge_adapter\(\)"):
        lk.unmerge(theirs)
