"""apply, unapply and applied: what changes, what does not, and what the report says."""

from __future__ import annotations

import copy
import io
import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import Embedding, Linear
from peft_models import CASES, Calls, Mlp, layer, lora_config, mlp
from torch import nn

import lora_kernels as lk
from lora_kernels.errors import (
    BackendUnavailableError,
    InvalidArgumentError,
    StrictFallbackError,
)
from lora_kernels.integrations.peft import FusedLoraLinear


def _classes(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


def _mixed() -> PeftModel:
    """One embedding and 14 linears with LoRA."""
    case = CASES["llama"]
    names = ["embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"]
    return case.peft_model(target_modules=[*names, "up_proj", "down_proj"])


def test_report_of_a_model() -> None:
    report = lk.apply(_mixed())
    as_dict = report.to_dict()
    assert json.loads(json.dumps(as_dict)) == as_dict
    groups = [g["members"] for g in as_dict["groups"] if g["kind"] == "grouped_lora_linear"]
    assert groups == 2 * [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]
    embedding, *linears = as_dict["layers"]
    assert embedding == {
        "name": "base_model.model.model.embed_tokens",
        "status": "stock",
        "reason": "peft.tuners.lora.layer.Embedding has no fused path",
        "backend": "",
    }
    assert len(linears) == 14
    backend = lk.explain("lora_linear", M=1024, K=48, N=48)["backend"]
    for entry in linears:
        assert entry.keys() == {"name", "status", "reason", "backend"}
        assert (entry["status"], entry["reason"], entry["backend"]) == ("fused", "", backend)
    assert linears[0]["name"] == "base_model.model.model.layers.0.self_attn.q_proj"


def test_transformers_knows_the_attention() -> None:
    code = (
        "import lora_kernels as lk, torch;"
        "lk.apply(torch.nn.Linear(2, 2));"
        "from transformers import AttentionInterface as A, AttentionMaskInterface as M;"
        "print('lora_kernels' in A().valid_keys(), 'lora_kernels' in M().valid_keys())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["True", "True"]


def test_report_table_joins_equal_blocks() -> None:
    lines = str(lk.apply(_mixed())).splitlines()
    assert lines[0].split() == ["layers", "status", "backend", "name", "reason"]
    # header, embedding, the linears of a block, its groups, summary
    others = ("rotation", "RMS norms", "the activation is one pass", "S themselves")
    rows = [line for line in lines if not any(words in line for words in others)]
    assert len([line for line in lines if line.endswith(others[2])]) == 1
    assert len(rows) == 1 + 1 + 7 + 2 + 1
    assert lines[9].endswith("layers.*.self_attn: q_proj, k_proj, v_proj: computed together")
    (down,) = (line.split() for line in lines if "down_proj" in line)
    assert (down[0], down[1], down[3]) == (
        "2",
        "fused",
        "base_model.model.model.layers.*.mlp.down_proj",
    )
    assert "Embedding has no fused path" in lines[1]
    assert lines[-1] == "14 of 15 LoRA layers fused"


def test_model_without_lora() -> None:
    report = lk.apply(Mlp())
    assert report.to_dict() == {"layers": [], "groups": []}
    assert str(report) == "no LoRA layer found"


@pytest.mark.parametrize("call", [lk.apply, lk.unapply, lambda m: lk.applied(m).__enter__()])
def test_not_a_module(call) -> None:
    with pytest.raises(InvalidArgumentError, match=r"model is a dict; accepted: torch\.nn\.Module"):
        call({})


def test_apply_twice_then_unapply_restores_every_class() -> None:
    model = _mixed()
    before = _classes(model)
    first = lk.apply(model)
    after = _classes(model)
    assert after.count(FusedLoraLinear) == 14 and Embedding in after
    assert lk.apply(model).to_dict() == first.to_dict()
    assert _classes(model) == after
    assert lk.unapply(model) == 14
    assert _classes(model) == before
    assert lk.unapply(model) == 0


def test_applied_restores_also_after_an_error() -> None:
    model = mlp()
    before = _classes(model)
    with pytest.raises(KeyError), lk.applied(model) as report:
        assert len(report.fused) == 3 and FusedLoraLinear in _classes(model)
        raise KeyError
    assert _classes(model) == before


def test_applied_leaves_layers_that_were_fused_before() -> None:
    model = mlp()
    lk.apply(layer(model, "up"))
    with lk.applied(model):
        assert _classes(model).count(FusedLoraLinear) == 3
    assert _classes(model).count(FusedLoraLinear) == 1


def test_layer_state_is_untouched() -> None:
    model = mlp()
    before = {n: set(m.__dict__) for n, m in model.named_modules()}
    keys = list(model.state_dict())
    lk.apply(model)
    model(torch.randn(3, 20)).sum().backward()
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == before
    assert list(model.state_dict()) == keys


def test_a_model_that_turns_stock_turns_stock_as_a_whole(monkeypatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules="all-linear"))
    before = _classes(model)
    report = lk.apply(model)
    assert report.fused and report.norms
    assert sum(a is not b for a, b in zip(_classes(model), before, strict=True)) > len(report.fused)
    monkeypatch.setenv("LORA_KERNELS_DISABLE", "apply")
    assert not lk.apply(model).fused
    assert _classes(model) == before


def test_only_forward_and_the_repr_are_overridden() -> None:
    own = {name for name in vars(FusedLoraLinear) if not name.startswith(("__", "_abc"))}
    assert own == {"forward", "_get_name", "extra_repr", "fused_by_lora_kernels"}
    assert FusedLoraLinear.__mro__[1] is Linear


def test_repr_is_that_of_peft_with_a_note() -> None:
    up = layer(mlp(), "up")
    stock = repr(up)
    lk.apply(up)
    lines = repr(up).splitlines()
    assert lines.pop(1).strip() == "forward fused by lora_kernels"
    assert "\n".join(lines) == stock


def _round_trip(model: nn.Module, how: str) -> nn.Module:
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_stay_fused(how: str, fused_calls: Calls) -> None:
    model, x = mlp(), torch.randn(3, 20)
    lk.apply(model)
    other = _round_trip(model, how)
    assert torch.equal(other(x), model(x))
    assert fused_calls.take() == 6
    assert lk.unapply(other) == 3
    assert _classes(model).count(FusedLoraLinear) == 3


def test_to_another_dtype(fused_calls: Calls) -> None:
    model = mlp()
    lk.apply(model)
    model.to(torch.bfloat16)
    assert model(torch.randn(3, 20).bfloat16()).dtype == torch.bfloat16
    assert fused_calls.take() == 3


def _files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_saved_adapter_is_byte_for_byte_what_peft_saves(tmp_path: Path) -> None:
    model = CASES["bert"].peft_model(lora_dropout=0.1).train()
    model.save_pretrained(tmp_path / "stock")
    lk.apply(model)
    model.save_pretrained(tmp_path / "fused")
    stock, fused = _files(tmp_path / "stock"), _files(tmp_path / "fused")
    assert "adapter_model.safetensors" in stock and "adapter_config.json" in stock
    assert stock == fused
    plain, taken = get_peft_model_state_dict(_unfused(model)), get_peft_model_state_dict(model)
    assert list(plain) == list(taken)
    assert all(torch.equal(plain[key], taken[key]) for key in plain)


def _unfused(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    lk.unapply(other)
    return other


def test_trained_adapter_loads_into_stock_peft(tmp_path: Path) -> None:
    model = mlp()
    lk.apply(model)
    x = torch.randn(3, 20)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(x).square().mean().backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Mlp(), tmp_path)
    assert type(layer(loaded, "up")) is Linear
    assert torch.equal(loaded(x), _unfused(model)(x))


def test_adapter_management(fused_calls: Calls) -> None:
    model, x = mlp(), torch.randn(3, 20)
    lk.apply(model)
    first = model(x)
    model.add_adapter(
        "other", lora_config(r=7, lora_alpha=21, target_modules=["up", "mid", "down"])
    )
    model.set_adapter("other")
    fused_calls.take()
    assert torch.equal(model(x), model(x)) and not torch.equal(model(x), first)
    assert fused_calls.take() == 9
    with model.disable_adapter():
        base = model(x)
    assert fused_calls.take() == 0
    assert torch.equal(base, _unfused(model).unload()(x))
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(model(x), first)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merge_and_unload(family: str, fused_calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS_DISABLE", "gated_activation")  # a block's activation stays
    case = CASES[family]
    model, inputs = case.peft_model(), case.inputs()
    expected = _unfused(model).merge_and_unload()
    # What unloading leaves fused: test_rms_norms.py, test_rotary_blocks.py.
    lk.apply(model, fused_norms=False, fused_rope=False)
    model.merge_adapter()
    merged = model(**inputs).logits
    assert fused_calls.take() == 0  # merged layers are their base layer
    model.unmerge_adapter()
    model(**inputs)
    assert fused_calls.take() == case.layers
    unloaded = model.merge_and_unload()
    assert FusedLoraLinear not in _classes(unloaded)
    assert _classes(unloaded) == _classes(expected)
    assert torch.equal(unloaded(**inputs).logits, expected(**inputs).logits)
    assert torch.equal(merged, expected(**inputs).logits)


def test_layers_added_later_need_another_apply() -> None:
    model = mlp(target_modules=["up"])
    lk.apply(model)
    model.add_adapter("wide", lora_config(target_modules=["mid"]))
    assert type(layer(model, "mid")) is Linear
    assert len(lk.apply(model).fused) == 2
    assert type(layer(model, "mid")) is FusedLoraLinear


def test_layer_shared_by_two_parents_is_one_layer() -> None:
    block = Mlp()
    model = get_peft_model(nn.ModuleList([block, block]), lora_config(target_modules=["up"]))
    assert len(lk.apply(model).layers) == 1


@pytest.mark.parametrize("value", ["apply", "lora_linear", "dora, apply"])
def test_disabled_by_the_environment(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    lk.apply(model)
    monkeypatch.setenv("LORA_KERNELS_DISABLE", value)
    report = lk.apply(model)
    assert FusedLoraLinear not in _classes(model)
    assert {e.reason for e in report.layers} == {"disabled by LORA_KERNELS_DISABLE"}


def test_strict_apply_raises_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _mixed()
    before = _classes(model)
    monkeypatch.setenv("LORA_KERNELS_STRICT", "1")
    with pytest.raises(StrictFallbackError, match=r"1 of 15 .*embed_tokens.*Embedding has no"):
        lk.apply(model)
    assert _classes(model) == before
    assert len(lk.apply(mlp()).fused) == 3


def test_unknown_and_unavailable_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    before = _classes(model)
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "cuda")
    with pytest.raises(BackendUnavailableError):
        lk.apply(model)
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "gpu")
    with pytest.raises(InvalidArgumentError):
        lk.apply(model)
    assert _classes(model) == before


def test_one_warning_per_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lora_kernels"):
        lk.apply(_mixed())
        lk.apply(_mixed())
    (record,) = caplog.records
    assert record.getMessage() == (
        "1 of 15 LoRA layers stay stock (base_model.model.model.embed_tokens): "
        "peft.tuners.lora.layer.Embedding has no fused path"
    )


def test_import_needs_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib
    import sys

    for name in [n for n in sys.modules if n.startswith("lora_kernels.integrations.peft")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"needs peft.*lora-kernels\[hf\]"):
        importlib.import_module("lora_kernels.integrations.peft")


def test_config_is_not_marked(tmp_path: Path) -> None:
    """An adapter saved from a fused model names no class of this package."""
    model = mlp()
    lk.apply(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "lora_kernels" not in json.dumps(config)
    assert LoraConfig.from_pretrained(tmp_path).r == 4
