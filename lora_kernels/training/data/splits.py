"""From the configuration's files to train, validation and test examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from lora_kernels.errors import DataError
from lora_kernels.training.config import Config
from lora_kernels.training.data import ReadOptions, Records, read_records
from lora_kernels.training.data.arrow_tables import other_splits
from lora_kernels.training.data.split import Split
from lora_kernels.training.references import data_path

E = TypeVar("E")
NAMES = ("train", "validation", "test")


def read_options(config: Config) -> ReadOptions:
    data = config.data
    return ReadOptions(data.encoding, data.bad_bytes, data.documents)


def read_splits(
    config: Config,
    read: Callable[[Records, list[str]], list[E]],
    divide: Callable[[Sequence[E], float, float], Split],
    notes: list[str],
) -> dict[str, list[E]]:
    """Examples per split; what has no file of its own is split off ``data.path``.

    Args:
        read: rows to examples; appends to the notes.
        divide: indices of train, validation and test, given the two shares.
        notes: lines for the user, appended to.

    Raises:
        DataError: a file cannot be read, or nothing is left for training or the test.
    """
    data = config.data
    given = {"validation": data.validation, "test": data.test}
    whole_path = data_path("data.path", data.path)
    beside = other_splits(whole_path) if whole_path.is_dir() else set()

    def load(key: str, path: Path, split: str) -> list[E]:
        records = read_records(path, read_options(config), split)
        notes.extend(records.notes)
        examples = read(records, notes)
        if not examples:
            raise DataError(f"{records.source}: no examples in it can be used ({key})")
        return examples

    whole = load("data.path", whole_path, "train")
    separate = {
        name: load(f"data.{name}", data_path(f"data.{name}", reference), name)
        for name, reference in given.items()
        if reference is not None
    }
    for name in sorted(beside - set(separate)):
        separate[name] = load("data.path", whole_path, name)
    indices = divide(
        whole,
        0.0 if "validation" in separate else data.validation_fraction,
        0.0 if "test" in separate else data.test_fraction,
    )
    splits = {
        name: separate.get(name, [whole[i] for i in part])
        for name, part in zip(NAMES, indices, strict=True)
    }
    if not splits["train"]:
        raise DataError(f"{data.path}: no examples are left to train on; give more")
    if not splits["test"]:
        raise DataError(
            f"{data.path}: no examples are left for the test; give data.test, "
            "data.test_fraction or more examples"
        )
    return splits
