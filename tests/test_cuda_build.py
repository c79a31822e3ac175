"""How _cuda.so is built, what it needs at run time, and the arithmetic of its Hopper GEMM.

Nothing here runs on a GPU: the C++ models run on the CPU, the rest reads files.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lora_kernels._backends import cuda

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = cuda.path()
needs_library = pytest.mark.skipif(not LIBRARY.is_file(), reason=cuda.load()[1])
needs_binutils = pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")


@pytest.fixture
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_cuda", ROOT / "tools" / "build_cuda.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def no_toolkit(builder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH", "LORA_KERNELS_SKIP_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(builder.shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(builder.os, "access", lambda *_: False)


@pytest.fixture
def fresh_loader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The loader over an empty folder; what the process had loaded is found again afterwards."""
    monkeypatch.setattr(cuda, "_FOLDER", tmp_path)
    monkeypatch.delenv("LORA_KERNELS_CUDA_LIBRARY", raising=False)
    cuda.load.cache_clear()
    yield tmp_path
    cuda.load.cache_clear()


def undefined() -> set[str]:
    done = subprocess.run(
        ["nm", "-D", "--undefined-only", LIBRARY], capture_output=True, text=True, check=True
    )
    return {line.split()[-1] for line in done.stdout.splitlines()}


@needs_library
@needs_binutils
def test_needs_nothing_of_torch_that_2_11_lacks():
    listed = (ROOT / "tests" / "torch_2_11_shims.txt").read_text().splitlines()
    known = {line for line in listed if not line.startswith("#")}
    needed = {name.split("@")[0] for name in undefined()}
    torch_names = {name for name in needed if re.match(r"(aoti_)?torch_", name)}
    assert len(torch_names) > 20, "the list of symbols could not be read"
    assert torch_names <= known, f"not in torch 2.11: {sorted(torch_names - known)}"
    mangled = {name for name in needed if re.match(r"_ZNK?(2at|3c10|5torch)", name)}
    assert not mangled, f"not on the stable ABI: {sorted(mangled)}"


@needs_library
@needs_binutils
def test_needs_no_python_no_driver_and_no_new_system():
    names = undefined()
    assert not [n for n in names if re.match(r"_?Py[A-Z_]|pybind11", n)]
    assert not [n for n in names if re.match(r"cu[A-Z]|cuda[A-Z]", n)], (
        "CUDA is not linked statically"
    )
    newest = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 30)}
    for name in names:
        if found := re.search(r"@(GLIBC|GLIBCXX)_([0-9.]+)$", name):
            version = tuple(int(part) for part in found[2].split("."))
            assert version <= newest[found[1]], name


@needs_library
def test_loads_and_registers_beside_this_torch():
    library, reason = cuda.load()
    assert library is not None, reason
    assert "sm_90a" in library.build_info()
    for name in ("lora_linear_fwd", "lora_linear_bwd", "attention_fwd", "attention_bwd"):
        op = getattr(library, name).default
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CUDA")
    with pytest.raises(NotImplementedError):  # a CPU tensor does not reach the kernels
        x = torch.zeros(2, 8)
        library.lora_linear_fwd(x, [x], [x], [x], [None], [1.0], 1.0, 0, None, "auto")


@needs_library
def test_loads_without_the_rest_of_the_package():
    """As on a machine that gets the file alone, in another interpreter."""
    code = (
        f"import torch; torch.ops.load_library({str(LIBRARY.resolve())!r});"
        "print(torch.ops.lora_kernels_cuda.build_info())"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert "nvcc" in done.stdout, done.stderr


def test_skipping_is_recorded_and_repeated(builder, fresh_loader, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_SKIP_CUDA", "1")
    (fresh_loader / "_cuda.so").write_text("an older library")
    reason = builder.build(fresh_loader, fresh_loader / "work")
    assert reason == "LORA_KERNELS_SKIP_CUDA=1"
    assert not (fresh_loader / "_cuda.so").exists()
    library, why = cuda.load()
    assert library is None and reason in why and "\n" not in why
    assert cuda.build_info() == {"available": False, "reason": why}
    assert not cuda.broken()


@pytest.mark.usefixtures("no_toolkit")
def test_no_nvcc_is_a_reason_not_an_error(builder, tmp_path):
    assert "nvcc was not found" in builder.build(tmp_path, tmp_path / "work")
    assert "nvcc was not found" in (tmp_path / builder.SKIPPED).read_text()


def test_old_nvcc_is_named(builder, tmp_path, monkeypatch):
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("LORA_KERNELS_SKIP_CUDA", raising=False)
    assert "nvcc 11.8 is too old, 12.5 is needed" in builder.build(tmp_path, tmp_path / "work")


def test_a_broken_or_missing_library_is_told_apart(fresh_loader, monkeypatch):
    (fresh_loader / "_cuda.so").write_text("no library")
    library, why = cuda.load()
    assert library is None and "cannot be loaded" in why and "\n" not in why
    assert cuda.broken()
    monkeypatch.setenv("LORA_KERNELS_CUDA_LIBRARY", str(fresh_loader / "elsewhere.so"))
    cuda.load.cache_clear()
    assert "elsewhere.so' is not a file" in cuda.load()[1]


def test_every_source_is_listed_once(builder):
    listed = [path for _, path in builder.units()]
    assert len(listed) == len(set(listed))
    written = [p for suffix in ("cu", "cpp") for p in (ROOT / "csrc").glob(f"*/cuda/*.{suffix}")]
    assert set(written) == set(listed)
    kinds = {path.name: kind for kind, path in builder.units()}
    assert all((kind == "cudahost") == name.endswith(".cpp") for name, kind in kinds.items())


@pytest.mark.parametrize("name", ["gemm_sm90", "gemm_sm90_pipeline"])
def test_models_of_the_hopper_gemm(name, tmp_path):
    """Operands, accumulators, tile order; the pipeline in random order, with planted faults."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    program = tmp_path / name
    source = ROOT / "tests" / "csrc" / f"test_{name}.cpp"
    build = [compiler, "-std=c++20", "-O1", "-I", ROOT / "csrc", "-o", program, source]
    subprocess.run(build, check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


HOST_FAULTS = {
    "": "",
    "ceil_div(p.m, kSm90BlockM * shape.cluster)": "ceil_div(p.m, kSm90BlockM)",
    "q.stream[t] = term.stream;": "q.stream[t] = -1;",
}


@pytest.mark.parametrize("fault", HOST_FAULTS, ids=lambda text: text or "as it is")
def test_what_the_hopper_launcher_describes(builder, fault, tmp_path):
    """Tensor maps, tiles, grid and refusals, computed through on the CPU; then planted faults."""
    compiler = os.environ.get("CXX", "g++")
    try:
        _, include, _ = builder.toolkit(builder.find_nvcc(), tmp_path)
    except builder.Unavailable as why:
        pytest.skip(f"the headers of CUDA are absent: {why}")
    launcher = tmp_path / "gemm_sm90.cpp"
    text = (ROOT / "csrc/lora_linear/cuda/gemm_sm90.cpp").read_text()
    assert fault in text
    launcher.write_text(text.replace(fault, HOST_FAULTS[fault]) if fault else text)
    program = tmp_path / "host"
    csrc = ROOT / "csrc"
    build = [compiler, "-std=c++20", "-O1", "-I", csrc, "-I", csrc / "lora_linear" / "cuda"]
    build += ["-isystem", include, "-o", program, ROOT / "tests/csrc/test_gemm_sm90_host.cpp"]
    build += [launcher, "-x", "c++", csrc / "lora_linear" / "cuda" / "check.cu"]
    subprocess.run(build, check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == (1 if fault else 0), done.stdout[-2000:]


def test_the_model_notices_a_wrong_descriptor(tmp_path):
    """The control: strides of the N-major operand exchanged in the kernel's own header."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc" / "common", csrc / "common")
    (csrc / "lora_linear" / "cuda").mkdir(parents=True)
    schedule = "lora_linear/cuda/gemm_sm90_schedule.h"
    shutil.copy(ROOT / "csrc" / schedule, csrc / schedule)
    header = csrc / "common" / "smem_tile.h"
    text = header.read_text()
    right = "box_bytes, kSwizzlePeriod);"
    assert right in text
    header.write_text(text.replace(right, "kSwizzlePeriod, box_bytes);"))
    program = tmp_path / "wrong"
    source = ROOT / "tests" / "csrc" / "test_gemm_sm90.cpp"
    subprocess.run([compiler, "-std=c++20", "-O1", "-I", csrc, "-o", program, source], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 1 and "N-major" in done.stdout


def test_the_library_tells_the_sources_of_every_op(builder):
    told = builder.told()
    assert ";" not in told, "CMake takes it for a list"
    for folder in (ROOT / "csrc").glob("*/cuda"):
        assert re.search(rf"\b{folder.parent.name}:[0-9a-f]{{16}}\b", told)
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "build_cuda.py", "--told"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == told


def test_kernels_that_an_op_takes_from_another_count_for_both(builder):
    """quant_linear launches kernels of lora_linear, which takes nothing from it."""
    quant = builder.op_sources(ROOT / "csrc" / "quant_linear" / "cuda")
    lora = builder.op_sources(ROOT / "csrc" / "lora_linear" / "cuda")
    names = {path.relative_to(ROOT / "csrc").parts[0] for path in quant}
    assert names == {"common", "lora_linear", "quant_linear"}
    assert {path.relative_to(ROOT / "csrc").parts[0] for path in lora} == {"common", "lora_linear"}
    assert set(lora) < set(quant)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on PATH")
def test_cmake_builds_the_library_of_the_same_digest(builder, tmp_path):
    """Configured only: the definitions that the compiler would get."""
    done = subprocess.run(
        ["cmake", "-S", ROOT, "-B", tmp_path, f"-DPython3_EXECUTABLE={sys.executable}"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    if "_cuda is not built here" in done.stdout:
        pytest.skip("CMake finds no nvcc")
    commands = (tmp_path / "compile_commands.json").read_text()
    assert f'LK_CUDA_TARGETS=\\"\\\\\\"{builder.told()}' in commands
