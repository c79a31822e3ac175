"""`lora-kernels train` in children that get a signal at a chosen moment; one child per scenario.

    python signalled_runs.py FOLDER

Writes FOLDER/result.json: {scenario: {"code", "error", "left", "entries", "again", "equal"}}:
exit code, stderr, checkpoints and entries beside the output, then those of resume=auto.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

STEPS = 12


def at_call(holder, name, number, which):
    """Makes the `number`-th call of holder.name send a signal to this process before it works."""
    original, calls = getattr(holder, name), [0]

    def called(*args, **kwargs):
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), which)
        return original(*args, **kwargs)

    setattr(holder, name, called)


def reading(which):
    from lora_kernels.training.tasks import classification

    at_call(classification, "read_splits", 1, which)


def tokenizing(which):
    from lora_kernels.training.tasks.classification import Classification

    at_call(Classification, "dataset", 1, which)


def evaluating(number):
    def plant(which):
        from lora_kernels.training.trainer import LoRATrainer

        at_call(LoRATrainer, "evaluate", number, which)

    return plant


# Evaluations: of the test, of the validation data after steps 4, 8 and 12, of the test.
SCENARIOS = {
    "reading": reading,
    "tokenizing": tokenizing,
    "evaluating before": evaluating(1),
    "evaluating between": evaluating(2),
    "evaluating after": evaluating(5),
}


def child(config, overrides, plant, which):
    """Exit code and what it wrote on stderr."""
    reading_end, writing_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(writing_end, 2)
        from lora_kernels.cli import main

        if plant is not None:
            plant(which)
        code = main(["train", "--quiet", str(config), *overrides])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    os.close(writing_end)
    with os.fdopen(reading_end, errors="replace") as stream:
        error = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), error


def main(folder):
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import lora_kernels.training.one_run  # noqa: F401

    torch.set_num_threads(1)
    result = {}
    steps = ["train.eval_steps=4", "train.save_steps=4", f"train.max_steps={STEPS}"]
    assert child(folder / "c.yaml", [f"output={folder / 'whole'}", *steps], None, None)[0] == 0
    weights = "adapter/adapter_model.safetensors"
    want = (folder / "whole" / weights).read_bytes()
    for name, plant in SCENARIOS.items():
        for which in (signal.SIGTERM, signal.SIGINT):
            output = folder / f"{name} {which.name}"
            output.mkdir()
            overrides = [f"output={output / 'run'}", *steps]
            code, error = child(folder / "c.yaml", overrides, plant, which)
            left = sorted(p.name for p in output.rglob("checkpoint-*"))
            entries = [p.name for p in output.iterdir()]
            again = child(folder / "c.yaml", [*overrides, "resume=auto"], None, None)[0]
            result[output.name] = {
                "code": code, "error": error, "left": left, "entries": entries, "again": again,
                "equal": again == 0 and (output / "run" / weights).read_bytes() == want,
            }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
