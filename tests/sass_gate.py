"""What the machine code of the CUDA kernels holds: disassembly, counts, rules. Static only."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RULES = tuple(sorted((ROOT / "csrc").glob("*/cuda/sass.txt")))
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_USAGE = re.compile(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass
class Kernel:
    name: str
    arch: str
    opcodes: list[str] = field(default_factory=list)  # in order, without modifiers
    wide: Counter[str] = field(default_factory=Counter)  # "OP.128": moves of 16 bytes per thread

    def counts(self) -> Counter[str]:
        return Counter(self.opcodes) + self.wide

    def longest_run(self, opcode: str, ended_by: str) -> int:
        """The most `opcode`s without an `ended_by` between them."""
        best = run = 0
        for name in self.opcodes:
            run = run + 1 if name == opcode else 0 if name == ended_by else run
            best = max(best, run)
        return best


@dataclass(frozen=True)
class Rule:
    kernel: str
    archs: tuple[str, ...]
    required: tuple[str, ...]
    forbidden: tuple[str, ...]


def tools() -> Path | None:
    """The folder of cuobjdump and nvdisasm: the Triton wheel's, or one on PATH or in CUDA_HOME."""
    found: list[Path] = []
    try:
        import triton
    except ImportError:
        pass
    else:
        found.append(Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    on_path = shutil.which("cuobjdump")
    found += [Path(on_path).parent] if on_path else []
    found.append(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin")
    for folder in found:
        if all(os.access(folder / name, os.X_OK) for name in ("cuobjdump", "nvdisasm")):
            return folder
    return None


def _cuobjdump(folder: Path, *arguments: str) -> str:
    path = os.pathsep.join((str(folder), os.environ.get("PATH", "")))
    done = subprocess.run(
        [folder / "cuobjdump", *arguments],
        capture_output=True, text=True, env={**os.environ, "PATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def disassemble(binary: Path, folder: Path) -> list[Kernel]:
    kernels: list[Kernel] = []
    arch = ""
    for line in _cuobjdump(folder, "-sass", str(binary)).splitlines():
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = sm_")
        elif line.lstrip().startswith("Function : "):
            kernels.append(Kernel(line.split(" : ")[1].strip(), arch))
        elif kernels and (match := _INSTRUCTION.search(line)):
            name, *modifiers = match[1].split(".")
            kernels[-1].opcodes.append(name)
            if "128" in modifiers:
                kernels[-1].wide[f"{name}.128"] += 1
    return kernels


def usage(binary: Path, folder: Path) -> dict[str, tuple[int, int, int, int]]:
    """Kernel -> the largest (registers, stack, static shared, local bytes) over architectures."""
    found: dict[str, tuple[int, int, int, int]] = {}
    for name, *numbers in _USAGE.findall(_cuobjdump(folder, "-res-usage", str(binary))):
        new = tuple(int(n) for n in numbers)
        old = found.get(name, (0, 0, 0, 0))
        found[name] = tuple(max(pair) for pair in zip(old, new, strict=True))
    return found


def ptx(binary: Path, folder: Path) -> list[str]:
    """Names of the PTX texts, one for each translation unit that has any."""
    lines = _cuobjdump(folder, "-lptx", str(binary)).splitlines()
    return [line.split()[-1] for line in lines if line.startswith("PTX file")]


def rules(paths: tuple[Path, ...] = RULES) -> Iterator[Rule]:
    for line in (line for path in paths for line in path.read_text().splitlines()):
        if line.strip() and not line.startswith("#"):
            kernel, archs, required, forbidden = line.split()
            lists = [
                () if text == "-" else tuple(text.split(",")) for text in (required, forbidden)
            ]
            yield Rule(kernel, tuple(archs.split(",")), *lists)


def violations(kernels: list[Kernel], all_rules: list[Rule]) -> list[str]:
    """One line for every kernel without a rule, rule without a kernel, and broken rule."""
    wrong: list[str] = []
    seen: set[tuple[str, str]] = set()
    for kernel in kernels:
        matching = [rule for rule in all_rules if re.search(rule.kernel, kernel.name)]
        if len(matching) != 1:
            wrong.append(f"{kernel.name}: {len(matching)} rules, not one")
            continue
        rule = matching[0]
        seen.add((rule.kernel, kernel.arch))
        if kernel.arch not in rule.archs:
            wrong.append(f"{kernel.name}: compiled for sm_{kernel.arch}, which its rule leaves out")
        counts = kernel.counts()
        wrong += [f"{kernel.name} sm_{kernel.arch}: no {op}" for op in rule.required
                  if not counts[op]]  # fmt: skip
        wrong += [f"{kernel.name} sm_{kernel.arch}: {counts[op]} {op}" for op in rule.forbidden
                  if counts[op]]  # fmt: skip
    wrong += [f"no kernel {rule.kernel} for sm_{arch}" for rule in all_rules for arch in rule.archs
              if (rule.kernel, arch) not in seen]  # fmt: skip
    return wrong
