"""Readers, column guesses and splits on tiny files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from lora_kernels.errors import DataError
from lora_kernels.training.data import read_records
from lora_kernels.training.data.columns import LABEL_NAMES, TEXT_NAMES, find_column
from lora_kernels.training.data.records import Records
from lora_kernels.training.data.split import stratified_split


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_csv_with_quotes_newlines_and_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", '\ufefftext,label\n"one, two\nthree",x\n"say ""hi""",y\n')
    records = read_records(path)
    assert records.columns == ("text", "label")
    assert records.rows == [
        {"text": "one, two\nthree", "label": "x"},
        {"text": 'say "hi"', "label": "y"},
    ]


def test_csv_field_longer_than_the_default_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", f"text,label\n{'w ' * 200_000},x\n")
    assert len(read_records(path).rows[0]["text"]) == 400_000


def test_tsv(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "label\ttext\nx\tone, two\n")
    assert read_records(path).rows == [{"label": "x", "text": "one, two"}]


def test_short_csv_row_has_empty_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\nalone\n")
    assert read_records(path).rows == [{"text": "alone", "label": ""}]


def test_jsonl_turns_numbers_into_text(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", '{"text": "é", "stars": 5}\n\n{"stars": null, "text": "b"}\n'
    )
    assert read_records(path).rows == [{"text": "é", "stars": "5"}, {"text": "b", "stars": ""}]


def test_class_folders(tmp_path: Path) -> None:
    for label, name, content in (
        ("b", "1.txt", b"x"),
        ("a", "2.txt", b"\xff y"),
        (".h", "3.txt", b"z"),
    ):
        (tmp_path / label).mkdir(exist_ok=True)
        write(tmp_path / label / name, content)
    write(tmp_path / "a" / "notes.md", "not an example")
    assert read_records(tmp_path).rows == [
        {"text": "\ufffd y", "label": "a"},
        {"text": "x", "label": "b"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "fragment"),
    [
        ("a.csv", "", "empty"),
        ("a.csv", "text,label\n", "no examples"),
        ("a.csv", "text,label\na,b,c\n", "line 2"),
        ("a.jsonl", '{"text": "a"}\nnot json\n', "line 2"),
        ("a.jsonl", "[1]\n", "line 1"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', "'label'"),
        ("a.jsonl", "\n\n", "no examples"),
        ("a.parquet", "PAR1", ".parquet"),
        ("plain", "text", "without a suffix"),
    ],
)
def test_bad_files_say_where_and_what(
    tmp_path: Path, name: str, content: str, fragment: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        read_records(path)
    message = str(caught.value)
    assert str(path) in message and fragment in message and "\n" not in message


def test_absent_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_records(tmp_path / "none.csv")
    with pytest.raises(DataError, match=r"no \.txt files"):
        read_records(tmp_path)


def records_of(*columns: str) -> Records:
    return Records([dict.fromkeys(columns, "v")], columns, "file.csv")


@pytest.mark.parametrize(
    ("columns", "text", "label"),
    [
        (("id", "Text", "Label"), "Text", "Label"),
        (("title", "text", "class"), "text", "class"),
        (("review", "sentiment"), "review", "sentiment"),
        (("message", "whatever"), "message", "whatever"),
    ],
)
def test_columns_are_guessed(columns: tuple[str, ...], text: str, label: str) -> None:
    records = records_of(*columns)
    assert find_column(records, "data.text", None, TEXT_NAMES) == text
    assert find_column(records, "data.label", None, LABEL_NAMES, taken=text) == label


def test_column_that_cannot_be_guessed_or_is_not_there() -> None:
    with pytest.raises(DataError, match=r"set data.text to one of 'a', 'b'"):
        find_column(records_of("a", "b"), "data.text", None, TEXT_NAMES)
    with pytest.raises(DataError, match=r"data.label='c'; accepted: 'a', 'b'"):
        find_column(records_of("a", "b"), "data.label", "c", LABEL_NAMES)


def test_split_is_stratified_disjoint_and_complete() -> None:
    labels = ["a"] * 100 + ["b"] * 40 + ["c"] * 3 + ["d"]
    parts = stratified_split(labels, 0.1, 0.2, seed=3)
    assert sorted(i for part in parts for i in part) == list(range(len(labels)))
    train, validation, test = (Counter(labels[i] for i in part) for part in parts)
    assert (train["a"], validation["a"], test["a"]) == (70, 10, 20)
    assert (train["b"], validation["b"], test["b"]) == (28, 4, 8)
    assert (train["c"], validation["c"], test["c"]) == (1, 1, 1)
    assert train["d"] == 1


def test_split_depends_on_the_seed_alone() -> None:
    labels = ["a", "b"] * 30
    assert stratified_split(labels, 0.1, 0.2, 1) == stratified_split(labels, 0.1, 0.2, 1)
    assert stratified_split(labels, 0.1, 0.2, 1) != stratified_split(labels, 0.1, 0.2, 2)


def test_another_class_leaves_the_split_of_the_others() -> None:
    few = ["a", "b"] * 30
    more = [*few, *(["c"] * 20)]
    test_few = stratified_split(few, 0.1, 0.2, 1)[2]
    test_more = stratified_split(more, 0.1, 0.2, 1)[2]
    assert [i for i in test_more if i < len(few)] == test_few


def test_limit_thins_every_class() -> None:
    labels = ["a"] * 100 + ["b"] * 50
    parts = stratified_split(labels, 0.1, 0.2, 0, limit=30)
    assert Counter(labels[i] for part in parts for i in part) == {"a": 20, "b": 10}
