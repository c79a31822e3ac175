"""LoRATrainer is transformers.Trainer with fused adapters and a clock around the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_bert import make_texts

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from lora_kernels.training import LoRATrainer  # noqa: E402
from lora_kernels.training.callbacks import WarmUp  # noqa: E402


def build(tiny_model: Path, folder: Path, kernels: bool = True) -> tuple[LoRATrainer, Any]:
    transformers.set_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    model = peft.get_peft_model(
        base, peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear")
    )
    data = [{**tokenizer(text), "labels": int(label == "sport")} for text, label in make_texts(12)]
    collator = transformers.DataCollatorWithPadding(tokenizer)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=8, use_cpu=True,
        report_to="none", disable_tqdm=True, logging_steps=1, save_strategy="no", seed=0,
        gradient_accumulation_steps=2, learning_rate=1e-2, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = LoRATrainer(
        model=model, args=arguments, train_dataset=data, data_collator=collator, kernels=kernels
    )
    return trainer, collator(data[:8])


def losses(trainer: LoRATrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_steps_are_timed_and_layers_fused(tiny_model: Path, tmp_path: Path) -> None:
    trainer, _ = build(tiny_model, tmp_path)
    assert isinstance(trainer, transformers.Trainer)
    assert trainer.kernel_report is not None
    statuses = {layer["status"] for layer in trainer.kernel_report.to_dict()["layers"]}
    assert statuses == {"fused"}
    assert trainer.step_seconds == []
    trainer.train()
    # One entry per optimizer step, not per batch of the accumulation.
    assert len(trainer.step_seconds) == 3 and min(trainer.step_seconds) > 0


def test_without_kernels_the_model_is_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    trainer, _ = build(tiny_model, tmp_path, kernels=False)
    assert trainer.kernel_report is None
    kinds = {type(m) for m in trainer.model.modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert kinds == {peft.tuners.lora.Linear}


def test_warm_up_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    plain, _ = build(tiny_model, tmp_path / "a")
    transformers.set_seed(0)
    plain.train()
    warmed, batch = build(tiny_model, tmp_path / "b")
    warmed.add_callback(WarmUp(batch, passes=3))
    warmed.train()
    assert losses(warmed) == losses(plain)
    for a, b in zip(plain.model.parameters(), warmed.model.parameters(), strict=True):
        assert torch.equal(a, b)
