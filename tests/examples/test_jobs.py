"""The short version of every job whose steps are data, prompts or configurations."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
TUNED = {
    "chinese_reviews": ["chinese_reviews"],
    "english_bible": ["english_bible"],
    "gpt2_two_texts": ["gpt2_news", "gpt2_bible"],
    "t5_translation": ["t5_old_testament", "t5_new_testament"],
    "summarisation": ["summarisation"],
    "question_answering": ["question_answering"],
    "dialogues": ["dialogues"],
}


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


jobs = load(ROOT / "examples" / "jobs.py")
BY_NAME = {job.name: job for job in jobs.JOBS}


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for package in ("transformers", "peft", *BY_NAME[name].packages):
        pytest.importorskip(package)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return jobs.run_job(BY_NAME[name], folder, short=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", TUNED)
def test_tuned(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("sacrebleu", "rouge_score", "torchmetrics"):
        pytest.importorskip(package)
    line = run(name, tmp_path, monkeypatch)
    for output in TUNED[name]:
        report = json.loads((tmp_path / "runs" / output / "report.json").read_text())
        assert f"-> {report['after']:.3f} ({report['method']}" in line
        assert report["steps"] > 0 and (tmp_path / "runs" / output / "loss.png").is_file()
        if report["method"] == "lora":
            assert report["fused_layers"] == report["total_layers"] > 0
        if name == "gpt2_two_texts":
            assert report["after"] < report["before"]
        if name == "english_bible":
            kept = [p for p in (tmp_path / "runs" / output / "checkpoints").iterdir() if p.is_dir()]
            assert len(kept) == 2
        if name == "chinese_reviews":
            assert {"accuracy", "f1", "auc_roc"} <= set(report["metrics"])
        if name == "t5_translation":
            assert {"bleu", "chrf"} <= set(report["metrics"])


@pytest.mark.slow
def test_few_shot_or_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = run("few_shot_or_tuning", tmp_path, monkeypatch)
    assert re.match(r"encoder, LoRA on 10 articles +[01]\.\d{3} +\d+ +\d+$", line)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_shapes", "whisper_tones"])
def test_other_modalities(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = re.findall(r"\d\.\d{3}", run(name, tmp_path, monkeypatch))
    assert all(0 <= float(n) <= 1 for n in numbers)
    if name == "vit_shapes":
        assert numbers[1] == numbers[2]  # merged or not


@pytest.mark.parametrize("job", jobs.JOBS, ids=lambda job: job.name)
def test_the_files_of_a_job_are_there(job: object) -> None:
    files = [step.what for step in job.steps if "." in step.what]
    assert files and all((ROOT / "examples" / f).is_file() for f in files)
    folder = ROOT / "examples" / job.name
    if folder.is_dir():
        text = (folder / "README.md").read_text()
        assert all(f"examples/{f}" in text for f in files) and len(text.splitlines()) <= 14


def test_no_example_is_missing() -> None:
    folders = {p.parent.name for p in (ROOT / "examples").glob("*/README.md")}
    assert folders <= set(BY_NAME)


@pytest.mark.parametrize("name", TUNED)
def test_configurations_can_be_read(name: str) -> None:
    pytest.importorskip("yaml")
    from lora_kernels.training.config_reader import read_config

    for step in BY_NAME[name].steps:
        if step.what.endswith(".yaml"):
            for overrides in ([], step.short):
                read_config(ROOT / "examples" / step.what, list(overrides))


def test_a_job_that_fails_says_so(tmp_path: Path) -> None:
    job = jobs.Job("broken", (), (jobs.Step("inspect", ("no-such-adapter",)),))
    with pytest.raises(jobs.JobError, match="inspect ended with 2"):
        jobs.run_job(job, tmp_path, short=True)


def test_questions_have_their_answers_in_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    prepare = load(ROOT / "examples" / "question_answering" / "prepare.py")
    text = 'It rained.\n"We shall play on Sunday," said Mr Green. He left.\nThe end.'
    (row,) = prepare.questions(7, text)
    assert row["question"] == "Who said: We shall play on Sunday?"
    (speaker,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
    assert speaker == "Mr Green" and row["context"][start:].startswith("Mr Green. He")
    assert not list(prepare.questions(8, '"We shall play on Sunday," said He.'))
