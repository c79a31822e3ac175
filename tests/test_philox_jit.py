"""The run-time compiled dropout of GPUs: its source is compiled here for the CPU and compared."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess

import pytest
import torch

from lora_kernels.ops import _philox, _philox_jit

LOOP = """
extern "C" void keep4(const long long* row, const long long* c, long long* out, long long n,
                      long long seed, long long threshold, long long stream) {
  for (long long i = 0; i < n; ++i)
    out[i] = lora_kernels_keep4<long long>(row[i], c[i], seed, threshold, stream);
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("philox")
    source, built = folder / "keep4.cpp", folder / "keep4.so"
    source.write_text(_philox_jit.SOURCE + LOOP)
    flags = ["-O1", "-shared", "-fPIC", "-Wall", "-Werror"]
    subprocess.run(["g++", *flags, str(source), "-o", str(built)], check=True)
    return ctypes.CDLL(str(built))


@pytest.fixture
def compiled(library, monkeypatch):
    """keep_words with the function on the CPU in place of the one on a GPU."""

    def kernel(row, group, seed, *, threshold, stream):
        row, group = (t.contiguous() for t in torch.broadcast_tensors(row, group))
        out = torch.empty_like(row)
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (row, group, out))
        numbers = (ctypes.c_longlong(int(v)) for v in (row.numel(), seed, threshold, stream))
        library.keep4(*pointers, *numbers)
        return out

    monkeypatch.setattr(_philox_jit, "_kernel", kernel)
    monkeypatch.setattr(_philox_jit, "usable", lambda device: True)


@pytest.mark.parametrize("seed", [0, 2**32 + 7, 0x0123456789ABCDEF, 2**63 - 1])
@pytest.mark.parametrize("columns", [1, 2, 5, 31, 33, 128, 391])
@pytest.mark.parametrize(("p", "stream", "first"), [(0.1, 0, 0), (0.5, 3, 70), (1.0, 1, 1)])
def test_words_are_the_mask(compiled, seed, columns, p, stream, first):
    value = torch.tensor(seed)
    words = _philox_jit.keep_words(value, 6, columns, p, stream, first)
    assert words.dtype == torch.int16
    assert set(words.unique().tolist()) <= {-1, 0}
    assert torch.equal(words != 0, _philox.keep_mask(value, 6, columns, p, stream, first))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize("layout", ["rows", "permuted"])
def test_drop_is_the_definition(compiled, dtype, layout):
    x = torch.randn(37, 70, dtype=dtype)
    x[3, 5], x[4, 6] = float("inf"), float("nan")
    x = x if layout == "rows" else x.t().contiguous().t()
    seed = torch.tensor(99)
    got, want = _philox_jit.drop(x, seed, 0.4, 1, 8), _philox.drop(x, seed, 0.4, 1, 8)
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
    assert not got[got == 0].signbit().any()


def test_torch_finds_the_function_in_the_source():
    from torch.cuda.jiterator import _CodeParser

    parsed = _CodeParser(_philox_jit.SOURCE)
    assert parsed.function_name == "lora_kernels_keep4"
    assert parsed.return_type == "T"
    assert re.sub(r"\s", "", parsed.template_params) == "<typenameT>"


def test_a_wrong_function_is_not_used(compiled, monkeypatch):
    """The comparison that guards the first use notices a single wrong decision."""
    assert _philox_jit._equals_definition(torch.device("cpu"))
    right = _philox_jit.keep_words

    def one_bit_off(*args):
        words = right(*args).clone()
        words[8, 390] = ~words[8, 390]
        return words

    monkeypatch.setattr(_philox_jit, "keep_words", one_bit_off)
    assert not _philox_jit._equals_definition(torch.device("cpu"))


def test_cpu_tensors_take_the_definition():
    assert not _philox_jit.usable(torch.device("cpu"))


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
def test_definition_does_not_depend_on_its_chunks(monkeypatch, rows):
    whole = _philox.keep_mask(torch.tensor(3), rows, 200, 0.3, 1)
    monkeypatch.setattr(_philox, "_COUNTERS", {False: 32 * 64, True: 1})
    assert torch.equal(whole, _philox.keep_mask(torch.tensor(3), rows, 200, 0.3, 1))
    part = _philox.keep_mask(torch.tensor(3), 5, 200, 0.3, 1, first_row=rows - 1)
    assert torch.equal(part[:1], whole[-1:])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_the_device(dtype):
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    device = torch.device("cuda", 0)
    assert _philox_jit.usable(device), "the run-time compiled function is not in use"
    x, seed = torch.randn(700, 1031, device=device).to(dtype), torch.tensor(5, device=device)
    assert torch.equal(_philox_jit.drop(x, seed, 0.1, 2, 9), _philox.drop(x, seed, 0.1, 2, 9))
