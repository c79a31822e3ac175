"""``report.md``: the numbers of ``report.json`` to read."""

from __future__ import annotations

from typing import Any

from lora_kernels.training.result import SPEEDS, run_name

_FEW = 30
_SAMPLES = 5
_ASK = {
    "classification": 'lora-kernels predict RUN_FOLDER "a text"',
    "causal-lm": 'lora-kernels generate RUN_FOLDER "the beginning of a text"',
    "question-answering": 'lora-kernels predict RUN_FOLDER "a question" --context @text.txt',
}


def markdown(report: dict[str, Any]) -> str:
    """``report.md``."""
    name = run_name(report)
    rows = [
        f"| before fine-tuning | {report['before']:.3f} | | |",
        _row(name, report["after"], report["seconds"], report["step_seconds"]),
    ]
    if report["after_stock"] is not None:
        rows.append(
            _row("stock PEFT", report["after_stock"], report["seconds_stock"],
                 report["step_seconds_stock"])
        )  # fmt: skip
    examples = ", ".join(f"{n} {name}" for name, n in report["examples"].items())
    parts = [
        f"# {report['task'].capitalize()}: {report['dataset']}",
        f"Model `{report['model']}`, method {report['method']} ({_share(report)}), "
        f"{report['precision']}, {report['steps']} steps of "
        f"{report['config']['train']['batch_size']} examples, seed {report['config']['seed']}. "
        f"Examples: {examples}.",
        f"| | {report['metric']} (test) | seconds | ms per step |\n|---|---|---|---|\n"
        + "\n".join(rows),
    ]
    if report["speedup"] is not None:
        parts.append(f"Speed-up of the median step: **{report['speedup']:.2f}x**.")
    parts += [*_ending(report), _metrics(report), "![training and validation loss](loss.png)"]
    if report["curves"]:
        parts.append("![metrics of each validation](metrics.png)")
    if report["confusion"] is not None:
        parts.append("![confusion matrix](confusion.png)")
    parts += _samples(report)
    parts += [
        "## Speed and memory",
        _speed(report),
        "## How it was measured",
        _method(report),
    ]
    parts += _layers(report)
    parts += [
        "## Files\n\n"
        f"- `adapter/`: {_saved(report['method'])}\n"
        "- `report.json`: every number of this page, the curves, the whole configuration\n"
        "- `log.jsonl`: every log entry of the training\n"
        "- `*.png`: the pictures above",
        f"```\n{_ASK.get(report['task'], _ASK['classification'])}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _row(name: str, metric: float, seconds: float, step: float) -> str:
    return f"| {name} | {metric:.3f} | {seconds:.1f} | {1000 * step:.1f} |"


def _method(report: dict[str, Any]) -> str:
    text = (
        f"lora_kernels {report['lora_kernels']}, torch {report['torch']}, Python "
        f"{report['python']}, {report['device']}, CPU threads: {report['threads']}. Seconds are "
        "the sum over all optimizer steps of forward, backward and update; loading data, "
        "evaluating and saving are not in them. Before the clock starts, two training passes "
        "whose gradients are discarded create threads, library primitives and packed copies of "
        "frozen weights; then the seed is set again."
    )
    if report["speedup"] is not None:
        text += (
            " The stock run has the same seed, data order, precision, threads and untimed passes. "
            "It lives in a second process, and the two take turns step by step: one of them "
            "computes while the other sleeps, so both see the same machine. The speed-up is the "
            "ratio of the median steps."
        )
    return text


def _layers(report: dict[str, Any]) -> list[str]:
    if not report["layers"]:
        return []
    text = f"## Layers\n\n{report['fused_layers']} of {report['total_layers']} adapters are fused."
    text += "\n\n| adapters | backend | why not fused |\n|---|---|---|\n"
    text += "\n".join(
        f"| {e['layers']} | {e['backend'] or '-'} | {e['reason'] or '-'} |"
        for e in report["kernels_used"]
    )
    stock = [layer for layer in report["layers"] if layer["status"] != "fused"]
    if stock:
        text += "\n\n| layer | why not fused |\n|---|---|\n"
        text += "\n".join(f"| `{e['name']}` | {e['reason']} |" for e in stock[:_FEW])
        if len(stock) > _FEW:
            text += f"\n\n{len(stock) - _FEW} more are in `report.json`."
    return [text]


def _share(report: dict[str, Any]) -> str:
    share = 100.0 * report["trained_parameters"] / max(1, report["parameters"])
    return f"{report['trained_parameters']:,} of {report['parameters']:,} parameters, {share:.3g} %"


def _ending(report: dict[str, Any]) -> list[str]:
    lines = []
    if report["stopped_early"]:
        lines.append("Stopped early: validation no longer improved.")
    if report["best_step"] is not None:
        lines.append(f"The adapter is that of step {report['best_step']}, the best in validation.")
    return [" ".join(lines)] if lines else []


def _metrics(report: dict[str, Any]) -> str:
    before, after = report["metrics_before"] or {}, report["metrics"]
    rows = [
        f"| {name} | {_number(before.get(name))} | {_number(after[name])} |"
        for name in after
        if name not in SPEEDS
    ]
    return "## Test\n\n| | before | after |\n|---|---|---|\n" + "\n".join(rows)


def _number(value: float | None) -> str:
    if value is not None and value >= 1000:
        return f"{value:,.0f}"
    return "-" if value is None else f"{value:.4g}"


def _samples(report: dict[str, Any]) -> list[str]:
    samples = (report["samples"] or [])[:_SAMPLES]
    if not samples:
        return []
    names = list(samples[0])
    head = f"| {' | '.join(names)} |\n|{'---|' * len(names)}\n"
    rows = [f"| {' | '.join(_cell(sample[name]) for name in names)} |" for sample in samples]
    return ["## Samples of the test", head + "\n".join(rows)]


def _cell(value: Any) -> str:
    text = " ".join(str(value).split()).replace("|", "\\|")
    return text if len(text) <= 200 else text[:197] + "..."


def _speed(report: dict[str, Any]) -> str:
    parts = [f"{report['steps_timed']} steps timed"]
    if report["tokens_per_second"] is not None:
        parts.append(f"{report['tokens_per_second']:,.0f} tokens and "
                     f"{report['examples_per_second']:,.1f} examples per second")  # fmt: skip
    memory = report["peak_memory"]
    if memory.get("bytes"):
        parts.append(f"peak {memory['bytes'] / 2**20:,.0f} MiB ({memory['what']})")
    return "; ".join(parts) + "."


def _saved(method: str) -> str:
    if method == "full":
        return "the whole model in transformers' format; `from_pretrained` loads it"
    if method in ("freeze", "bitfit"):
        return "the parameters that trained, under the base model's names (`trained.safetensors`)"
    return "PEFT's format with the trained head; `PeftModel.from_pretrained` loads it"
