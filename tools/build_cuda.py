"""Builds lora_kernels/_cuda.so: the CUDA kernels on the LibTorch stable ABI, target torch 2.11.

`pip install` does it (setup.py calls `build`). On its own, for a library to carry elsewhere:

    python tools/build_cuda.py [FOLDER]        (default: the package's own folder)
    python tools/build_cuda.py --told          what the library says it was built for and from

The result needs no Python and no CUDA library at run time; it loads under torch >= 2.11, with or
without CUDA. nvcc compiles for sm_80, sm_90 and sm_90a, plus PTX for what comes later; spills and
local memory are errors. torch.utils.cpp_extension.CUDAExtension is not used: it refuses to work
with a torch that was built without CUDA. ninja runs two jobs and repeats only what has changed.

Environment: LORA_KERNELS_SKIP_CUDA=1 skips. nvcc is looked for in CUDA_HOME, CUDA_PATH, PATH and
/usr/local/cuda; CXX is the host compiler, NVCC_CCBIN nvcc's own.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "_cuda.so"
SKIPPED = "_cuda_skipped.txt"  # why there is no library, for `lora-kernels env`
OLDEST_NVCC = (12, 5)  # cudaGetDriverEntryPointByVersion
TORCH_TARGET = "0x020b000000000000"  # 2.11
SOURCES = (".cu", ".cuh", ".h", ".cpp")
TARGETS = {
    # sm_90 machine code and PTX come from one pass of the compiler.
    "cuda": "-gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90,code=[sm_90,compute_90]",
    "cuda90a": "-gencode=arch=compute_90a,code=sm_90a",  # wgmma: this GPU and no other
}
NAMES = "sm_80, sm_90, sm_90a, PTX 90"
COMMON = "-std=c++17 -O3 -DNDEBUG"
# A spill or a local array is an error.
PTXAS = "-Xptxas -Werror,-warn-spills,-warn-lmem-usage"

NINJA = """\
ninja_required_version = 1.5
builddir = {work}
rule nvcc
  command = {nvcc} {common} -Xcompiler=-fPIC,-fvisibility=hidden {ptxas} $targets -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = nvcc $in
rule host
  command = {cxx} {common} -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unused-parameter {defines} {includes} -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = {cxx} $in
rule link
  command = {cxx} -shared -o $out $in -Wl,--no-as-needed -L{torch}/lib -ltorch -ltorch_cpu -lc10 -Wl,--as-needed -L{cuda_lib} -lcudart_static -lrt -ldl -lpthread -Wl,-z,defs -Wl,--exclude-libs,ALL
  description = link $out
"""  # noqa: E501


class Unavailable(Exception):
    """The library cannot be built here; the message says why."""


def find_nvcc() -> Path:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    tried = [Path(home) / "bin" / "nvcc" for home in homes if home]
    found = shutil.which("nvcc")
    tried += [Path(found)] if found else []
    tried.append(Path("/usr/local/cuda/bin/nvcc"))
    for path in tried:
        if os.access(path, os.X_OK) and path.is_file():
            return path
    raise Unavailable("nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda)")


def toolkit(nvcc: Path, work: Path) -> tuple[str, Path, Path]:
    """(version, include folder, library folder), as nvcc itself tells them."""
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    version = re.search(r"release (\d+)\.(\d+)", told.stdout)
    if told.returncode != 0 or version is None:
        raise Unavailable(f"{nvcc} does not run: {(told.stderr or told.stdout).strip()[-200:]}")
    if (int(version[1]), int(version[2])) < OLDEST_NVCC:
        wanted = ".".join(map(str, OLDEST_NVCC))
        raise Unavailable(f"nvcc {version[1]}.{version[2]} is too old, {wanted} is needed")
    probe = work / "probe.cu"
    probe.write_text("")
    dry = subprocess.run([nvcc, "--dryrun", "-c", probe], capture_output=True, text=True).stderr
    top = re.search(r"#\$ TOP=(.+)", dry)
    folder = Path(top[1].strip().strip('"')).resolve() if top else nvcc.resolve().parents[1]
    places = [*folder.glob("targets/*"), folder]
    for place in places:
        for lib in ("lib", "lib64"):
            if (place / "include/cuda.h").exists() and (
                place / lib / "libcudart_static.a"
            ).exists():
                return f"{version[1]}.{version[2]}", place / "include", place / lib
    raise Unavailable(f"the toolkit of {nvcc} has no cuda.h or no libcudart_static.a")


def torch_folder() -> Path:
    try:
        import torch
    except ImportError as error:
        raise Unavailable(f"torch cannot be imported ({error})") from None
    folder = Path(torch.__file__).parent
    if not (folder / "include/torch/csrc/stable/library.h").exists():
        raise Unavailable(f"torch {torch.__version__} has no stable ABI headers")
    return folder


def units() -> list[tuple[str, Path]]:
    lines = (ROOT / "csrc" / "sources.txt").read_text().splitlines()
    pairs = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    return [(kind, ROOT / "csrc" / path) for kind, path in pairs if kind.startswith("cuda")]


def op_sources(folder: Path) -> list[Path]:
    """Sources of an op's kernels: csrc/common, its own, and those of ops whose headers it takes."""
    include = re.compile(r'^#include "\.\./\.\./(\w+)/cuda/', re.MULTILINE)
    folders, queue = [ROOT / "csrc" / "common"], [folder]
    while queue:
        here = queue.pop()
        folders.append(here)
        for path in (p for p in here.rglob("*.*") if p.suffix in SOURCES):
            for op in include.findall(path.read_text()):
                other = ROOT / "csrc" / op / "cuda"
                queue += [other] if other not in (*folders, *queue) else []
    common, *rest = folders
    found = [*common.glob("*.*"), *(p for f in rest for p in f.rglob("*.*"))]
    return sorted(p for p in found if p.suffix in SOURCES)


def digests() -> str:
    """``op:digest`` of the sources of each op's kernels, as the library tells it: measurements
    are evidence for the very kernels that ran. The same sources give the same digest anywhere."""
    told = []
    for folder in sorted((ROOT / "csrc").glob("*/cuda")):
        total = hashlib.sha256()
        for path in op_sources(folder):
            content = path.read_bytes().replace(b"\r\n", b"\n")
            total.update(f"{path.name}\0{len(content)}\0".encode() + content)
        told.append(f"{folder.parent.name}:{total.hexdigest()[:16]}")
    return " ".join(told)


def told() -> str:
    """Targets and digests, as ``build_info()`` of the library repeats them; CMake asks for it."""
    return f"{NAMES}, sources {digests()}"  # no semicolon: CMake lists


def write_ninja(work: Path, library: Path) -> None:
    nvcc = find_nvcc()
    version, include, cuda_lib = toolkit(nvcc, work)
    torch = torch_folder()
    defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    defines += [f"'-DLK_NVCC_VERSION=\"{version}\"'", f"'-DLK_CUDA_TARGETS=\"{told()}\"'"]
    folders = (torch / "include", torch / "include/torch/csrc/api/include", include)
    text = NINJA.format(
        work=work, nvcc=nvcc, cxx=os.environ.get("CXX", "g++"), common=COMMON, ptxas=PTXAS,
        defines=" ".join(defines), includes=" ".join(f"-isystem {f}" for f in folders),
        torch=torch, cuda_lib=cuda_lib,
    )  # fmt: skip
    objects = []
    for kind, source in units():
        obj = work / (str(source.relative_to(ROOT / "csrc")).replace("/", "_") + ".o")
        rule = "host" if kind == "cudahost" else "nvcc"
        text += f"build {obj}: {rule} {source}\n"
        text += f"  targets = {TARGETS[kind]}\n" if rule == "nvcc" else ""
        objects.append(str(obj))
    text += f"build {library}: link {' '.join(objects)}\ndefault {library}\n"
    path = work / "build.ninja"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def run_ninja(work: Path) -> None:
    ninja = shutil.which(
        "ninja", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    )
    if ninja is None:
        raise Unavailable("ninja was not found (pip install ninja)")
    jobs = os.environ.get("MAX_JOBS") or str(min(2, os.cpu_count() or 1))
    done = subprocess.run([ninja, "-C", work, "-j", jobs], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(
            f"lora_kernels: the CUDA kernels do not compile; LORA_KERNELS_SKIP_CUDA=1 installs "
            f"without them\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
        )


def build(folder: Path, work: Path | None = None) -> str:
    """Leaves the library, or the reason why there is none, in `folder`; returns that reason.

    Raises:
        RuntimeError: nvcc is there and rejects a kernel.
    """
    work = work or ROOT / "build" / "cuda"
    folder.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    target, note = folder / LIBRARY, folder / SKIPPED
    reason = ""
    try:
        if os.environ.get("LORA_KERNELS_SKIP_CUDA") == "1":
            raise Unavailable("LORA_KERNELS_SKIP_CUDA=1")
        write_ninja(work, work / LIBRARY)
        run_ninja(work)
        new = target.with_suffix(".new")
        shutil.copyfile(work / LIBRARY, new)
        os.replace(new, target)
        note.unlink(missing_ok=True)
    except Unavailable as why:
        reason = str(why)
        note.write_text(reason + "\n")
        target.unlink(missing_ok=True)  # never an old library beside new sources
    return reason


if __name__ == "__main__":
    if sys.argv[1:] == ["--told"]:
        print(told())
        sys.exit(0)
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "lora_kernels"
    why = build(where)
    print(f"not built: {why}" if why else f"built {where / LIBRARY}")
    sys.exit(1 if why else 0)
