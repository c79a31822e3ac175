"""The layers, the five places of an op and the file limits, read from the syntax trees."""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lora_kernels.ops import _registry

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lora_kernels"
FILES = sorted(PACKAGE.rglob("*.py"))
OPS = [spec.name for spec in _registry.OPS]
BACKEND_FILES = ("aten", "cpu", "cuda", "triton")

PUBLIC = {"__init__", "modules", "integrations"}  # what users import
# Area -> areas of the package it may import. Arrows run down only.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "_version": set(),
    "_backends": {"errors", "_C"},
    "ops": {"errors", "_backends"},
    "modules": {"errors", "ops"},
    "integrations": {"errors", "ops", "modules"},
    "testing": {"errors", "ops"},
    "selfcheck": {"errors", "ops", "testing"},
    "environment": {"errors", "_version", "_backends", "ops", "selfcheck"},
    "training": PUBLIC | {"errors", "_version", "environment", "ops"},
    "cli": PUBLIC | {"errors", "_version", "environment", "ops", "training"},
    "__main__": {"cli"},
    "__init__": {"_version"},
}
# Importing these needs nothing but torch; what else they use, they import inside a function.
TORCH_ONLY = {
    "errors",
    "_version",
    "_backends",
    "ops",
    "modules",
    "environment",
    "testing",
    "selfcheck",
}


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    at_top: bool


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def area(module: str) -> str:
    """lora_kernels.ops.x -> ops; the bare package is __init__."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imports(path: Path) -> Iterator[Import]:
    """Every import outside of ``if TYPE_CHECKING``; a name imported from a package counts as its
    submodule where there is one."""

    def walk(node: ast.AST, at_top: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if _is_type_checking(child):
                continue
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, child.lineno, at_top)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: relative import"
                for alias in child.names:
                    name = f"{child.module}.{alias.name}"
                    inner = ROOT / name.replace(".", "/")
                    exists = inner.is_dir() or inner.with_suffix(".py").exists()
                    exists = exists or name == "lora_kernels._C"  # the compiled module
                    yield Import(name if exists else str(child.module), child.lineno, at_top)
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from walk(child, at_top and not inside)

    yield from walk(ast.parse(path.read_text()), True)


def own(path: Path) -> Iterator[Import]:
    return (i for i in imports(path) if i.module.split(".")[0] == "lora_kernels")


def test_arrows_run_down_only():
    wrong = [
        f"{path.relative_to(ROOT)}:{i.line} imports {i.module}"
        for path in FILES
        for i in own(path)
        if (here := area(dotted(path))) != (there := area(i.module))
        and there not in MAY_IMPORT.get(here, set())
    ]
    assert not wrong, "\n".join(wrong)


def test_every_area_is_in_the_table():
    areas = {area(dotted(path)) for path in FILES}
    assert areas <= set(MAY_IMPORT), f"add to MAY_IMPORT: {areas - set(MAY_IMPORT)}"


def test_nothing_below_training_needs_more_than_torch():
    allowed = set(sys.stdlib_module_names) | {"torch", "lora_kernels"}
    wrong = [
        f"{path.relative_to(ROOT)}:{i.line} imports {i.module}"
        for path in FILES
        if area(dotted(path)) in TORCH_ONLY and not path.stem.lstrip("_").startswith("triton")
        for i in imports(path)
        if i.module.split(".")[0] not in allowed and i.at_top
    ]
    assert not wrong, "\n".join(wrong)


def op_imports(op: str, stem: str) -> list[str]:
    path = PACKAGE / "ops" / op / f"{stem}.py"
    return [i.module for i in own(path)] if path.exists() else []


@pytest.mark.parametrize("op", OPS)
def test_reference_imports_torch_only(op):
    path = PACKAGE / "ops" / op / "reference.py"
    allowed = {"torch", "lora_kernels"} | set(sys.stdlib_module_names)
    assert {i.module.split(".")[0] for i in imports(path)} <= allowed
    data = {"lora_kernels.ops._philox", f"lora_kernels.ops.{op}", f"lora_kernels.ops.{op}.formats"}
    assert set(op_imports(op, "reference")) <= data


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("stem", BACKEND_FILES)
def test_backends_stay_apart(op, stem):
    """No backend imports another, the reference, or what lies above it."""
    here = f"lora_kernels.ops.{op}"
    above = {"api", "autograd", "contract", "validate", "reference", *BACKEND_FILES} - {stem}
    wrong = set(op_imports(op, stem)) & {f"{here}.{name}" for name in above}
    assert not wrong, f"{stem}.py imports {wrong}"


@pytest.mark.parametrize("op", OPS)
def test_chain_inside_an_op(op):
    here = f"lora_kernels.ops.{op}"
    order = ["api", "validate", "autograd", "contract", "problem", "formats"]
    for position, stem in enumerate(order):
        upward = {f"{here}.{name}" for name in order[:position]} - {f"{here}.validate"}
        assert not set(op_imports(op, stem)) & upward, f"{stem}.py imports upward"


def test_ops_use_each_other_through_the_front_door():
    wrong = [
        f"{path.relative_to(ROOT)}:{i.line} imports {i.module}"
        for op in OPS
        for path in (PACKAGE / "ops" / op).rglob("*.py")
        for i in own(path)
        for other in OPS
        if other != op and i.module.startswith(f"lora_kernels.ops.{other}.")
    ]
    assert not wrong, "\n".join(wrong)


def test_private_files_of_an_op_are_used_by_ops_and_tests_only():
    wrong = [
        f"{path.relative_to(ROOT)}:{i.line} imports {i.module}"
        for path in FILES
        if area(dotted(path)) not in ("ops", "testing")
        for i in own(path)
        for op in OPS
        if i.module.startswith(f"lora_kernels.ops.{op}.")
    ]
    assert not wrong, "\n".join(wrong)


def test_dispatch_names_no_op():
    text = (PACKAGE / "ops" / "_dispatch.py").read_text()
    assert not [op for op in OPS if op in text]


@pytest.mark.parametrize("op", OPS)
def test_five_places_of_an_op(op):
    spec = _registry.find(op)
    folder = PACKAGE / "ops" / op
    needed = [folder / f"{stem}.py" for stem in ("api", "contract", "problem", "reference", "aten")]
    needed += [folder / "README.md", ROOT / "tests" / "ops" / f"test_{op}.py"]
    needed += [ROOT / "benchmarks" / f"test_bench_{op}.py"]
    if {"cpu", "cuda"} & set(spec.backends):
        needed.append(ROOT / "csrc" / op)
    needed += [folder / f"{backend}.py" for backend in spec.backends]
    missing = [str(path.relative_to(ROOT)) for path in needed if not path.exists()]
    assert not missing, f"missing: {missing}"


def test_every_op_folder_is_registered():
    folders = {p.name for p in (PACKAGE / "ops").iterdir() if (p / "__init__.py").exists()}
    assert folders == set(OPS)


def sources() -> list[Path]:
    found = [
        p for folder in ("tests", "benchmarks", "tools") for p in (ROOT / folder).rglob("*.py")
    ]
    for folder in ("csrc", "tests"):
        for suffix in ("cpp", "h", "cu", "cuh"):
            found += (ROOT / folder).rglob(f"*.{suffix}")
    return [*FILES, *found]


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_no_file_is_longer_than_500_lines():
    long = {str(p.relative_to(ROOT)): lines(p) for p in sources() if lines(p) > 500}
    assert not long, long


def test_files_of_the_package_are_small():
    assert statistics.median(lines(path) for path in FILES) <= 150


def calls(path: Path) -> Iterator[ast.Call]:
    return (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))


def test_only_the_command_line_prints():
    wrong = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in FILES
        if area(dotted(path)) != "cli"
        for call in calls(path)
        if isinstance(call.func, ast.Name) and call.func.id == "print"
    ]
    assert not wrong, wrong


def test_no_test_states_a_tolerance_of_its_own():
    wrong = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in (ROOT / "tests").rglob("*.py")
        for call in calls(path)
        for keyword in call.keywords
        if keyword.arg in ("atol", "rtol", "abs_tol", "rel_tol")
    ]
    assert not wrong, wrong


def test_every_module_has_a_docstring():
    bare = [
        str(path.relative_to(ROOT))
        for path in FILES
        if path.name not in ("__init__.py", "_version.py")
        and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not bare, bare
