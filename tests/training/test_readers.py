"""The other kinds of data files: parquet, saved datasets, texts, JSON, packed files; splits."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import task_config, write_bert, write_jsonl

from lora_kernels.errors import DataError
from lora_kernels.training.config_reader import read_config
from lora_kernels.training.data import ReadOptions, read_records
from lora_kernels.training.data.columns import (
    SOURCE_NAMES,
    TAG_NAMES,
    TARGET_NAMES,
    TOKEN_NAMES,
    find_column,
    guesses,
)
from lora_kernels.training.data.records import Records
from lora_kernels.training.data.split import grouped_split
from lora_kernels.training.tasks import task_class
from lora_kernels.training.tasks.language_rows import cut_text

pytest.importorskip("yaml")


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("auto", ["one\ntwo", "three"]),
        ("block", ["one\ntwo", "three"]),
        ("line", ["one", "two", "three"]),
        ("file", ["one\ntwo\n \nthree"]),
    ],
)
def test_documents_of_a_text(tmp_path: Path, documents: str, expected: list[str]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n \nthree\n")
    records = read_records(path, ReadOptions(documents=documents))
    assert [row["text"] for row in records.rows] == expected
    assert any("guessed" in note for note in records.notes) == (documents == "auto")


def test_text_without_blank_lines_is_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n")
    assert [r["text"] for r in read_records(tmp_path / "a.txt").rows] == ["one", "two"]


def test_packed_files(tmp_path: Path) -> None:
    for name, content in (("a.csv.gz", "text,label\nx,y\n"), ("a.tsv.gz", "text\tlabel\nx\ty\n"),
                          ("a.jsonl.gz", '{"text": "x", "label": "y"}')):  # fmt: skip
        (tmp_path / name).write_bytes(gzip.compress(content.encode()))
        assert read_records(tmp_path / name).rows == [{"text": "x", "label": "y"}]
    (tmp_path / "bad.csv.gz").write_bytes(b"text,label\nx,y\n")
    with pytest.raises(DataError, match="damaged"):
        read_records(tmp_path / "bad.csv.gz")


def test_json_lists_and_squad(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "x", "label": 1}, {"label": 2, "text": "z"}]')
    assert read_records(tmp_path / "a.json").rows[1] == {"text": "z", "label": "2"}
    answers = [{"text": "c", "answer_start": 4}]
    squad = {"version": "2.0", "data": [{"title": "t", "paragraphs": [{"context": "a b c", "qas": [
        {"id": "1", "question": "q?", "answers": answers},
        {"id": "2", "question": "r?", "is_impossible": True, "answers": []},
    ]}]}]}  # fmt: skip
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    rows = read_records(tmp_path / "squad.json").rows
    assert rows[0]["answers"] == {"text": ["c"], "answer_start": [4]}
    assert rows[1]["answers"] == {"text": [], "answer_start": []} and rows[1]["context"] == "a b c"
    (tmp_path / "odd.json").write_text('{"rows": 3}')
    with pytest.raises(DataError, match="a dict; accepted"):
        read_records(tmp_path / "odd.json")


def test_lists_and_objects_of_a_row_stay_as_they_are(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"tokens": ["a", "b"], "n": 1.5, "ok": True}])
    assert read_records(path).rows == [{"tokens": ["a", "b"], "n": "1.5", "ok": "true"}]


def test_unicode_line_separators_stay_inside_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\u2028b"}\n', encoding="utf-8")
    assert read_records(tmp_path / "a.jsonl").rows == [{"text": "a\u2028b"}]


def test_parquet_with_nulls_and_names_of_classes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "ner_tags": datasets.List(datasets.ClassLabel(names=["O", "B-PER"])),
            "label": datasets.ClassLabel(names=["bad", "good"]),
            "text": datasets.Value("string"),
        }
    )
    rows = {"tokens": [["a", "b"], ["c"]], "ner_tags": [[0, 1], [1]], "label": [1, None],
            "text": ["x", None]}  # fmt: skip
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(str(tmp_path / "a.parquet"))
    found = read_records(tmp_path / "a.parquet")
    expected = [
        {"tokens": ["a", "b"], "ner_tags": ["O", "B-PER"], "label": "good", "text": "x"},
        {"tokens": ["c"], "ner_tags": ["B-PER"], "label": "", "text": ""},
    ]
    assert found.rows == expected
    table.save_to_disk(str(tmp_path / "saved"))
    assert read_records(tmp_path / "saved").rows == expected


def test_parquet_of_other_programs(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("datasets")
    from pyarrow import parquet

    table = pyarrow.table({"text": ["x", "y"], "label": [0.5, float("nan")]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read_records(tmp_path / "a.parquet").rows == [
        {"text": "x", "label": "0.5"}, {"text": "y", "label": "nan"},
    ]  # fmt: skip


def test_splits_of_a_saved_dictionary_are_used(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    part = {"text": ["a", "b"] * 6, "label": ["x", "y"] * 6}
    datasets.DatasetDict(
        train=datasets.Dataset.from_dict(part),
        test=datasets.Dataset.from_dict({k: v[:4] for k, v in part.items()}),
    ).save_to_disk(str(tmp_path / "saved"))
    config = read_config({"model": "m", "output": "o", "data": {"path": str(tmp_path / "saved")}})
    task = task_class("classification").from_config(config)
    assert task.sizes["test"] == 4 and task.sizes["train"] + task.sizes["validation"] == 12


def records_of(*columns: str) -> Records:
    return Records([dict.fromkeys(columns, "v")], columns, "file.csv")


@pytest.mark.parametrize(
    ("columns", "source", "target"),
    [
        (("id", "article", "highlights"), "article", "highlights"),
        (("input", "output"), "input", "output"),
        (("en", "de"), "en", "de"),
        (("Source", "Target", "notes"), "Source", "Target"),
        (("document", "summary"), "document", "summary"),
    ],
)
def test_seq2seq_columns_are_guessed(
    tmp_path: Path, columns: tuple[str, ...], source: str, target: str
) -> None:
    pytest.importorskip("sacrebleu")
    rows = [{c: f"{c} {i}" for c in columns} for i in range(20)]
    data = write_jsonl(tmp_path / "a.jsonl", rows)
    config = read_config(
        {"task": "seq2seq", "model": "m", "output": "o", "data": {"path": str(data)}}
    )
    task = task_class("seq2seq").from_config(config)
    assert f"source={source!r}, target={target!r}" in " ".join(task.notes)
    assert task.splits["train"][0][0].startswith(source)


def test_translations_in_one_column(tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu")
    rows = [{"translation": {"en": f"word {i}", "de": f"Wort {i}"}} for i in range(20)]
    data = write_jsonl(tmp_path / "a.jsonl", rows)
    config = read_config(
        {"task": "seq2seq", "model": "m", "output": "o", "data": {"path": str(data)}}
    )
    pair = task_class("seq2seq").from_config(config).splits["train"][0]
    assert pair[0].startswith("word") and pair[1].startswith("Wort")


def test_word_columns_are_guessed() -> None:
    records = records_of("id", "tokens", "pos_tags", "ner_tags")
    assert find_column(records, "data.tags", None, TAG_NAMES) == "ner_tags"
    assert find_column(records, "data.tokens", None, TOKEN_NAMES, taken="ner_tags") == "tokens"
    assert find_column(records_of("text", "label"), "k", None, TARGET_NAMES) == "label"
    assert find_column(records_of("text", "summary"), "k", None, SOURCE_NAMES) == "text"


def test_only_guesses_are_shown() -> None:
    assert guesses({"a": None, "b": "x"}, {"a": "y", "b": "x"}) == "columns guessed: a='y'"
    assert guesses({"a": "y"}, {"a": "y"}) == ""


@pytest.mark.parametrize(
    ("rows", "style", "fragment"),
    [
        ([{"instruction": "i", "input": "x", "output": "o"}], "chat", "input='input'"),
        ([{"prompt": "p", "completion": "c"}], "chat", "response='completion'"),
        ([{"question": "q", "answer": "a", "id": "1"}], "chat", "prompt='question'"),
        ([{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
         "chat", "messages='conversations'"),
        ([{"text": "t", "source": "web"}], "text", "text='text'"),
    ],
)  # fmt: skip
def test_kinds_of_language_data(tmp_path: Path, rows: list[Any], style: str, fragment: str) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", [{**row} for row in rows * 9])
    config = read_config(
        {"task": "causal-lm", "model": "m", "output": "o", "data": {"path": str(data)}}
    )
    task: Any = task_class("causal-lm").from_config(config)
    assert task.style == style and fragment in " ".join(task.notes)


def test_groups_stay_together() -> None:
    groups = [str(i % 10) for i in range(50)]
    parts = grouped_split(groups, 0.2, 0.3, seed=1)
    assert sorted(i for part in parts for i in part) == list(range(50))
    found = [{groups[i] for i in part} for part in parts]
    assert [len(g) for g in found] == [5, 2, 3]
    assert not (found[0] & found[1] or found[0] & found[2] or found[1] & found[2])
    assert parts == grouped_split(groups, 0.2, 0.3, seed=1) != grouped_split(groups, 0.2, 0.3, 2)
    limited = grouped_split(groups, 0.0, 0.5, seed=1, limit=20)
    assert sum(map(len, limited)) == 20


def test_questions_about_one_text_stay_together(tmp_path: Path) -> None:
    rows = [
        {"question": f"q{i}", "context": f"text {i % 5}", "answers": ["text"]} for i in range(40)
    ]
    config = read_config(
        task_config("question-answering", tmp_path, write_jsonl(tmp_path / "a.jsonl", rows),
                    tmp_path / "run")
    )  # fmt: skip
    splits = task_class("question-answering").from_config(config).splits
    texts = [{q.context for q in part} for part in splits.values()]
    assert all(not (a & b) for i, a in enumerate(texts) for b in texts[i + 1 :])


def test_one_text_is_cut_at_its_lines() -> None:
    text = "\n".join(f"line {i}" for i in range(10, 20))
    parts = cut_text(text, 0.1, 0.2)
    assert "\n".join(parts) == text
    assert [part.count("line") for part in parts] == [7, 1, 2]
    assert cut_text("a b c d", 0.0, 0.25) == ["a b c", "", "d"]


def test_answers_are_looked_for_where_their_place_is_wrong(tmp_path: Path) -> None:
    rows = [
        {"question": "q", "context": f"{i} rome", "answers": {"text": [t], "answer_start": [s]}}
        for i, (t, s) in enumerate([("rome", 2), ("rome", 0), ("oslo", 2)] * 4)
    ]
    config = read_config(
        task_config("question-answering", tmp_path, write_jsonl(tmp_path / "a.jsonl", rows),
                    tmp_path / "run")
    )  # fmt: skip
    task = task_class("question-answering").from_config(config)
    found = [q for part in task.splits.values() for q in part]
    assert len(found) == 8
    assert all(q.context[a.start :].startswith(a.text) for q in found for a in q.answers)
    assert "4 whose answer is not in the text left out" in " ".join(task.notes)


def test_longer_texts_are_cut_and_counted(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from lora_kernels.training.tasks.classification import Classification

    tokenizer = transformers.AutoTokenizer.from_pretrained(write_bert(tmp_path))
    task = Classification(
        max_length=4, labels=["a", "b"],
        splits={"train": [("anna likes rome .", "a"), ("anna", "b")]},
    )  # fmt: skip
    assert max(len(row["input_ids"]) for row in task.dataset("train", tokenizer)) == 4
    assert task.notes == ["train: 1 of 2 texts cut to 4 tokens"]
