"""Mistakes that people make: one clear line, exit code 2, nothing written."""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import (
    task_config,
    write_bert,
    write_data,
    write_jsonl,
    write_llama,
    write_t5,
)

yaml = pytest.importorskip("yaml")
pytest.importorskip("peft")
pytest.importorskip("sacrebleu")

from lora_kernels.cli import main  # noqa: E402


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    bert = write_bert(folder / "bert")
    llama = write_llama(folder / "llama", chat=True)
    return {
        "classification": bert, "masked-lm": bert, "question-answering": bert,
        "token-classification": bert, "causal-lm": llama, "chat": llama,
        "seq2seq": write_t5(folder / "t5"),
    }  # fmt: skip


@pytest.fixture
def refused(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs `lora-kernels train` on a task; the message, after the checks that hold for all."""

    def run(task: str, data: Path, *overrides: str) -> str:
        home = tmp_path / "home"
        home.mkdir()
        config = home / "config.yaml"
        raw = task_config(task, models[task], data, home / "runs" / "one", max_steps=1)
        config.write_text(yaml.safe_dump(raw))
        before = {p: p.stat().st_mtime_ns for p in home.rglob("*")}
        assert main(["train", "--quiet", str(config), *overrides]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and "Traceback" not in printed.err
        last = printed.err.strip().splitlines()[-1]
        assert last.startswith("lora-kernels: error: ") and len(last) < 600
        assert {p: p.stat().st_mtime_ns for p in home.rglob("*")} == before, "something was written"
        return last

    return run


def file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


GOOD = "text,label\n" + "\n".join(f"anna likes rome,{'ab'[i % 2]}" for i in range(20))

LATIN = GOOD.replace("rome", "r\u00f4me").encode("latin-1")


@pytest.mark.parametrize(
    ("name", "content", "fragments"),
    [
        ("a.csv", "", ("empty",)),
        ("a.jsonl", "", ("no examples",)),
        ("a.json", "", ("not JSON",)),
        ("a.parquet", "", ("cannot be read",)),
        ("a.csv", "text,label\n", ("no examples",)),
        ("a.csv", "one,two\na,b\n", ("data.text", "'one', 'two'")),
        ("a.csv", "text,text\na,b\n", ("'text' is there twice",)),
        ("a.csv", GOOD.replace(",b", ",a"), ("only the class 'a'",)),
        ("a.csv", GOOD.replace(",b", ",NaN"), ("row 2", "label is NaN")),
        ("a.jsonl", '{"text": "x", "label": NaN}\n', ("row 1", "label is nan")),
        (
            "a.csv",
            GOOD.replace("rome", "r\u00f4me").encode("latin-1"),
            ("line 2", "0xf4", "latin-1"),
        ),
        ("a.csv", GOOD.encode("utf-16"), ("utf-16",)),
        ("a.csv", "text,label\n,a\n ,b\n", ("every row has an empty",)),
        ("a.xlsx", "PK", (".xlsx", ".csv")),
        ("a.jsonl", '{"text": ["x"], "label": "a"}\n', ("row 1", "a list")),
    ],
)
def test_classification_data(
    refused: Any, tmp_path: Path, name: str, content: Any, fragments: tuple[str, ...]
) -> None:
    message = refused("classification", file(tmp_path, name, content))
    assert all(f in message for f in fragments), message


def test_the_encoding_can_be_given(tmp_path: Path) -> None:
    from lora_kernels.training.data import ReadOptions, read_records

    path = file(tmp_path, "a.csv", LATIN)
    rows = read_records(path, ReadOptions(encoding="latin-1")).rows
    assert rows[0]["text"] == "anna likes r\u00f4me"
    replaced = read_records(path, ReadOptions(bad_bytes="replace"))
    assert "\ufffd" in replaced.rows[0]["text"] and "20 undecodable" in replaced.notes[0]


@pytest.mark.parametrize(
    ("task", "rows", "fragments"),
    [
        ("seq2seq", [{"a": "x", "b": "y", "c": "z"}], ("data.source", "'a', 'b', 'c'")),
        ("seq2seq", [{"source": "", "target": "x"}], ("no examples in it can be used",)),
        ("question-answering", [{"question": "q", "context": "c"}], ("data.answers",)),
        (
            "question-answering",
            [{"question": "q", "context": "c", "answers": "absent"}] * 2,
            ("no examples in it can be used",),
        ),
        (
            "question-answering",
            [{"question": "q", "context": f"c{i}", "answers": []} for i in range(9)],
            ("no question has an answer",),
        ),
        (
            "token-classification",
            [{"tokens": ["a", "b"], "ner_tags": ["O"]}],
            ("row 1", "2 words", "1 labels"),
        ),
        (
            "token-classification",
            [{"tokens": [f"a{i}"], "ner_tags": ["O"]} for i in range(9)],
            ("only the label 'O'",),
        ),
        ("causal-lm", [{"messages": [{"role": "user", "content": "x"}]}], ("nothing to learn",)),
        ("causal-lm", [{"messages": [{"who": "x"}]}], ("row 1", "role and content")),
        ("causal-lm", [{"x": "1", "y": "2"}], ("data.text",)),
        ("causal-lm", [{"text": "only one"}], ("no examples are left",)),
        ("masked-lm", [{"messages": [{"role": "user", "content": "x"},
                                     {"role": "assistant", "content": "y"}]}],
         ("holds conversations",)),
    ],
)  # fmt: skip
def test_data_of_other_tasks(
    refused: Any, tmp_path: Path, task: str, rows: list[Any], fragments: tuple[str, ...]
) -> None:
    overrides = ["data.documents=block"] if rows == [{"text": "only one"}] else []
    message = refused(task, write_jsonl(tmp_path / "d.jsonl", rows), *overrides)
    assert all(f in message for f in fragments), message


@pytest.mark.parametrize(
    ("task", "overrides", "fragments"),
    [
        ("classification", ["data.max_length=65"], ("accepted: 2 to 64",)),
        ("causal-lm", ["data.max_length=100"], ("accepted: 2 to 64",)),
        ("classification", ["data.max_length=4", "data.too_long=refuse"],
         ("more than 4 tokens", "data.too_long=cut")),
        ("causal-lm", ["data.max_length=4", "data.too_long=refuse"], ("more than 4 tokens",)),
        ("seq2seq", ["data.max_target_length=2", "data.too_long=refuse"], ("targets", "2 tokens")),
        ("question-answering", ["data.max_length=12", "data.stride=4"], ("no room",)),
        ("question-answering", ["data.stride=12"], ("data.stride=12", "less than half")),
        ("chat", ["data.max_length=6"], ("no answer begins within",)),
        ("chat", ["data.packing=stream"], ("data.packing=stream", "conversation")),
        ("masked-lm", ["model={llama}"], ("AutoModelForMaskedLM", "llama")),
        ("classification", ["lora.targets=[nope]"], ("'nope'", "query")),
        ("classification", ["lora.r=64"], ("lora.r=64", "at most 32")),
        ("classification", ["device=cuda"], ("device='cuda'", "accepted here: auto, cpu")),
        ("classification", ["train.learnig_rate=1"], ("did you mean 'train.learning_rate'",)),
        ("classification", ["metric=bleu"], ("metric='bleu'", "accuracy", "auc_roc")),
        ("classification", ["data.question=q"], ("data.question", "question-answering")),
        ("classification", ["trackers=tensorbord"], ("'tensorbord'", "tensorboard")),
        ("classification", ["trackers=wandb"], ("package wandb", "not installed")),
        ("classification", ["train.keep_best=true", "data.validation_fraction=0"],
         ("need validation data",)),
        ("classification", ["train.save_total_limit=2"], ("needs checkpoints",)),
        ("classification", ["train.keep_best=true", "train.eval_steps=2", "train.save_steps=3"],
         ("multiple",)),
        ("classification", ["train.eval_steps=2", "data.validation_fraction=0"],
         ("train.eval_steps=2", "validation data")),
        ("classification", ["compare_stock=true", "train.early_stopping=2"], ("same steps",)),
        ("classification", ["attention=flash_attention_2"], ("cannot be loaded",)),
        ("causal-lm", ["data.documents=file", "data.limit=5"], ("data.limit=5", "is one")),
        ("classification", ["model=/nowhere/model"], ("model='/nowhere/model'", "no such folder")),
        ("classification", ["model=runs/never/adapter"], ("no such folder",)),
        ("classification", ["output=/proc/run"], ("/proc", "writ")),
        ("classification", ["resume=/nonexistent/checkpoint-3"], ("no such folder",)),
        ("classification", ["data.encoding=utf-9"], ("data.encoding='utf-9'",)),
        ("question-answering", ["train.label_smoothing=0.1"], ("label_smoothing",)),
        ("classification", ["output={file}/run"], ("not a writable folder",)),
        ("seq2seq", ["train.learning_rate=1e30", "train.max_steps=20", "train.max_grad_norm=0",
                     "train.lr_warmup=0"], ("diverged",)),
    ],
)  # fmt: skip
def test_configurations(
    refused: Any, models: dict[str, Path], tmp_path: Path, task: str, overrides: list[str],
    fragments: tuple[str, ...],
) -> None:  # fmt: skip
    if "trackers=wandb" in overrides and importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    places = {"llama": models["causal-lm"], "file": file(tmp_path, "a file", "x")}
    given = [o.format(**places) if "{" in o else o for o in overrides]
    message = refused(task, write_data(task, tmp_path), *given)
    assert all(f in message for f in fragments), message


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_read_only_output(refused: Any, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    try:
        data = write_data("classification", tmp_path)
        assert "writ" in refused("classification", data, f"output={locked / 'run'}")
    finally:
        locked.chmod(0o755)


def test_full_disk_is_told_before_training(
    refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1024))
    message = refused("classification", write_data("classification", tmp_path))
    assert "free some room" in message


def test_model_that_is_none(refused: Any, tmp_path: Path) -> None:
    data = write_data("classification", tmp_path)
    (tmp_path / "empty").mkdir()
    message = refused("classification", data, f"model={tmp_path / 'empty'}")
    assert str(tmp_path / "empty") in message and "loaded" in message


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="it is installed")
def test_deepspeed_that_is_not_installed(
    refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    message = refused("classification", write_data("classification", tmp_path))
    assert "deepspeed is not installed" in message and "--use_fsdp" in message


def test_texts_of_one_token_are_told(refused: Any, tmp_path: Path, models: dict[str, Path]) -> None:
    """Nothing follows them: the rows of packed documents are none."""
    bare = shutil.copytree(models["causal-lm"], tmp_path / "no end mark")
    for path in (bare / "tokenizer_config.json", bare / "special_tokens_map.json"):
        if path.is_file():
            raw = json.loads(path.read_text())
            raw.pop("eos_token", None)
            path.write_text(json.dumps(raw))
    data = write_jsonl(tmp_path / "words.jsonl", [{"text": "anna"}] * 20)
    message = refused("causal-lm", data, f"model={bare}", "data.packing=documents")
    assert "no example is left" in message
