"""The adapter's README.md: PEFT's own is a form to fill in, this one is filled in."""

from __future__ import annotations

from typing import Any


def model_card(report: dict[str, Any]) -> str:
    """A model card with front matter, for the adapter's folder.

    Args:
        report: what ``report.json`` holds.
    """
    config = report["config"]
    lora, train = config["lora"], config["train"]
    return f"""\
---
library_name: peft
tags:
- lora
- transformers
- {report["task"]}
---

# LoRA adapter: {report["task"]} on {report["dataset"]}

Base model `{report["model"]}`, rank {lora["r"]}, alpha {lora["alpha"]}, targets
`{lora["targets"]}`.

| | |
|---|---|
| {report["metric"]} on {report["examples"]["test"]} held-out examples | {report["after"]:.3f} |
| before fine-tuning | {report["before"]:.3f} |
| training examples | {report["examples"]["train"]} |
| steps, batch, peak learning rate | {report["steps"]}, {train["batch_size"]}, \
{train["learning_rate"]:g} |
| precision, seed | {report["precision"]}, {config["seed"]} |
| lora_kernels, torch | {report["lora_kernels"]}, {report["torch"]} |

`peft.PeftModel.from_pretrained(base, folder)` loads it. `lora_kernels.json` holds the names of the
classes; with it `lora-kernels predict FOLDER "some text"` answers.
"""
