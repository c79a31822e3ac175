"""replace_modules: which layers, what else changes, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from adapter_models import LINEARS, Net, assert_unchanged, net_input, state, strengthen
from torch import nn

import lora_kernels as lk
from lora_kernels.errors import BackendUnavailableError, InvalidArgumentError
from lora_kernels.modules.report import LayerReport, Report
from lora_kernels.testing import assert_within_budget


def adapted(model):
    return [n for n, m in model.named_modules() if isinstance(m, lk.LoRALinear)]


def trainable(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


class LanguageModel(nn.Module):
    """As transformers' models answer, with tied embeddings."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 24)
        self.body = Net(24)
        self.lm_head = nn.Linear(24, 11, bias=False)
        self.lm_head.weight = self.embed.weight

    def get_output_embeddings(self):
        return self.lm_head


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Net()
        self.classifier = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3))

    def get_output_embeddings(self):
        return None


def test_all_linear_of_a_plain_module_is_every_linear():
    model = Net()
    report = lk.replace_modules(model, r=3, alpha=5, dropout=0.1)
    assert adapted(model) == LINEARS
    assert [(e.name, e.status, e.reason) for e in report.layers] == [
        (name, "fused", "") for name in LINEARS
    ]
    assert all((m.r, m.alpha, m.dropout) == (3, 5, 0.1) for m in model.modules() if hasattr(m, "r"))
    assert trainable(model) == {f"{n}.{p}" for n in LINEARS for p in ("lora_A", "lora_B")}


def test_replacing_changes_no_output_and_no_weight():
    model = Net()
    x = net_input()
    weights, want = copy.deepcopy(model.state_dict()), model(x)
    storage = model.head.weight.data_ptr()
    lk.replace_modules(model)
    assert torch.equal(model(x), want) and model.head.weight.data_ptr() == storage
    for name, tensor in weights.items():
        assert torch.equal(model.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("ALL-Linear", LINEARS),
        (["up"], ["layers.0.up", "layers.1.up"]),
        (("up", "head"), ["layers.0.up", "layers.1.up", "head"]),
        ({"layers.0.down"}, ["layers.0.down"]),
        (r"layers\.\d+\.(up|down)", LINEARS[1:5]),
        (r".*\.1\..*", LINEARS[3:5]),
        (".*", LINEARS),
        (["up", "norm"], ["layers.0.up", "layers.1.up"]),
    ],
    ids=str,
)
def test_targets(targets, names):
    model = Net()
    report = lk.replace_modules(model, targets=targets)
    assert adapted(model) == names
    assert {e.name for e in report.layers} >= set(LINEARS)
    assert [e.name for e in report.fused] == names
    assert all(e.reason for e in report.stock)


@pytest.mark.parametrize("targets", ["all-linear", ["up", "down"], r"layers\.0\..*(n|p)", ["head"]])
def test_the_same_layers_as_peft(targets):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(Net(), peft.LoraConfig(r=4, target_modules=targets))
    names = [n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")]
    model = Net()
    lk.replace_modules(model, targets=targets)
    assert adapted(model) == names


def test_exclude():
    model = Net()
    report = lk.replace_modules(model, exclude=["down", "head"])
    assert adapted(model) == ["inp", "layers.0.up", "layers.1.up"]
    assert {e.reason for e in report.stock} == {"in exclude"}
    model = Net()
    lk.replace_modules(model, exclude=r"layers\..*")
    assert adapted(model) == ["inp", "head"]


def test_output_embeddings_are_left_alone_and_stay_tied():
    model = LanguageModel()
    report = lk.replace_modules(model)
    assert "lm_head" not in adapted(model) and model.lm_head.weight is model.embed.weight
    assert "output embeddings" in {e.name: e.reason for e in report.layers}["lm_head"]
    model = LanguageModel()
    lk.replace_modules(model, targets=["lm_head"])
    assert adapted(model) == ["lm_head"] and model.lm_head.weight is model.embed.weight


def test_classification_head_is_left_alone_and_can_stay_trainable():
    model = Classifier()
    report = lk.replace_modules(model)
    assert adapted(model) == [f"body.{n}" for n in LINEARS]
    assert "classification head" in {e.name: e.reason for e in report.layers}["classifier.1"]
    assert not any(n.startswith("classifier") for n in trainable(model))
    model = Classifier()
    lk.replace_modules(model, modules_to_save=["classifier"])
    assert {"classifier.0.weight", "classifier.1.bias"} <= trainable(model)
    assert adapted(model) == [f"body.{n}" for n in LINEARS]


def test_a_shared_module_is_replaced_everywhere():
    model = Net()
    model.layers[1].up = model.layers[0].up
    model.alias = model.layers[0]
    lk.replace_modules(model, targets=["layers.0.up"])
    assert model.layers[1].up is model.layers[0].up is model.alias.up
    assert isinstance(model.alias.up, lk.LoRALinear)


def test_tied_weights_stay_one_parameter():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    lk.replace_modules(model)
    assert model[0].weight is model[1].weight and model[0].lora_A is not model[1].lora_A


def test_only_exact_linear_layers_and_the_others_say_why():
    class Special(nn.Linear):
        pass

    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": Special(4, 4),
                           "attention": nn.MultiheadAttention(4, 2)})  # fmt: skip
    report = lk.replace_modules(model)
    reasons = {e.name: e.reason for e in report.layers}
    assert adapted(model) == ["a"] and set(reasons) == {"a", "b", "attention.out_proj"}
    assert "Special" in reasons["b"] and "Quantizable" in reasons["attention.out_proj"]


@pytest.mark.parametrize("nested", [False, True], ids=["layer", "encoder"])
def test_torchs_encoder_calls_the_adapted_layers(nested):
    """In evaluation torch has a fused path that reads the weights and would skip the adapter."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2) if nested else nn.Sequential(layer)
    x = torch.randn(3, 7, 16)
    lk.replace_modules(model)
    strengthen(model)
    options = {}
    if nested:
        padding = torch.zeros(3, 7, dtype=torch.bool)
        padding[1, 5:] = True
        options = {"src_key_padding_mask": padding}
    kept = ~options.get("src_key_padding_mask", torch.zeros(3, 7, dtype=torch.bool))
    slow = model.train()(x, **options)[kept]
    wide = copy.deepcopy(model).double()(x.double(), **options)[kept]
    with torch.no_grad():
        assert_within_budget(model.eval()(x, **options)[kept], wide, slow)


def test_replacing_twice_keeps_what_is_there():
    model = Net()
    lk.replace_modules(model, r=3, targets=["up"], modules_to_save=["head"])
    first = model.layers[0].up
    report = lk.replace_modules(model, r=5, targets=["up", "down"])
    assert model.layers[0].up is first and first.r == 3 and model.layers[0].down.r == 5
    assert "already" in {e.name: e.reason for e in report.layers}["layers.0.up"]
    assert {"layers.0.up.lora_A", "layers.1.down.lora_B", "head.weight"} <= trainable(model)


def test_options_reach_the_layers():
    model = Net().eval()
    lk.replace_modules(model, rslora=True, dora=True, adapter_dtype=torch.float64)
    layer = model.head
    assert layer.rslora and layer.dora and layer.lora_A.dtype == torch.float64
    assert not layer.training


def test_wrapped_models():
    model = Net()
    wrapped = torch.compile(model, backend="eager")
    report = lk.replace_modules(wrapped, targets=["head"])
    assert [e.name for e in report.fused] == ["head"]
    assert isinstance(model.head, lk.LoRALinear)


def test_report_is_a_table_and_a_dict():
    report = lk.replace_modules(Net(), targets=["head"])
    entries = report.to_dict()["layers"]
    assert report.to_dict()["groups"] == [] and len(entries) == len(LINEARS)
    assert entries[-1].keys() == {"name", "status", "reason", "backend"}
    backend = lk.explain("lora_linear", M=512, K=24, N=5, rank=16, dtype="float32")["backend"]
    assert entries[-1] == {"name": "head", "status": "fused", "reason": "", "backend": backend}
    assert entries[0] == {
        "name": "inp", "status": "stock", "reason": "not in targets", "backend": "",
    }  # fmt: skip
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "status", "backend", "reason"]
    assert lines[-1] == "1 of 6 layers fused"
    assert len(lines) == 3 + len(LINEARS)


def test_report_counts_groups():
    report = Report([LayerReport("q", "fused", "", "aten")], [{"names": ["q", "k"]}])
    assert report.to_dict()["groups"] == [{"names": ["q", "k"]}]
    assert str(report).endswith("1 of 1 layers fused, 1 groups")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"r": 0}, "r=0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"dropout": 2}, "dropout=2"),
        ({"quant": "nf5"}, "quant='nf5'"),
        ({"quant": "nf4", "dora": True}, "dora=True"),
        ({"adapter_dtype": torch.int8}, "adapter_dtype"),
        ({"targets": ["missing"]}, r"\['missing'\] match no linear layer .* it has 6: inp"),
        ({"targets": "missing"}, "'missing' match no linear layer"),
        ({"targets": []}, "match no linear layer"),
        ({"targets": ["norm"]}, "layers.0.norm: its type is"),
        ({"targets": "(up"}, "not a regular expression"),
        ({"targets": 3}, "targets=3"),
        ({"targets": [3]}, r"targets=\[3\]"),
        ({"exclude": ".*"}, "match no linear layer"),
        ({"exclude": "(up"}, "exclude='\\(up'"),
        ({"modules_to_save": ["missing"]}, "no module 'missing'"),
        ({"modules_to_save": "head"}, "modules_to_save='head'"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments_leave_the_model(options, problem):
    model = Net()
    before = state(model)
    with pytest.raises(InvalidArgumentError, match=problem) as caught:
        lk.replace_modules(model, **options)
    assert "\n" not in str(caught.value)
    assert_unchanged(model, before)


def test_models_that_are_refused():
    with pytest.raises(InvalidArgumentError, match="model is a dict"):
        lk.replace_modules({})
    with pytest.raises(InvalidArgumentError, match="from_linear"):
        lk.replace_modules(nn.Linear(3, 3))
    with pytest.raises(InvalidArgumentError, match="it has none"):
        lk.replace_modules(nn.Sequential(nn.ReLU()))
    model = LanguageModel()
    with pytest.raises(InvalidArgumentError, match=r"'lm_head.weight' is tied to 'embed.weight'"):
        lk.replace_modules(model, modules_to_save=["lm_head"])
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["head"]))
    with pytest.raises(InvalidArgumentError, match=r"lora_kernels.apply"):
        lk.replace_modules(theirs)


def test_failure_while_building_leaves_the_model(monkeypatch):
    model = Net()
    before = state(model)
    build, calls = lk.LoRALinear.from_linear.__func__, []

    def failing(cls, *args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return build(cls, *args, **options)

    monkeypatch.setattr(lk.LoRALinear, "from_linear", classmethod(failing))
    with pytest.raises(MemoryError):
        lk.replace_modules(model)
    assert_unchanged(model, before)


def test_a_backend_that_cannot_run_is_named_before_anything_changes(monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "cuda")
    model = Net()
    before = state(model)
    with pytest.raises(BackendUnavailableError, match="cuda"):
        lk.replace_modules(model)
    assert_unchanged(model, before)


def test_training_moves_the_adapter_only():
    model = Net()
    lk.replace_modules(model, r=4, alpha=8)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, labels = net_input(32), torch.randint(0, 5, (32,))
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    for name, tensor in frozen.items():
        assert torch.equal(dict(model.named_parameters())[name], tensor)
