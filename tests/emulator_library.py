"""The GPU kernels of csrc/*/cuda, built by the host compiler against the emulator.

The same .cu files that nvcc compiles; csrc/common/emulator stands for the GPU. A library holds the
kernels of lora_linear and of the ops that are asked for. Objects and libraries are kept in
build/emulator under the hash of what they are made of, so a second run builds nothing.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
FLAGS = [
    "-O2", "-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas",
    "-U_FORTIFY_SOURCE", "-DLK_EMULATOR", "-DLK_PLANTED_FAULTS", f"-I{CSRC}",
]  # fmt: skip
# Of the kernels for Hopper alone, those that use nothing but what the emulator has (hopper.h).
EMULATED_HOPPER = tuple(
    f"attention/cuda/{way}_sm90_{dtype}.cu"
    for way in ("forward", "backward")
    for dtype in ("bf16", "fp16")
)
MAX_GROUP, MAX_PAD_JOBS, MAX_TERMS = 8, 24, 16

_i32, _i64, _f32, _ptr = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


def _struct(name: str, *fields: tuple[str, object]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields)})


def _named(kind: object, names: str) -> list[tuple[str, object]]:
    return [(name, kind) for name in names.split()]


# csrc/lora_linear/cuda/params.h, field by field.
Dropout = _struct(
    "Dropout", ("threshold", ctypes.c_uint32), ("key", ctypes.c_uint32 * 2), ("seed", _ptr)
)
PadJob = _struct(
    "PadJob",
    ("src", _ptr), ("src_dtype", _i32), *_named(_i64, "ld_src col_stride rows cols"),
    ("dst", _ptr), *_named(_i64, "ld_dst dst_cols"), ("scale", _f32),
)  # fmt: skip
PadParams = _struct("PadParams", *_named(_i32, "dtype jobs"), ("job", PadJob * MAX_PAD_JOBS))
ShrinkMember = _struct(
    "ShrinkMember",
    ("a", _ptr), *_named(_i64, "lda rank s_column padded_column"), ("scaling", _f32),
)  # fmt: skip
ShrinkParams = _struct(
    "ShrinkParams",
    ("dtype", _i32), ("x", _ptr), *_named(_i64, "ldx m k"), ("members", _i32),
    ("member", ShrinkMember * MAX_GROUP), ("s", _ptr), ("lds", _i64), ("scaled_s", _ptr),
    ("ld_scaled", _i64), ("keep_scale", _f32), ("dropout", Dropout),
    *_named(_i32, "sm_count splits"), ("workspace", _ptr),
)  # fmt: skip
DyMember = _struct(
    "DyMember",
    ("dy", _ptr), ("lddy", _i64), ("b", _ptr), ("ldb", _i64), ("s", _ptr), ("lds", _i64),
    *_named(_i64, "n rank padded_column"), ("scaling", _f32), ("db", _ptr), ("lddb", _i64),
    ("db_dtype", _i32),
)  # fmt: skip
DyPassParams = _struct(
    "DyPassParams",
    ("dtype", _i32), ("m", _i64), ("members", _i32), ("member", DyMember * MAX_GROUP),
    ("ds", _ptr), ("ldds", _i64), ("keep_scale", _f32), *_named(_i32, "sm_count splits"),
    ("workspace", _ptr),
)  # fmt: skip
DaMember = _struct(
    "DaMember",
    *_named(_i64, "rank padded_column"), ("da", _ptr), ("ldda", _i64), ("da_dtype", _i32),
)  # fmt: skip
DaParams = _struct(
    "DaParams",
    ("dtype", _i32), ("x", _ptr), ("ldx", _i64), ("ds", _ptr), *_named(_i64, "ldds m k"),
    ("members", _i32), ("member", DaMember * MAX_GROUP), ("dropout", Dropout),
    *_named(_i32, "sm_count splits"), ("workspace", _ptr),
)  # fmt: skip
GemmTerm = _struct(
    "GemmTerm",
    ("a", _ptr), ("lda", _i64), ("b", _ptr), *_named(_i64, "ldb k"), ("stream", _i32),
)  # fmt: skip
GemmProblem = _struct(
    "GemmProblem",
    ("n", _i64), ("c", _ptr), ("ldc", _i64), ("bias", _ptr),
    *_named(_i32, "bias_dtype first_term terms"),
)  # fmt: skip
GemmParams = _struct(
    "GemmParams",
    *_named(_i32, "dtype layout"), ("m", _i64), ("problems", _i32),
    ("problem", GemmProblem * MAX_GROUP), ("term", GemmTerm * MAX_TERMS), ("dropout", Dropout),
    ("sm_count", _i32),
)  # fmt: skip
PARAMS = {
    "pad": PadParams, "shrink": ShrinkParams, "dy_pass": DyPassParams, "da": DaParams,
    "gemm_sm80": GemmParams,
}  # fmt: skip


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def _units(ops: tuple[str, ...]) -> list[Path]:
    rows = [line.split() for line in (CSRC / "sources.txt").read_text().splitlines()]
    kernels = [
        CSRC / path
        for kind, path in (row for row in rows if len(row) == 2)
        if path.split("/")[0] in ops and (kind == "cuda" or path in EMULATED_HOPPER)
    ]
    emulator = sorted((CSRC / "common/emulator").glob("*.cpp"))
    return [*kernels, *emulator, *sorted((ROOT / "tests/csrc/emulator").glob("*.cpp"))]


def with_headers(unit: Path) -> list[Path]:
    """The unit and every project header that it includes, however deep."""
    found: list[Path] = []
    queue = [unit]
    while queue:
        path = queue.pop()
        if path in found:
            continue
        found.append(path)
        for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE):
            places = ((folder / name).resolve() for folder in (path.parent, CSRC))
            queue += [p for p in places if p.exists()][:1]
    return sorted(found)


def _content_hash(cxx: str, unit: Path) -> str:
    digest = hashlib.sha256(" ".join([cxx, *FLAGS]).encode())
    for path in with_headers(unit):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def make(target: Path, command: list[str]) -> None:
    """`command` with ``-o target``; the file appears complete or not at all."""
    handle, unfinished = tempfile.mkstemp(dir=target.parent, suffix=".part")
    os.close(handle)
    command = [*command, "-o", unfinished]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        os.unlink(unfinished)
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    os.replace(unfinished, target)


def build(*ops: str) -> Path:
    """Path of the shared library with lora_linear and `ops`, built where there is none for these
    sources."""
    cxx = compiler()
    if cxx is None:
        raise FileNotFoundError("no C++ compiler; install g++ or set CXX")
    cache = ROOT / "build" / "emulator"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        cache = Path(tempfile.gettempdir())

    def compile_unit(unit: Path) -> Path:
        target = cache / f"{unit.stem}-{_content_hash(cxx, unit)}.o"
        if not target.exists():
            make(target, [cxx, *FLAGS, "-x", "c++", "-c", str(unit)])
        return target

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        objects = [str(o) for o in pool.map(compile_unit, _units(("lora_linear", *ops)))]
    digest = hashlib.sha256(" ".join(objects).encode()).hexdigest()[:16]
    library = cache / f"emulator-{digest}.so"
    if not library.exists():
        make(library, [cxx, "-shared", *objects])
    return library


def load(*ops: str) -> ctypes.CDLL:
    """The library with its entries declared; raises when a layout differs from params.h."""
    library = ctypes.CDLL(str(build(*ops)))
    for name, params in PARAMS.items():
        size = getattr(library, f"lk_sizeof_{name}")
        size.restype = ctypes.c_size_t
        if size() != ctypes.sizeof(params):
            raise RuntimeError(f"{name}: {size()} bytes in C++, {ctypes.sizeof(params)} here")
        getattr(library, f"lk_{name}").argtypes = [_ptr]
        check = getattr(library, f"lk_check_{name}")
        check.argtypes, check.restype = [_ptr], ctypes.c_char_p
    for name in ("shrink", "dy_pass", "da"):
        workspace = getattr(library, f"lk_workspace_{name}")
        workspace.argtypes, workspace.restype = [_ptr], ctypes.c_size_t
    library.lk_gemm_sm80_tile.argtypes = [_ptr, _i32]
    library.lk_gemm_sm80_choice.argtypes = [_ptr]
    library.lk_selftest.argtypes = [ctypes.c_char_p]
    library.lk_options.argtypes = [ctypes.c_uint64, _i32, ctypes.c_size_t]
    library.lk_register_memory.argtypes = [_ptr, ctypes.c_size_t]
    library.lk_error.restype = ctypes.c_char_p
    for name in ("blocks_run", "shared_phases", "conflicting_phases"):
        getattr(library, f"lk_{name}").restype = ctypes.c_uint64
    return library
