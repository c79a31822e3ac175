"""Our reader and writer of safetensors against the reference package, and on broken files."""

from __future__ import annotations

import io
import json
import random

import pytest
import torch

from lora_kernels.errors import AdapterFileError, InvalidArgumentError
from lora_kernels.modules import safetensors_file
from lora_kernels.modules.safetensors_file import DTYPES, read_file, write

package = pytest.importorskip("safetensors.torch")


def random_bits(dtype, *shape):
    count = 1
    for n in shape:
        count *= n
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, dtype=torch.uint8).view(torch.bool)
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def bits(t):
    return t.contiguous().reshape(-1).view(torch.uint8)


def encode(tensors, metadata=None):
    file = io.BytesIO()
    write(file, tensors, metadata)
    return file.getvalue()


def header(entries, data=b"", raw=None):
    text = raw if raw is not None else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="U8", shape=(1,), span=(0, 1)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


@pytest.fixture
def read(tmp_path):
    def _read(data):
        path = tmp_path / "file.safetensors"
        path.write_bytes(data)
        return read_file(path)

    return _read


@pytest.fixture
def everything():
    torch.manual_seed(0)
    tensors = {f"t.{name.lower()}": random_bits(d, 3, 5) for name, d in DTYPES.items()}
    return tensors | {
        'é "quoted"\n\x01': random_bits(torch.float32, 2),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4, dtype=torch.bfloat16),
    }


def test_same_bytes_as_the_package(everything):
    assert encode(everything, {"format": "pt"}) == package.save(everything, {"format": "pt"})
    assert encode({}) == package.save({})


def test_every_dtype_survives(everything, read):
    tensors, metadata = read(encode(everything, {"format": "pt", "more": "ünï"}))
    assert metadata == {"format": "pt", "more": "ünï"}
    assert tensors.keys() == everything.keys()
    for name, want in everything.items():
        assert tensors[name].dtype == want.dtype and tensors[name].shape == want.shape
        assert torch.equal(bits(tensors[name]), bits(want)), name


def test_reads_what_the_package_writes(everything, read):
    tensors, _ = read(package.save(everything))
    for name, want in everything.items():
        assert torch.equal(bits(tensors[name]), bits(want)), name


def test_strided_shared_and_conjugate_tensors_are_written_by_value(read):
    base = torch.arange(24.0).reshape(4, 6)
    complex_ = torch.randn(3, dtype=torch.complex64)
    given = {"t": base.t(), "rows": base[::2], "expanded": base[:1].expand(3, 6), "all": base,
             "conj": complex_.conj(), "grad": base.clone().requires_grad_()}  # fmt: skip
    tensors, _ = read(encode(given))
    for name, want in given.items():
        assert torch.equal(tensors[name], want), name


def test_tensors_own_their_memory(read, tmp_path):
    tensors, _ = read(encode({"a": torch.zeros(8), "b": torch.zeros(8)}))
    tensors["a"].add_(1)
    assert tensors["b"].eq(0).all()
    assert read_file(tmp_path / "file.safetensors")[0]["a"].eq(0).all()


def test_unaligned_data_is_read(read):
    data = bytes([7]) + torch.tensor([1.5, -2.0]).numpy().tobytes()
    entries = {"b": entry("U8", (1,), (0, 1)), "f": entry("F32", (2,), (1, 9))}
    tensors, _ = read(header(entries, data))
    assert tensors["b"].tolist() == [7] and tensors["f"].tolist() == [1.5, -2.0]


def test_truncation_at_every_byte_is_refused(read):
    torch.manual_seed(0)
    data = encode({"a.w": torch.randn(2, 3), "b": torch.randn(5).bfloat16()}, {"format": "pt"})
    for size in range(len(data)):
        with pytest.raises(AdapterFileError, match=r"file\.safetensors"):
            read(data[:size])
    with pytest.raises(AdapterFileError, match="1 bytes after the last tensor"):
        read(data + b"\0")


BROKEN = {
    "no opening brace": (header({}, raw=b' {"a":1}'), "does not start"),
    "array": (header({}, raw=b"[]"), "does not start"),
    "empty header": (header({}, raw=b""), "does not start"),
    "not JSON": (header({}, raw=b'{"a":'), "not valid JSON"),
    "not UTF-8": (header({}, raw=b'{"\xff":1}'), "not valid JSON"),
    "nested too deeply": (header({}, raw=b'{"a":' + b"[" * 200_000), "not valid JSON"),
    "integer too long": (header({}, raw=b'{"a":' + b"9" * 20_000 + b"}"), "not valid JSON"),
    "huge header": ((1 << 62).to_bytes(8, "little") + b"{}", "claims 4611686018427387904"),
    "header above the limit": ((10**8 + 1).to_bytes(8, "little") + b"{}", "at most 100000000"),
    "header past the end": ((64).to_bytes(8, "little") + b"{}", "truncated"),
    "duplicate tensor": (
        header({}, b"\0", raw=b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2)),
        "'a' is defined twice",
    ),
    "duplicate field": (
        header({}, b"\0", raw=b'{"a":{"dtype":"U8","dtype":"U8","shape":[],"data_offsets":[0,1]}}'),
        "'dtype' is defined twice",
    ),
    "entry is a list": (header({"a": []}), "not an object"),
    "no dtype": (header({"a": {"shape": [1], "data_offsets": [0, 1]}}, b"\0"), "no 'dtype'"),
    "no shape": (header({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, b"\0"), "no 'shape'"),
    "no offsets": (header({"a": {"dtype": "U8", "shape": [1]}}, b"\0"), "no 'data_offsets'"),
    "unknown dtype": (header({"a": entry("F128")}, b"\0"), "dtype 'F128'"),
    "dtype not text": (header({"a": entry(["U8"])}, b"\0"), "dtype"),
    "shape not a list": (header({"a": {**entry(), "shape": 1}}, b"\0"), "shape 1"),
    "negative dimension": (header({"a": entry(shape=(-1,))}, b"\0"), "shape"),
    "fractional dimension": (header({"a": entry(shape=(1.0,))}, b"\0"), "shape"),
    "boolean dimension": (header({"a": entry(shape=(True,))}, b"\0"), "shape"),
    "dimension past 64 bits": (header({"a": entry(shape=(2**63,))}, b"\0"), "shape"),
    "product past 64 bits": (header({"a": entry(shape=(2**62, 2**62))}, b"\0"), "needs"),
    "empty but overflowing": (header({"a": entry(shape=(0, 2**62, 2**62), span=(0, 0))}), "a'"),
    "shape against offsets": (header({"a": entry(shape=(2,))}, b"\0"), "needs 2 bytes"),
    "one offset": (header({"a": entry(span=(0,))}, b"\0"), "data_offsets"),
    "offsets reversed": (header({"a": entry(span=(1, 0))}, b"\0"), "data_offsets"),
    "offset negative": (header({"a": entry(span=(-1, 0))}, b"\0"), "data_offsets"),
    "offset past the end": (header({"a": entry(shape=(9,), span=(0, 9))}, b"\0"), "truncated"),
    "gap at the start": (header({"a": entry(span=(1, 2))}, b"\0\0"), "gap"),
    "gap": (header({"a": entry(), "b": entry(span=(2, 3))}, b"\0\0\0"), "gap"),
    "overlap": (header({"a": entry(shape=(2,), span=(0, 2)), "b": entry(span=(1, 2))}, b"\0\0"),
                "overlaps"),
    "same bytes twice": (header({"a": entry(), "b": entry()}, b"\0"), "overlaps"),
    "bytes left over": (header({"a": entry()}, b"\0\0"), "1 bytes after"),
    "data without tensors": (header({}, b"\0"), "1 bytes after"),
    "metadata not an object": (header({"__metadata__": []}), "__metadata__"),
    "metadata not text": (header({"__metadata__": {"n": 1}}), "__metadata__"),
    "boolean that is 2": (header({"a": entry("BOOL")}, b"\2"), "BOOL"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_is_refused_with_its_name_and_problem(case, read):
    data, problem = BROKEN[case]
    with pytest.raises(AdapterFileError, match=problem) as caught:
        read(data)
    assert "file.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_random_corruption_reads_or_refuses_and_never_takes_what_the_package_refuses(read):
    rng = random.Random(0)
    torch.manual_seed(0)
    good = encode({"a.w": torch.randn(2, 3), "b": torch.randn(4)}, {"format": "pt"})
    header_end = 8 + int.from_bytes(good[:8], "little")
    refused = 0
    for _ in range(1500):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 4))):
            position = rng.randrange(header_end)
            if rng.random() < 0.3:
                data[position] = rng.randrange(256)
            else:
                data[position] = rng.choice(b'{}[]",:0123456789 ')
        try:
            ours = read(bytes(data))[0]
        except AdapterFileError:
            refused += 1
            continue
        theirs = package.load(bytes(data))
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(bits(ours[name]), bits(theirs[name]))
    assert refused > 500


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(AdapterFileError, match="absent"):
        read_file(tmp_path / "absent")
    with pytest.raises(AdapterFileError, match="directory"):
        read_file(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "metadata", "problem"),
    [
        ({"__metadata__": torch.zeros(1)}, None, "tensor name"),
        ({3: torch.zeros(1)}, None, "tensor name"),
        ({"a": [1.0]}, None, "is list"),
        ({"a": torch.zeros(1, dtype=torch.complex128)}, None, "complex128"),
        ({"a": torch.zeros(2, 2).to_sparse()}, None, "layout"),
        ({"a": torch.zeros(1, device="meta")}, None, "meta device"),
        ({"\ud800": torch.zeros(1)}, None, "UTF-8"),
        ({"a": torch.zeros(1)}, {"n": 1}, "text to text"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_first_byte(tensors, metadata, problem):
    file = io.BytesIO()
    with pytest.raises(InvalidArgumentError, match=problem):
        write(file, tensors, metadata)
    assert file.getvalue() == b""


def test_the_header_limit_is_the_package_limit():
    data = (safetensors_file.MAX_HEADER + 1).to_bytes(8, "little")
    with pytest.raises(Exception, match="header too large"):
        package.load(data + b"{}")
