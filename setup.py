"""Builds lora_kernels._C (CPU kernels) and, where nvcc is, lora_kernels/_cuda.so from
csrc/sources.txt; metadata is in pyproject.toml.

Per-ISA objects come from one static library per instruction set, because the extension's own
build gives all its sources the same flags. The engine is chosen at run time. Where torch or a
compiler is missing the Python package still installs; `lora-kernels env` then says why. The CUDA
library has a build of its own, tools/build_cuda.py.

Environment: LORA_KERNELS_SKIP_CPU=1 skips the native parts, LORA_KERNELS_SKIP_CUDA=1 the CUDA
library; LORA_KERNELS_DEBUG=1 builds the CPU kernels with -O0 -g.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
DEBUG = os.environ.get("LORA_KERNELS_DEBUG") == "1"
X86 = platform.machine() in ("x86_64", "AMD64")
COMMON = [
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]
COMMON += ["-O0", "-g"] if DEBUG else ["-O3"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
ISA_FLAGS = {
    "plain": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}


def sources() -> list[tuple[str, str]]:
    lines = (ROOT / "csrc" / "sources.txt").read_text().splitlines()
    pairs = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    return [(isa, f"csrc/{path}") for isa, path in pairs]


def accepts(flags: list[str]) -> bool:
    """Does the compiler know these flags? A file is compiled without them where it does not."""
    compiler = os.environ.get("CXX", "g++")
    probe = [compiler, *flags, "-x", "c++", "-E", "-", "-o", os.devnull]
    try:
        return subprocess.run(probe, input=b"", capture_output=True).returncode == 0
    except OSError:
        return False


def build_cuda(folder: Path) -> None:
    """tools/build_cuda.py, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("build_cuda", ROOT / "tools" / "build_cuda.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reason = module.build(folder)
    if reason:
        print(f"lora_kernels: the CUDA kernels are not built: {reason}")


def native() -> dict[str, object]:
    if os.environ.get("LORA_KERNELS_SKIP_CPU") == "1":
        print("lora_kernels: LORA_KERNELS_SKIP_CPU=1, neither CPU nor CUDA kernels are built")
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        print(f"lora_kernels: torch cannot be imported ({error}), no kernels are built")
        return {}

    class BuildBoth(BuildExtension):
        def run(self) -> None:
            super().run()
            in_place = self.inplace or getattr(self, "editable_mode", False)
            build_cuda((ROOT if in_place else Path(self.build_lib)) / "lora_kernels")

    headers = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h"))
    libraries = []
    for isa, flags in ISA_FLAGS.items():
        files = [path for kind, path in sources() if kind == isa]
        usable = flags if X86 and accepts(flags) else []
        libraries.append(
            (
                f"lora_kernels_{isa}",
                {"sources": files, "cflags": COMMON + usable, "obj_deps": {"": headers}},
            )
        )
    macros = [
        ("LORA_KERNELS_TORCH_VERSION", f'"{torch.__version__}"'),
        ("LORA_KERNELS_COMPILER", "__VERSION__"),
    ]
    extension = CppExtension(
        "lora_kernels._C",
        [path for kind, path in sources() if kind == "host"],
        extra_compile_args=[*COMMON, "-fopenmp", "-g0", "-Wno-unused-parameter"],
        extra_link_args=["-fopenmp"],
        define_macros=macros,
        depends=headers,
    )
    return {
        "libraries": libraries,
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildBoth},
    }


setup(**native())
