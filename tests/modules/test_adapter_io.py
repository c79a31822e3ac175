"""save_adapter and load_adapter: PEFT in both directions, round trips, what each file holds."""

from __future__ import annotations

import copy
import json
import os
import warnings

import pytest
import torch
from adapter_models import (
    Net,
    adapted_net,
    assert_unchanged,
    fill_peft,
    net_input,
    state,
    strengthen,
)
from torch import nn

import lora_kernels as lk
from lora_kernels.errors import AdapterFileError, InvalidArgumentError
from lora_kernels.modules.safetensors_file import read_file, write
from lora_kernels.testing import assert_within_budget

peft = pytest.importorskip("peft")


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def weights_of(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def peft_net(**options):
    """(plain net, PEFT model on a copy of it, with strong adapters)."""
    base = Net()
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["up", "down"], **options}
    return base, fill_peft(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options)))


def assert_same_function(ours, theirs, x):
    """Ours errs no more than PEFT's model does against PEFT's model in fp64."""
    ours.eval(), theirs.eval()
    with torch.no_grad():
        wide = copy.deepcopy(theirs).double()(x.double())
        assert_within_budget(ours(x), wide, theirs(x))


OURS = {
    "all-linear": {},
    "suffixes": {"targets": ["up", "head"]},
    "regex": {"targets": r"layers\.1\..*"},
    "rslora": {"rslora": True, "r": 8},
    "dora": {"dora": True},
    "dropout": {"dropout": 0.25},
    "alpha not whole": {"alpha": 2.5},
    "rank above the width": {"r": 40},
    "module saved whole": {"targets": ["up"], "modules_to_save": ["head", "layers.0.norm"]},
}


@pytest.mark.parametrize("case", OURS)
def test_peft_loads_what_we_save(case, tmp_path):
    base, model = adapted_net(**OURS[case])
    with torch.no_grad():
        model.head.weight.add_(0.5 if case == "module saved whole" else 0)
    lk.save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_same_function(model, theirs, net_input())
    assert sum(hasattr(m, "lora_A") for m in theirs.modules()) == sum(
        isinstance(m, lk.LoRALinear) for m in model.modules()
    )
    again = tmp_path / "again"
    theirs.save_pretrained(again)
    assert weights_of(again) == weights_of(tmp_path)


THEIRS = {
    "suffixes": {},
    "regex": {"target_modules": r".*\.(up|down)"},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "dropout": {"lora_dropout": 0.25},
    "patterns": {
        "rank_pattern": {"up": 6, r"layers\.1\.down": 3},
        "alpha_pattern": {r"^layers\.0\.up": 5, "down": 9},
    },
    "one layer of a list": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "one layer": {"layers_to_transform": 0, "layers_pattern": ["blocks", "layers"]},
    "excluded by name": {"exclude_modules": ["layers.0.up"]},
    "excluded by regex": {"exclude_modules": r".*\.1\.up"},
    "module saved whole": {"modules_to_save": ["head", "norm"]},
    "saved modules win": {"target_modules": "all-linear", "modules_to_save": ["head"]},
}


@pytest.mark.parametrize("case", THEIRS)
def test_we_load_what_peft_saves(case, tmp_path):
    base, theirs = peft_net(**THEIRS[case])
    theirs.save_pretrained(tmp_path)
    model = copy.deepcopy(base)
    report = lk.load_adapter(model, tmp_path)
    adapted = [n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")]
    assert [e.name for e in report.layers] == sorted(adapted)
    assert all(e.status == "fused" and e.backend for e in report.layers)
    assert_same_function(model, theirs, net_input())
    again = tmp_path / "again"
    lk.save_adapter(model, again)
    assert weights_of(again) == weights_of(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), again)
    assert_same_function(model, reloaded, net_input())
    dropouts = {m.dropout for m in model.modules() if isinstance(m, lk.LoRALinear)}
    assert dropouts == {THEIRS[case].get("lora_dropout", 0.0)}


def test_ranks_alphas_and_rules_may_differ_between_layers(tmp_path):
    base = Net()
    model = copy.deepcopy(base)
    lk.replace_modules(model, r=4, alpha=8, targets=["up"])
    lk.replace_modules(model, r=6, alpha=3, targets=["layers.0.down"], rslora=True)
    lk.replace_modules(model, r=4, alpha=5, targets=["head"])
    strengthen(model)
    lk.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    got = {n: m.scaling["default"] for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    want = {n: m.scaling for n, m in model.named_modules() if isinstance(m, lk.LoRALinear)}
    assert {n.removeprefix("base_model.model."): s for n, s in got.items()} == pytest.approx(want)
    twin = copy.deepcopy(base)
    lk.load_adapter(twin, tmp_path)
    for other in (model, twin):
        assert_same_function(other, theirs, net_input())


class Names(nn.Module):
    """One adapted name is the ending of others."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.sub = nn.ModuleDict({"q": nn.Linear(8, 8), "a-b": nn.Linear(8, 8)})
        self.big_head = nn.Linear(8, 8)
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.big_head(self.sub["a-b"](self.sub["q"](self.q(x)))))


@pytest.mark.parametrize("targets", ["q", "head", r"sub\.(q|a-b)", "q|big_head"])
def test_targets_select_exactly_the_adapted_layers(targets, tmp_path):
    base = Names()
    model = copy.deepcopy(base)
    lk.replace_modules(model, r=2, targets=targets)
    strengthen(model)
    lk.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    found = {n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert found == {n for n, m in model.named_modules() if isinstance(m, lk.LoRALinear)}
    assert_same_function(model, theirs, torch.randn(3, 8))


def test_mixed_ranks_under_confusable_names(tmp_path):
    base = Names()
    model = copy.deepcopy(base)
    lk.replace_modules(model, r=2, targets=["sub.q", "head", "big_head"])
    lk.replace_modules(model, r=3, targets="q")
    strengthen(model)
    lk.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_same_function(model, theirs, torch.randn(3, 8))


def test_what_peft_cannot_be_told_is_an_error(tmp_path):
    model = Names()
    lk.replace_modules(model, targets=["q"], modules_to_save=["head"])
    with pytest.raises(InvalidArgumentError, match="'big_head'"):
        lk.save_adapter(model, tmp_path)
    model = nn.ModuleDict(
        {"sub": nn.ModuleDict({"head": nn.Linear(4, 4)}), "sub_head": nn.Linear(4, 4)}
    )
    lk.replace_modules(model, targets=["sub_head"], modules_to_save=["sub.head"])
    with pytest.raises(InvalidArgumentError, match="hide the adapted layer 'sub_head'"):
        lk.save_adapter(model, tmp_path)
    model = nn.ModuleDict({"a": lk.LoRALinear(4, 4), "b": lk.LoRALinear(4, 4, dora=True)})
    with pytest.raises(InvalidArgumentError, match="DoRA"):
        lk.save_adapter(model, tmp_path)
    with pytest.raises(InvalidArgumentError, match="itself"):
        lk.save_adapter(lk.LoRALinear(4, 4), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_base_dtypes(dtype, tmp_path):
    base = Net().to(dtype)
    model = copy.deepcopy(base)
    lk.replace_modules(model, r=4, alpha=8)
    strengthen(model)
    lk.save_adapter(model, tmp_path)
    tensors, metadata = read_file(tmp_path / "adapter_model.safetensors")
    adapter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in tensors.values()} == {adapter_dtype} and metadata == {"format": "pt"}
    twin = copy.deepcopy(base)
    lk.load_adapter(twin, tmp_path)
    x = net_input(dtype=dtype)
    assert torch.equal(twin(x), model(x))
    low = copy.deepcopy(base)
    lk.load_adapter(low, tmp_path, adapter_dtype=torch.bfloat16)
    assert low.head.lora_A.dtype == torch.bfloat16


def test_loading_into_existing_layers(tmp_path):
    base, model = adapted_net(rslora=True, targets=["up"])
    lk.save_adapter(model, tmp_path)
    twin = copy.deepcopy(base)
    lk.replace_modules(twin, r=4, alpha=99, dropout=0.5, targets=["up"])
    twin.head.weight.requires_grad_(True)
    layer, factor = twin.layers[0].up, twin.layers[0].up.lora_A
    lk.load_adapter(twin, tmp_path)
    assert twin.layers[0].up is layer and layer.lora_A is factor and layer.dropout == 0.5
    assert (layer.alpha, layer.rslora) == (8, True) and twin.head.weight.requires_grad
    x = net_input()
    assert torch.equal(twin.eval()(x), model.eval()(x))


def test_loading_freezes_as_replacing_does(tmp_path):
    base, model = adapted_net(targets=["up"], modules_to_save=["head"])
    lk.save_adapter(model, tmp_path)
    twin = copy.deepcopy(base)
    lk.load_adapter(twin, tmp_path)
    for (name, one), (_, other) in zip(
        model.named_parameters(), twin.named_parameters(), strict=True
    ):
        assert one.requires_grad == other.requires_grad, name
        assert torch.equal(one, other), name


def test_training_goes_on_after_loading(tmp_path):
    base, model = adapted_net()
    lk.save_adapter(model, tmp_path)
    twin = copy.deepcopy(base)
    lk.load_adapter(twin, tmp_path)
    x = net_input()
    for net in (model, twin):
        net(x).square().sum().backward()
    assert torch.equal(model.head.lora_A.grad, twin.head.lora_A.grad)


def test_wrapped_models_are_saved_under_their_own_names(tmp_path):
    base, model = adapted_net()
    lk.save_adapter(model, tmp_path / "plain")
    lk.save_adapter(nn.DataParallel(model), tmp_path / "parallel")
    lk.save_adapter(torch.compile(model, backend="eager"), tmp_path / "compiled")
    inner = copy.deepcopy(model)
    inner.layers[0] = torch.compile(inner.layers[0], backend="eager")
    lk.save_adapter(inner, tmp_path / "inner")
    for name in ("parallel", "compiled", "inner"):
        assert weights_of(tmp_path / name) == weights_of(tmp_path / "plain")
        assert config_of(tmp_path / name) == config_of(tmp_path / "plain")
    lk.load_adapter(torch.compile(base, backend="eager"), tmp_path / "inner")
    assert torch.equal(base(x := net_input()), model(x))


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_shared_modules_are_saved_once_and_loaded_everywhere(tmp_path):
    base = Net()
    base.layers[1] = base.layers[0]
    model = copy.deepcopy(base)
    lk.replace_modules(model, targets=["up", "head"])
    strengthen(model)
    lk.save_adapter(model, tmp_path)
    twin = copy.deepcopy(base)
    assert [e.name for e in lk.load_adapter(twin, tmp_path).layers] == ["head", "layers.0.up"]
    x = net_input()
    assert twin.layers[1].up is twin.layers[0].up and torch.equal(twin(x), model(x))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_same_function(model, theirs, x)


def test_a_shared_layer_may_come_under_both_names_but_only_with_one_content(tmp_path):
    base = Net()
    base.layers[1] = base.layers[0]
    theirs = fill_peft(
        peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["up"]))
    )
    theirs.save_pretrained(tmp_path)
    model = copy.deepcopy(base)
    lk.load_adapter(model, tmp_path)
    assert_same_function(model, theirs, net_input())
    tensors, metadata = read_file(tmp_path / "adapter_model.safetensors")
    for key in list(tensors):
        tensors[key.replace("layers.0", "layers.1")] = tensors[key].clone()

    def rewrite():
        with open(tmp_path / "adapter_model.safetensors", "wb") as file:
            write(file, tensors, metadata)

    rewrite()
    twin = copy.deepcopy(base)
    lk.load_adapter(twin, tmp_path)
    assert torch.equal(twin(x := net_input()), model(x))
    tensors["base_model.model.layers.1.up.lora_A.weight"] += 1
    rewrite()
    before = state(base)
    with pytest.raises(AdapterFileError, match="are one layer of the model, but differ"):
        lk.load_adapter(base, tmp_path)
    assert_unchanged(base, before)


def test_the_configuration(tmp_path):
    _, model = adapted_net(targets=["up", "down"], dropout=0.1)
    model.config = type("Config", (), {"_name_or_path": "some/model"})()
    lk.save_adapter(model, tmp_path, task_type="CAUSAL_LM")
    config = config_of(tmp_path)
    assert config["target_modules"] == ["down", "up"]
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.1)
    assert isinstance(config["lora_alpha"], int)
    assert config["base_model_name_or_path"] == "some/model" and config["task_type"] == "CAUSAL_LM"
    assert set(config) <= set(peft.LoraConfig.__dataclass_fields__)
    text = (tmp_path / "adapter_config.json").read_text()
    assert text == json.dumps(config, indent=2, sort_keys=True)
    lk.save_adapter(model, tmp_path, base_model_name_or_path="other")
    assert config_of(tmp_path)["base_model_name_or_path"] == "other"
    with pytest.raises(InvalidArgumentError, match="task_type='CLASSIFY'"):
        lk.save_adapter(model, tmp_path, task_type="CLASSIFY")


def test_mixed_dropout_is_said(tmp_path):
    model = nn.ModuleDict({"a": lk.LoRALinear(4, 4), "b": lk.LoRALinear(4, 4, dropout=0.5)})
    with pytest.warns(UserWarning, match=r"dropout \[0\.0, 0\.5\]"):
        lk.save_adapter(model, tmp_path)


def test_trainable_parameters_that_are_not_saved_are_said(tmp_path):
    _, model = adapted_net(targets=["up"])
    model.head.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"2 trainable .*head\.weight, head\.bias"):
        lk.save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lk.save_adapter(model, tmp_path, modules_to_save=["head"])
    assert "base_model.model.head.bias" in read_file(tmp_path / "adapter_model.safetensors")[0]


def test_merged_models_are_saved_as_unmerged_and_not_loaded(tmp_path):
    _, model = adapted_net()
    lk.save_adapter(model, tmp_path)
    plain = weights_of(tmp_path)
    lk.merge(model)
    lk.save_adapter(model, tmp_path)
    assert weights_of(tmp_path) == plain
    before = state(model)
    with pytest.raises(InvalidArgumentError, match="unmerge"):
        lk.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_peft_models_and_models_without_adapter_are_refused(tmp_path):
    _, theirs = peft_net()
    with pytest.raises(InvalidArgumentError, match="save_pretrained"):
        lk.save_adapter(theirs, tmp_path)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(InvalidArgumentError, match=r"load_adapter\(directory, name\)"):
        lk.load_adapter(theirs, tmp_path)
    injected = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["up"]), Net())
    for module in injected.modules():
        if hasattr(module, "lora_A"):
            module.__class__ = type("Swapped", (type(module),), {"__module__": "elsewhere"})
    with pytest.raises(InvalidArgumentError, match="PEFT"):
        lk.replace_modules(injected)
    with pytest.raises(InvalidArgumentError, match="no LoRALinear"):
        lk.save_adapter(Net(), tmp_path)


def test_saving_follows_the_umask(tmp_path):
    _, model = adapted_net()
    old = os.umask(0o027)
    try:
        lk.save_adapter(model, tmp_path / "new" / "folder")
    finally:
        os.umask(old)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "new" / "folder").iterdir()}
    assert modes == {"adapter_model.safetensors": 0o640, "adapter_config.json": 0o640}


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_failed_save_leaves_the_old_files(failing, tmp_path, monkeypatch):
    _, model = adapted_net()
    lk.save_adapter(model, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with torch.no_grad():
        model.head.lora_B.add_(1)

    def fail(*args, **options):
        raise OSError(28, "No space left on device")

    if failing == "write":
        monkeypatch.setattr("lora_kernels.modules.safetensors_file._write_tensor", fail)
    else:
        monkeypatch.setattr(f"lora_kernels.modules.atomic_write.os.{failing}", fail)
    with pytest.raises(AdapterFileError, match=f"{tmp_path}.*No space left"):
        lk.save_adapter(model, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_saving_where_a_file_is(tmp_path):
    _, model = adapted_net()
    for bad in (None, 3, b"folder", "a\0b"):
        for call in (lk.save_adapter, lk.load_adapter):
            with pytest.raises(InvalidArgumentError, match="directory="):
                call(model, bad)
    (tmp_path / "taken").write_text("")
    with pytest.raises(AdapterFileError, match="taken: cannot be written"):
        lk.save_adapter(model, tmp_path / "taken")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_transformers_classifier_both_ways(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, num_labels=3,
    )  # fmt: skip
    base = transformers.BertForSequenceClassification(config).eval()
    ids = torch.randint(0, 50, (3, 9))
    model = copy.deepcopy(base)
    lk.replace_modules(model, r=4, alpha=8, modules_to_save=["classifier"])
    strengthen(model)
    with torch.no_grad():
        model.classifier.weight.normal_()
        want = model(ids).logits
        for task_type in (None, "SEQ_CLS"):
            lk.save_adapter(model, tmp_path, task_type=task_type)
            theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
            wide = copy.deepcopy(theirs).double()(ids).logits
            assert_within_budget(want, wide, theirs(ids).logits)
        theirs.save_pretrained(tmp_path / "theirs")
        twin = copy.deepcopy(base)
        lk.load_adapter(twin, tmp_path / "theirs")
        assert torch.equal(twin(ids).logits, want)
