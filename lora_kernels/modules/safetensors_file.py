"""Reader and writer of the safetensors format; torch only, strict.

    8 bytes      length n of the header, unsigned, little endian
    n bytes      JSON object: name -> {"dtype", "shape", "data_offsets": [begin, end]}, and
                 optionally "__metadata__" -> {text: text}; padded with spaces
    the rest     the tensors, little endian, row major; offsets count from here, leave no gap
                 and no overlap and end where the file ends

Tensors are written in the order of the reference implementation (wider dtypes first, then by
name) with its header padding, so the same tensors give the same bytes.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from lora_kernels.errors import AdapterFileError, InvalidArgumentError

# Narrow to wide: the position is the rank by which files are ordered, last first.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {name: rank for rank, name in enumerate(DTYPES)}
MAX_HEADER = 100_000_000
_METADATA = "__metadata__"


def _reject(path: object, problem: str) -> NoReturn:
    raise AdapterFileError(f"{path}: not a usable safetensors file: {problem}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is defined twice")
        found[name] = value
    return found


def _read_header(file: BinaryIO, size: int, path: object) -> tuple[dict[str, Any], int]:
    """The parsed header and the offset of the data."""
    if size < 8:
        _reject(path, f"{size} bytes, shorter than the 8-byte header length")
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        _reject(path, f"the header claims {length} bytes; accepted: at most {MAX_HEADER}")
    if length > size - 8:
        _reject(path, f"truncated: the header claims {length} bytes, the file has {size - 8} left")
    raw = file.read(length)
    if raw[:1] != b"{":
        _reject(path, "the header does not start with '{'")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        _reject(path, f"the header is not valid JSON: {reason}")
    return header, 8 + length


def _read_metadata(value: object, path: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        _reject(path, f"{_METADATA} must map text to text")
    return value


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_entry(name: str, entry: object, path: object) -> tuple[int, int]:
    """(begin, end) of a well-formed entry."""
    if not isinstance(entry, dict):
        _reject(path, f"tensor {name!r} is described by {type(entry).__name__}, not an object")
    missing = [key for key in ("dtype", "shape", "data_offsets") if key not in entry]
    if missing:
        _reject(path, f"tensor {name!r} has no {missing[0]!r}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        _reject(path, f"tensor {name!r} has dtype {dtype!r}; accepted: {', '.join(DTYPES)}")
    if not _naturals(shape):
        _reject(path, f"tensor {name!r} has shape {shape!r}; accepted: a list of integers >= 0")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _reject(path, f"tensor {name!r} has data_offsets {offsets!r}; accepted: [begin, end]")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if needed != offsets[1] - offsets[0]:
        _reject(
            path,
            f"tensor {name!r} of {dtype} {shape} needs {needed} bytes, "
            f"its offsets give {offsets[1] - offsets[0]}",
        )
    return offsets[0], offsets[1]


def _check_layout(spans: Iterable[tuple[int, int, str]], data_size: int, path: object) -> None:
    """The spans follow one another from 0 to the end of the file."""
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            kind = "overlaps the one before it" if begin < position else "leaves a gap before it"
            _reject(path, f"tensor {name!r} at bytes {begin} to {end} {kind} (expected {position})")
        if end > data_size:
            _reject(path, f"truncated: tensor {name!r} ends at byte {end}, the data at {data_size}")
        position = end
    if position != data_size:
        _reject(path, f"{data_size - position} bytes after the last tensor")


def _read_tensor(file: BinaryIO, name: str, entry: dict[str, Any], path: object) -> Tensor:
    dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
    begin, end = entry["data_offsets"]
    try:
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        buffer = bytearray(end - begin)
        if file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
            _reject(path, f"truncated while reading tensor {name!r}")
        if dtype is torch.bool and max(buffer) > 1:
            _reject(path, f"tensor {name!r} is BOOL but holds a byte above 1")
        return torch.frombuffer(buffer, dtype=dtype).reshape(shape)
    except RuntimeError as error:
        _reject(path, f"tensor {name!r} of shape {shape} cannot be made: {error}".splitlines()[0])


def read_file(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file, on the CPU in memory of their own, and its metadata.

    The whole header is checked before any tensor is read.

    Raises:
        AdapterFileError: unreadable, truncated, malformed, or more than the header says.
    """
    _little_endian()
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, start = _read_header(file, size, path)
            metadata = _read_metadata(header.pop(_METADATA, {}), path)
            spans = [(*_check_entry(name, e, path), name) for name, e in header.items()]
            _check_layout(spans, size - start, path)
            # In file order, so that the reads are sequential and the position is always right.
            tensors = {
                name: _read_tensor(file, name, header[name], path) for _, _, name in sorted(spans)
            }
    except OSError as error:
        raise AdapterFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    return tensors, metadata


def write(
    file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors` (any device, any strides) and `metadata` to an open binary file.

    Raises:
        InvalidArgumentError: a name, dtype, layout or metadata entry that the format cannot hold;
            raised before the first byte is written.
    """
    _little_endian()
    metadata = dict(metadata or {})
    if not all(isinstance(t, str) for pair in metadata.items() for t in pair):
        raise InvalidArgumentError("metadata must map text to text")
    for name, tensor in tensors.items():
        _check_writable(name, tensor)
    names = sorted(tensors, key=lambda name: (-_RANK[_NAMES[tensors[name].dtype]], name))
    header: dict[str, Any] = {_METADATA: metadata} if metadata else {}
    position = 0
    for name in names:
        tensor = tensors[name]
        end = position + tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    try:
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(f"a name or metadata entry is not UTF-8 text: {error}") from None
    raw += b" " * (-len(raw) % 8)
    file.write(len(raw).to_bytes(8, "little") + raw)
    for name in names:
        _write_tensor(file, tensors[name])


def _check_writable(name: object, tensor: object) -> None:
    if not isinstance(name, str) or name == _METADATA:
        raise InvalidArgumentError(f"tensor name {name!r}; accepted: text other than {_METADATA!r}")
    if not isinstance(tensor, Tensor) or tensor.dtype not in _NAMES:
        what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise InvalidArgumentError(f"tensor {name!r} is {what}; accepted: {', '.join(DTYPES)}")
    if tensor.layout is not torch.strided or tensor.is_meta:
        kind = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}"
        raise InvalidArgumentError(f"tensor {name!r} is {kind}; accepted: dense tensors with data")


def _write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    if tensor.numel() == 0:
        return
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    nbytes = dense.numel() * dense.dtype.itemsize
    # A view of the memory through ctypes: numpy is optional for torch, and bytes() would copy.
    file.write((ctypes.c_char * nbytes).from_address(dense.data_ptr()))


def _little_endian() -> None:
    if sys.byteorder != "little":
        raise AdapterFileError("safetensors files need a little-endian machine; this one is not")
