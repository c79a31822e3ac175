"""Parquet files and folders that datasets.save_to_disk wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_kernels.errors import DataError
from lora_kernels.training.data.records import ReadOptions, Records, as_value

_SPLITS = "dataset_dict.json"


def read(path: Path, options: ReadOptions, split: str = "train") -> Records:
    """Rows of the table; numbers of classes become their names where the file has them.

    Raises:
        DataError: the file is damaged.
    """
    import datasets
    import pyarrow

    try:
        if path.is_dir():
            loaded = datasets.load_from_disk(str(path))
            if isinstance(loaded, datasets.DatasetDict):
                if split not in loaded:
                    raise DataError(f"{path}: no split {split!r}; it has {', '.join(loaded)}")
                loaded = loaded[split]
            features, rows = loaded.features, loaded.to_list()
        else:
            from pyarrow import parquet

            table = parquet.read_table(path)
            features, rows = _features(table.schema), table.to_pylist()
    except (pyarrow.ArrowException, ValueError, FileNotFoundError) as e:
        if isinstance(e, DataError):
            raise
        raise DataError(f"{path} cannot be read: {' '.join(str(e).split())}") from None
    columns = tuple(features)
    return Records(
        [{c: as_value(_named(row[c], features[c])) for c in columns} for row in rows],
        columns,
        str(path),
    )


def other_splits(path: Path) -> set[str]:
    """``validation`` and ``test``, as far as a saved dictionary of datasets has them."""
    if not (path / _SPLITS).is_file():
        return set()
    return {name for name in ("validation", "test") if (path / name).is_dir()}


def _features(schema: Any) -> Any:
    import datasets

    try:
        return datasets.Features.from_arrow_schema(schema)
    except (ValueError, TypeError, KeyError, NotImplementedError):
        # Types that datasets does not model; the values are readable all the same.
        return dict.fromkeys(schema.names)


def _named(value: Any, feature: Any) -> Any:
    """Class numbers as class names, in lists too."""
    if isinstance(value, list):
        inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else None)
        return [_named(item, inner) for item in value]
    names = getattr(feature, "names", None)
    if names and isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    return value
