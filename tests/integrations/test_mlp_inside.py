"""apply() on the MLPs of every family: one node each, and what brings the layers back."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import transformers as hf
from families import FAMILIES, run
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_kernels as lk
from lora_kernels.integrations.peft import mlp_blocks
from lora_kernels.modules import blocks
from lora_kernels.testing import assert_within_budget

WITH_BLOCKS = [name for name in FAMILIES if name not in ("gpt_oss", "llama")]


def applied(family: str, **settings: bool) -> nn.Module:
    model = FAMILIES[family].peft_model(torch.float32)
    report = lk.apply(model, fused_norms=False, fused_rope=False, **settings)
    kinds = (mlp_blocks.KIND, mlp_blocks.RECOMPUTED)
    entries = [g for g in report.groups if g["kind"] in kinds]
    if entries[0]["reason"].startswith("no kernel"):
        pytest.skip(entries[0]["reason"])
    assert len(entries) == 2 and not any(e["reason"] for e in entries)
    return model


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return got.keys() == want.keys() and all(torch.equal(t, want[n]) for n, t in got.items())


def assert_close(model: nn.Module, stock: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        got, low = model(**inputs).logits, stock(**inputs).logits
        assert_within_budget(got, copy.deepcopy(stock).double()(**inputs).logits, low)


def one_by_one(family: str, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Fused layers, the blocks' own forwards."""
    model = FAMILIES[family].peft_model(torch.float32)
    monkeypatch.setenv("LORA_KERNELS_DISABLE", "gated_activation")
    lk.apply(model, fused_norms=False, fused_rope=False)
    monkeypatch.delenv("LORA_KERNELS_DISABLE")
    return model


@pytest.mark.parametrize("family", WITH_BLOCKS)
def test_every_mlp_is_one_node(family: str, nodes: list[bool]) -> None:
    model = applied(family)
    run(model, FAMILIES[family].inputs())
    assert nodes == [True, True]


@pytest.mark.parametrize("path", ["intermediate", "output", "output.dropout", "output.dense",
                                  "intermediate.intermediate_act_fn"])  # fmt: skip
def test_a_hook_inside_of_bert_runs(path: str, nodes: list[bool]) -> None:
    model, inputs = applied("bert"), FAMILIES["bert"].inputs()
    seen: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if name.endswith(f"layer.0.{path}"):
            module.register_forward_hook(lambda _m, given, y: seen.extend([given[0], y]))
    run(model, inputs)
    assert len(seen) == 2 and all(isinstance(t, torch.Tensor) for t in seen)
    assert nodes.count(True) == 1


@pytest.mark.parametrize("family", ["bert", "whisper"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(family: str, reentrant: bool, nodes: list[bool]) -> None:
    model, inputs = applied(family), FAMILIES[family].inputs()
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name in ("dropout", "attention_dropout", "activation_dropout"):
        for module in model.modules():
            if isinstance(module.__dict__.get(name), float):
                setattr(module, name, 0.0)
    want = run(model.train(), inputs)
    nodes.clear()
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert same(run(model, inputs), want)
    # Forward and once more in the backward, which Whisper's ends inside of the node.
    assert nodes == [True] * (2 if family == "whisper" and not reentrant else 4)


@pytest.mark.parametrize("family", ["whisper", "t5_gated", "bert"])
def test_dropout_of_the_model(
    family: str, monkeypatch: pytest.MonkeyPatch, nodes: list[bool]
) -> None:
    """Of the argument of the last layer: the layers one by one; elsewhere it changes nothing."""
    model, other = applied(family), one_by_one(family, monkeypatch)
    for module in [*model.modules(), *other.modules()]:
        if isinstance(module, nn.Dropout):
            module.p = 0.4
        if isinstance(module.__dict__.get("activation_dropout"), float):
            module.activation_dropout = module.dropout = 0.4
    found = []
    for tried in (model.train(), other.train()):
        torch.manual_seed(2)
        found.append(run(tried, FAMILIES[family].inputs()))
    if family == "bert":
        assert nodes == [True, True]
        assert all(t.isfinite().all() for t in found[0].values())
    else:
        assert nodes == [] and same(*found)


def test_what_peft_changes_later(nodes: list[bool]) -> None:
    model, inputs = applied("bert"), FAMILIES["bert"].inputs()
    stock = FAMILIES["bert"].peft_model(torch.float32)
    with torch.no_grad(), model.disable_adapter(), stock.disable_adapter():
        assert_close(model, stock, inputs)
    for tried in (model, stock):
        tried.merge_adapter()
    assert_close(model, stock, inputs)
    assert not any(nodes)
    model.unmerge_adapter()
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert nodes[-2:] == [True, True]
    assert len(out.hidden_states) == 3 and len(out.attentions) == 2
    assert all(type(t) is torch.Tensor for t in (*out.hidden_states, *out.attentions))


def test_copies_pickles_and_undoing(nodes: list[bool]) -> None:
    model, inputs = applied("bert"), FAMILIES["bert"].inputs()
    keys, want = list(model.state_dict()), run(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        nodes.clear()
        assert same(run(other, inputs), want) and nodes == [True, True]
        assert list(other.state_dict()) == keys
        lk.unapply(other)
        assert not any(isinstance(m, mlp_blocks.FusedMlp) for m in other.modules())


def test_chunks_of_the_sequence(nodes: list[bool]) -> None:
    model, inputs = applied("bert"), FAMILIES["bert"].inputs()
    for module in model.modules():
        if hasattr(module, "chunk_size_feed_forward"):
            module.chunk_size_feed_forward = 1
    run(model, inputs)
    assert nodes == [True] * 22  # eleven tokens, two layers


def test_activation_computed_again(nodes: list[bool]) -> None:
    for family in ("bert", "phi3", "whisper"):
        inputs = FAMILIES[family].inputs()
        want = run(applied(family), inputs)
        assert same(run(applied(family, recompute_activations=True), inputs), want)
    assert nodes == [True] * 12


class Layer(nn.Module):
    """Of no library: the names of the layers are all that is known."""

    def __init__(self, first: str, second: str, last: str) -> None:
        super().__init__()
        self.names = first, second, last
        for name in filter(None, (first, second)):
            self.add_module(name, nn.Linear(16, 24))
        self.add_module(last, nn.Linear(24, 16))
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, last = self.names
        h = self.act_fn(getattr(self, first)(x))
        return x + getattr(self, last)(h * getattr(self, second)(x) if second else h)


def adapted(*names: str, targets: tuple[str, ...] = ()) -> nn.Module:
    config = LoraConfig(target_modules=list(targets or filter(None, names)),
                        init_lora_weights=False)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(nn.Sequential(Layer(*names)), config)


def test_names_are_enough(nodes: list[bool]) -> None:
    for names in (("w1", "w3", "w2"), ("lin1", "", "lin2"), ("up_proj", "", "down_proj")):
        model, x = adapted(*names), torch.randn(4, 16)
        stock, want = copy.deepcopy(model), model(x).detach()
        lk.apply(model)
        with torch.no_grad():
            exact = stock.double()(x.double())
        assert_within_budget(model(x).detach(), exact, want)
        assert nodes == [True]
        nodes.clear()
    report = lk.apply(adapted("w1", "w3", "w2", targets=("w1",)))
    assert not any(g["kind"] == mlp_blocks.KIND for g in report.groups)


def test_registering_names(monkeypatch: pytest.MonkeyPatch, nodes: list[bool]) -> None:
    monkeypatch.setattr(blocks, "_rows", blocks.rows())
    model = adapted("shut", "open", "out")
    assert not any(g["kind"] == mlp_blocks.KIND for g in lk.apply(model).groups)
    names = blocks.Mlp("shut", "open", "out", "act_fn", inside=True)
    blocks.register_block(Layer, ("shut", "open"), mlp=names)
    lk.apply(model)
    model(torch.randn(4, 16))
    assert nodes == [True]


def test_an_activation_without_a_kernel_is_reported() -> None:
    settings = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4, "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    model = hf.CLIPVisionModel(hf.CLIPVisionConfig(**settings))
    model = get_peft_model(model, LoraConfig(target_modules=["fc1", "fc2"]))
    (entry,) = (g for g in lk.apply(model).groups if g["kind"] == mlp_blocks.KIND)
    assert entry["reason"] == "the activation is QuickGELUActivation"


def test_the_price_of_packed_weights_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"].peft_model(torch.bfloat16)
    report = lk.apply(model)
    if "cpu" not in {e.backend for e in report.fused}:
        pytest.skip("no packed weights here")
    weights = sum(p.numel() for n, p in model.named_parameters() if "base_layer.weight" in n)
    assert report.packed_bytes == report.to_dict()["packed_bytes"] == 2 * 2 * weights
    assert "packed copies of frozen weights will take about 0.1 MiB" in str(report)
    monkeypatch.setenv("LORA_KERNELS_PACK", "never")
    assert "packed_bytes" not in lk.apply(model).to_dict()
    monkeypatch.delenv("LORA_KERNELS_PACK")
    plain = FAMILIES["llama"].peft_model(torch.float32)
    without = lk.apply(plain).packed_bytes
    for module in plain.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = nn.Dropout(0.1)
    assert without <= lk.apply(plain).packed_bytes
