"""The adapter's README.md: PEFT's own is a form to fill in, this one is filled in."""

from __future__ import annotations

from typing import Any

from lora_kernels.training.result import SPEEDS

_PIPELINES = {
    "classification": "text-classification",
    "causal-lm": "text-generation",
    "masked-lm": "fill-mask",
    "seq2seq": "text2text-generation",
    "question-answering": "question-answering",
    "token-classification": "token-classification",
}
_ADAPTERS = ("lora", "dora", "qlora")


def model_card(report: dict[str, Any]) -> str:
    """A model card for the adapter's folder; its front matter has the keys that PEFT writes.

    Args:
        report: what ``report.json`` holds.
    """
    return "\n".join([*_front_matter(report), "", *_page(report), ""])


def _front_matter(report: dict[str, Any]) -> list[str]:
    adapter = report["method"] in _ADAPTERS
    base = report["model"]
    tags = [f"base_model:adapter:{base}", "lora"] if adapter else [report["method"]]
    return [
        "---",
        f"base_model: {_quoted(base)}",
        f"library_name: {'peft' if adapter else 'transformers'}",
        f"pipeline_tag: {_PIPELINES[report['task']]}",
        "tags:",
        *(f"- {_quoted(tag)}" for tag in (*tags, "transformers", "lora-kernels", report["task"])),
        "---",
    ]


def _page(report: dict[str, Any]) -> list[str]:
    config = report["config"]
    lora, train = config["lora"], config["train"]
    lines = [f"# {report['task'].capitalize()}: {report['dataset']}", ""]
    if report["method"] in _ADAPTERS:
        lines += [
            f"Base model `{report['model']}`, method {report['method']}, rank {lora['r']}, alpha "
            f"{lora['alpha']}, targets `{lora['targets']}`.",
        ]
    else:
        lines += [f"Base model `{report['model']}`, method {report['method']}."]
    lines += ["", "| | before | after |", "|---|---|---|"]
    before = report["metrics_before"] or {}
    for name, value in report["metrics"].items():
        if name not in SPEEDS:
            lines.append(f"| {name}, test | {_number(before.get(name))} | {_number(value)} |")
    examples = report["examples"]
    rows = {
        "data": f"`{report['dataset']}`",
        "examples (training, validation, test)": ", ".join(str(n) for n in examples.values()),
        "steps, batch, peak learning rate": f"{report['steps']}, {train['batch_size']}, "
        f"{train['learning_rate']:g}",
        "trained parameters": f"{report['trained_parameters']:,} of {report['parameters']:,}",
        "precision, seed": f"{report['precision']}, {config['seed']}",
        "device": report["device"],
        "lora_kernels, torch": f"{report['lora_kernels']}, {report['torch']}",
    }
    lines += ["", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    lines += ["", _use(report["method"])]
    return lines


def _use(method: str) -> str:
    if method in _ADAPTERS:
        how = "`peft.PeftModel.from_pretrained(base, folder)` loads it."
    elif method == "full":
        how = "`from_pretrained(folder)` of the task's model class loads it."
    else:
        how = "`trained.safetensors` holds the parameters that trained, by the base model's names."
    return (
        f"{how} `lora_kernels.json` holds what a prediction needs besides; with it\n"
        '`lora-kernels predict FOLDER "some text"` answers.'
    )


def _quoted(text: str) -> str:
    """As YAML: names of models may hold colons."""
    return f'"{text}"' if any(c in text for c in ":#{}[]&*!|>%@`") else text


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
