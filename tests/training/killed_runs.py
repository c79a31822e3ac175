"""Trainings of a tiny model that are killed at chosen moments and resumed; one process per run.

    python killed_runs.py FOLDER SCENARIO ...

Imports once and forks: each run is a child of its own, so a SIGKILL is a real one and costs no
second import. Writes FOLDER/result.json: {scenario: {"died", "resumed_from", "equal", ...}}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

ROWS, STEPS = 20, 14


def build(dropout=0.25):
    """A PEFT model with dropout in the base and in the adapter."""
    import peft
    import transformers

    torch.manual_seed(3)
    shape = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, hidden_dropout_prob=0.1, num_labels=2,
    )  # fmt: skip
    base = transformers.BertForSequenceClassification(shape)
    lora = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear"
    )
    return peft.get_peft_model(base, lora)


def rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": torch.randint(0, 50, (9,), generator=generator),
            "labels": torch.randint(0, 2, (), generator=generator),
        }
        for _ in range(count)
    ]


def make_trainer(folder, **options):
    import transformers

    from lora_kernels.training import LoRATrainer

    transformers.set_seed(11)
    arguments = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "lr_scheduler_type": "cosine",
        "warmup_steps": 3, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1,
        "eval_strategy": "epoch", "logging_steps": 1, "report_to": "none", "disable_tqdm": True,
        "use_cpu": True, "seed": 11,
    } | options  # fmt: skip
    trainer = LoRATrainer(
        model=build(),
        args=transformers.TrainingArguments(**arguments),
        train_dataset=rows(ROWS, 1),
        eval_dataset=rows(5, 2),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


class Kill:
    """Ends this process with a real SIGKILL at the n-th call of a function."""

    def __init__(self, function, at):
        self.function, self.left = function, at

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.function(*args, **kwargs)


def kill_at_forward(at):
    return lambda trainer: setattr(trainer, "compute_loss", Kill(trainer.compute_loss, at))


def kill_at_write(at):
    """Within a checkpoint: torch.save writes optimizer, scheduler and random states in turn."""

    def plant(trainer):
        torch.save = Kill(torch.save, at)

    return plant


def kill_at_seal(at):
    def plant(trainer):
        from lora_kernels.training import checkpointed_trainer

        checkpointed_trainer.seal = Kill(checkpointed_trainer.seal, at)

    return plant


def kill_at_rotation(at):
    def plant(trainer):
        from lora_kernels.training import checkpoints

        checkpoints.shutil.rmtree = Kill(checkpoints.shutil.rmtree, at)

    return plant


def send(which, at):
    """A signal to this very process while the n-th batch is computed."""

    def plant(trainer):
        original, left = trainer.compute_loss, [at]

        def compute_loss(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), which)
            return original(*args, **kwargs)

        trainer.compute_loss = compute_loss

    return plant


SCENARIOS = {
    "mid-epoch": kill_at_forward(12),
    "mid-accumulation": kill_at_forward(19),
    "after-epoch": kill_at_forward(16),
    "while-saving-optimizer": kill_at_write(7),
    "while-saving-random-states": kill_at_write(12),
    "before-sealing": kill_at_seal(4),
    "while-rotating": kill_at_rotation(2),
    "sigterm": send(signal.SIGTERM, 17),
    "sigterm-at-epoch-end": send(signal.SIGTERM, 14),
    "ctrl-c": send(signal.SIGINT, 9),
    # The control: what a resumed run is without the states of the random generators.
    "control": kill_at_forward(19),
}


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def run(folder, plant=None, resume=False, save_to=None):
    """In a child: trains, maybe dies. Exit code 75 where a signal stopped it in order."""
    from lora_kernels.errors import TrainingInterruptedError
    from lora_kernels.training.interruption import StopOnSignal

    trainer = make_trainer(folder)
    stop = StopOnSignal()
    trainer.add_callback(stop)
    if plant is not None:
        plant(trainer)
    with stop.listening():
        trainer.train(resume_from_checkpoint=resume)
    try:
        stop.check(folder, trainer.state)
    except TrainingInterruptedError as error:
        (folder / "message").write_text(str(error))
        return 75
    if save_to is not None:
        evaluations = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
        torch.save({"weights": weights(trainer), "evaluations": evaluations}, save_to)
    return 0


def child(*args, **kwargs):
    """Runs `run` in a fork; its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = run(*args, **kwargs)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(folder, names):
    import peft  # noqa: F401
    import transformers  # noqa: F401

    import lora_kernels.training.trainer  # noqa: F401
    from lora_kernels.training.checkpoints import checkpoints, flaw, last_complete, seal

    torch.set_num_threads(1)
    assert child(folder / "whole", save_to=folder / "whole.pt") == 0
    want = torch.load(folder / "whole.pt")
    result = {}
    for name in names:
        place = folder / name
        place.mkdir()
        died = child(place, plant=SCENARIOS[name])
        unfinished = [p.name for p in checkpoints(place) if flaw(p)]
        resumed = last_complete(place)
        message = place / "message"
        if name == "control":
            (resumed / "rng_state.pth").unlink()
            seal(resumed)
        ended = child(place, resume=True, save_to=folder / f"{name}.pt")
        got = torch.load(folder / f"{name}.pt") if ended == 0 else {"weights": {}}
        result[name] = {
            "died": died,
            "ended": ended,
            "resumed_from": resumed.name if resumed else None,
            "unfinished": unfinished,
            "message": message.read_text() if message.exists() else "",
            "equal": got["weights"].keys() == want["weights"].keys()
            and all(torch.equal(t, want["weights"][n]) for n, t in got["weights"].items()),
            "same_evaluations": got.get("evaluations") == want["evaluations"],
            "left": [p.name for p in checkpoints(place)],
        }
    moved = [n for n, t in want["weights"].items() if t.any()]
    result["trained"] = len(moved)
    (folder / "result.json").write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(SCENARIOS))
