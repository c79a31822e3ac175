"""apply(recompute_activations=True): the same numbers, the activation not kept, all undone."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, oracle, run
from test_families import assert_same
from torch import nn

import lora_kernels as lk
from lora_kernels.integrations.peft import mlp_blocks
from lora_kernels.modules import lora_mlp, mlp_function

WITH_ONE = ("llama", "qwen3", "gemma2", "phi3", "gpt2", "vit", "t5", "t5_gated")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the activation was computed, by the layers one by one or by a block as one node."""
    count, op, ops = [0], lora_mlp.gated_activation, mlp_function._ops

    def counted(*args: object, **kwargs: object) -> torch.Tensor:
        count[0] += 1
        return op(*args, **kwargs)

    class Counted:
        def __getattr__(self, name: str) -> object:
            count[0] += name == "gated_activation_fwd"
            return getattr(ops, name)

    monkeypatch.setattr(lora_mlp, "gated_activation", counted)
    monkeypatch.setattr(mlp_function, "_ops", Counted())
    monkeypatch.setattr(mlp_function, "activate", counted, raising=False)
    return count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", WITH_ONE)
def test_numbers_and_undoing(family: str, dtype: str, computed: list[int]) -> None:
    spec = FAMILIES[family]
    model, inputs = spec.peft_model(DTYPES[dtype]), spec.inputs()
    exact, low = oracle(model, inputs), run(model, inputs)
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    with lk.applied(model, recompute_activations=True) as report:
        entries = [g for g in report.groups if g["kind"] == mlp_blocks.RECOMPUTED]
        assert [e["status"] for e in entries] == ["fused", "fused"]
        assert "the activation is recomputed" in str(report)
        assert list(model.state_dict()) == keys
        assert_same(run(model, inputs), low, exact)
        assert computed == [4]  # forward and backward of two blocks
        copied = run(copy.deepcopy(model), inputs)
        assert all(torch.equal(t, copied[n]) for n, t in run(model, inputs).items())
        computed[0] = 0
        with torch.no_grad():
            model(**inputs)
        assert computed == [2]  # the same kernel without a backward, and so the same bits
    assert [type(m) for m in model.modules()] == classes
    lk.apply(model, recompute_activations=True)
    lk.unapply(model)
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    spec = FAMILIES["llama"]
    model, inputs = spec.peft_model(torch.float32), spec.inputs()
    lk.apply(model, recompute_activations=True)
    want = run(model, inputs)
    model.config.use_cache = False
    model.train()
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    got = run(model, inputs)
    assert all(torch.equal(t, got[n]) for n, t in want.items())


def test_hooks_of_members_run() -> None:
    spec = FAMILIES["llama"]
    model, inputs = spec.peft_model(torch.float32), spec.inputs()
    lk.apply(model, recompute_activations=True)
    mlp = model.get_submodule("base_model.model.model.layers.0.mlp")
    seen: list[str] = []
    for name in ("gate_proj", "up_proj", "down_proj", "act_fn"):
        mlp.get_submodule(name).register_forward_hook(lambda *_, n=name: seen.append(n))
    model(**inputs)
    assert sorted(seen) == ["act_fn", "down_proj", "gate_proj", "up_proj"]


def test_reasons() -> None:
    model = FAMILIES["llama"].peft_model(torch.float32)
    blocks = [m for m in model.modules() if type(m).__name__ == "LlamaMLP"]
    blocks[0].act_fn = nn.Mish()
    report = lk.apply(model, recompute_activations=True)
    entries = [g for g in report.groups if g["kind"] == mlp_blocks.RECOMPUTED]
    assert entries[0]["reason"] == "the activation is Mish" and entries[1]["status"] == "fused"
    few = FAMILIES["llama"]
    frozen = lk.replace_modules  # a model whose down_proj has no adapter
    plain = few.build()
    frozen(plain, targets=["gate_proj"])
    entries = [
        g for g in lk.apply(plain, recompute_activations=True).groups
        if g["kind"] == mlp_blocks.RECOMPUTED
    ]  # fmt: skip
    assert "down_proj has no adapter" in entries[0]["reason"]
