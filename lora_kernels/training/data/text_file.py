"""Bytes to text, by the encoding that the user names and no other."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from lora_kernels.errors import ConfigError, DataError
from lora_kernels.training.data.records import ReadOptions

_BYTE_ORDER_MARKS = ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


def read_text(path: Path, options: ReadOptions, one_of_many: bool = False) -> tuple[str, int]:
    """(text, number of bytes or byte groups that were replaced); ``.gz`` files are unpacked.

    Args:
        one_of_many: the file is a text in a folder of texts, where ``bad_bytes=auto`` replaces.

    Raises:
        DataError: bytes that the encoding does not have, at their place.
        ConfigError: no such encoding.
    """
    data = _bytes(path)
    encoding = "utf-8-sig" if options.encoding.lower() in ("utf-8", "utf8") else options.encoding
    replace = options.bad_bytes == "replace" or (options.bad_bytes == "auto" and one_of_many)
    try:
        return data.decode(encoding), 0
    except LookupError:
        raise ConfigError(
            f"data.encoding={options.encoding!r} is not known; accepted: utf-8, latin-1, cp1252, "
            "gb18030, utf-16, ..."
        ) from None
    except UnicodeError as e:
        if replace:
            text = data.decode(encoding, errors="replace")
            return text, text.count("\ufffd")
        raise DataError(_message(path, data, options.encoding, e)) from None


def _bytes(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix.lower() != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"{path} is damaged: {e}") from None


def _message(path: Path, data: bytes, encoding: str, error: UnicodeError) -> str:
    where = ""
    if isinstance(error, UnicodeDecodeError):
        line = data.count(b"\n", 0, error.start) + 1
        where = f", line {line}: byte 0x{data[error.start]:02x}"
    likely = next((name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), "latin-1")
    return (
        f"{path}{where} is not {encoding}; give the file's encoding (data.encoding={likely}, ...) "
        "or data.bad_bytes=replace"
    )
