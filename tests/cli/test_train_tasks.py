"""train and predict from the command line for tasks other than classification, and exit codes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from lora_kernels.cli import main

yaml = pytest.importorskip("yaml")
pytest.importorskip("peft")
pytest.importorskip("transformers")

import tiny_models as tiny  # noqa: E402  (the folder is on the path by this folder's conftest)


def trained(task: str, folder: Path, *words: str) -> Path:
    """The output of a run of one step."""
    writers = {"question-answering": tiny.write_bert, "token-classification": tiny.write_bert,
               "masked-lm": tiny.write_bert}  # fmt: skip
    chat = task == "chat"
    model = folder / "model"
    if task in writers:
        writers[task](model)
    else:
        tiny.write_llama(model, chat=chat)
    raw = tiny.task_config(task, model, tiny.write_data(task, folder), folder / "run", max_steps=1)
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    assert main(["train", "--quiet", str(folder / "config.yaml"), *words]) == 0
    return folder / "run"


def test_questions_need_a_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained("question-answering", tmp_path)
    assert '"some text" --context "a text"' in capsys.readouterr().out
    text = tmp_path / "text.txt"
    text.write_text("anna likes rome today .")
    for context in (text.read_text(), f"@{text}"):
        assert main(["predict", str(run), "where is anna ?", "--context", context, "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["answer"] in text.read_text() and answer["text"] == "where is anna ?"
    assert main(["predict", str(run), "where is anna ?"]) == 2
    assert "--context" in capsys.readouterr().err
    for wrong, fragment in (("@nowhere.txt", "cannot be read"), (" ", "is empty")):
        assert main(["predict", str(run), "where ?", "--context", wrong]) == 2
        assert fragment in capsys.readouterr().err


def test_words_are_labelled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained("token-classification", tmp_path)
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("anna likes rome .\nbert leaves oslo .\n"))
    assert main(["predict", str(run), "-", "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [a["words"][0] for a in answers] == ["anna", "bert"]
    assert {tag for a in answers for tag in a["labels"]} <= {"O", "B-PER", "B-LOC"}
    assert main(["predict", str(run), "anna likes rome", "--context", "x"]) == 2
    assert "question-answering" in capsys.readouterr().err


def test_conversations_are_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained("chat", tmp_path, "method=freeze", "freeze.layers=1")
    out = capsys.readouterr().out
    assert "perplexity" in out and "after, freeze" in out
    assert main(["predict", str(run), "anna likes rome . where is anna ?"]) == 0


def test_gaps_need_a_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained("masked-lm", tmp_path)
    capsys.readouterr()
    assert main(["predict", str(run), "anna [MASK] rome"]) == 0
    assert len(capsys.readouterr().out.split(",")) == 5
    assert main(["predict", str(run), "anna rome"]) == 2
    assert "[MASK]" in capsys.readouterr().err


def test_notes_show_what_was_guessed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained("masked-lm", tmp_path)
    assert "guessed" not in capsys.readouterr().err
    assert main(["train", str(tmp_path / "config.yaml")]) == 0
    notes = capsys.readouterr().err
    assert "documents guessed: lines (data.documents=line)" in notes


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    from lora_kernels.training.config_table import rows

    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert [row.key for row in rows() if f"\n  {row.key}\n" not in text] == []
    assert "Exit codes: 0 done; 2" in text
