"""transformers' families on fused blocks and our attention: logits and every adapter gradient."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, oracle, run, use_our_attention
from torch import Tensor

import lora_kernels as lk
from lora_kernels.testing import BudgetExceededError, assert_within_budget

GRADIENT_FACTOR = 3.0  # FlashAttention's own rule for gradients through attention
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def assert_same(got: dict[str, Tensor], low: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    assert got.keys() == low.keys() == exact.keys()
    dtype = low["logits"].dtype
    for name, value in got.items():
        assert value.dtype == low[name].dtype, name
        factor = 2.0 if name == "logits" else GRADIENT_FACTOR
        assert_within_budget(value, exact[name], low[name].to(dtype), name, factor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_eager_against_ours(family: str, dtype: str) -> None:
    spec = FAMILIES[family]
    model, inputs = spec.peft_model(DTYPES[dtype]), spec.inputs()
    exact, low = oracle(model, inputs), run(model, inputs)
    assert any("lora_A" in name for name in low)
    use_our_attention(model)
    report = lk.apply(model)
    assert not report.stock
    assert [g["reason"] for g in report.groups] == [""] * len(report.groups)
    assert [len(g["members"]) for g in report.groups if len(g["members"]) > 1] == spec.groups
    assert_same(run(model, inputs), low, exact)


@pytest.mark.parametrize("wrong", ["mask", "adapter", "scale"])
def test_a_planted_fault_is_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = FAMILIES["llama"]
    model, inputs = spec.peft_model(torch.bfloat16), spec.inputs()
    exact, low = oracle(model, inputs), run(model, inputs)
    use_our_attention(model)
    lk.apply(model)
    if wrong == "mask":
        from transformers import AttentionMaskInterface

        monkeypatch.delitem(AttentionMaskInterface._global_mapping, "lora_kernels")
    with torch.no_grad():
        for name, module in model.named_modules():
            if wrong == "adapter" and name.endswith("layers.1.self_attn.v_proj"):
                module.lora_B["default"].weight.zero_()
            if wrong == "scale" and name.endswith("layers.0.self_attn"):
                module.scaling *= 1.5
    with pytest.raises(BudgetExceededError):
        assert_same(run(model, inputs), low, exact)


@pytest.mark.parametrize("family", ["llama", "bert", "t5_gated", "whisper"])
def test_state_dict_and_undoing(family: str) -> None:
    spec = FAMILIES[family]
    model, inputs = spec.peft_model(torch.float32), spec.inputs()
    before, classes = run(model, inputs), [type(m) for m in model.modules()]
    keys = list(model.state_dict())
    lk.apply(model)
    assert list(model.state_dict()) == keys
    lk.unapply(model)
    assert [type(m) for m in model.modules()] == classes
    after = run(model, inputs)
    assert all(torch.equal(after[name], t) for name, t in before.items())
