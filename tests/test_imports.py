"""Importing the package in a fresh process: light, silent, and on torch alone."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import lora_kernels

ROOT = Path(__file__).resolve().parents[1]

BLOCK = """
import sys

class Blocked:
    names = {names!r}

    def find_spec(self, name, path=None, target=None):
        for blocked in self.names:
            if name == blocked or name.startswith(blocked + "."):
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        return None

sys.meta_path.insert(0, Blocked())
"""
OPTIONAL = (
    "triton", "peft", "transformers", "accelerate", "datasets", "safetensors", "yaml",
    "matplotlib", "torchmetrics", "numpy", "lora_kernels._C",
)  # fmt: skip


def run(code: str, blocked: tuple[str, ...] = OPTIONAL, **environment: str) -> str:
    """stdout of `code` in a fresh process; fails on any stderr or exit code."""
    script = BLOCK.format(names=set(blocked)) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:lora_kernels", "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        timeout=300,
    )
    # torch itself warns once when numpy is absent; nothing of ours may be there.
    noise = [line for line in done.stderr.splitlines() if "lora_kernels" in line]
    assert done.returncode == 0, done.stderr
    assert not noise, done.stderr
    return done.stdout


def test_import_is_silent_on_torch_alone():
    assert run("import lora_kernels, lora_kernels.ops, lora_kernels.modules") == ""


def test_import_loads_nothing_heavy():
    loaded = run(
        """
        import lora_kernels
        print([m for m in sys.modules if m.split(".")[0] in ("torch", "peft", "triton")])
        """,
        blocked=(),
    )
    assert loaded.strip() == "[]", "`import lora_kernels` must not import torch before it is used"


def test_ops_run_without_the_compiled_part():
    out = run(
        """
        import torch
        import lora_kernels as lk
        shapes = ((5, 20), (33, 20), (4, 20), (33, 4))
        x, w, a, b = (torch.randn(*shape, requires_grad=True) for shape in shapes)
        for backend in (None, "aten", "reference"):
            y = lk.ops.lora_linear(x, w, a, b, 0.5, dropout_p=0.1, backend=backend)
            y.sum().backward()
        print(lk.explain("lora_linear", M=5, K=20, N=33)["backend"])
        try:
            lk.ops.lora_linear(x, w, a, b, 0.5, backend="cpu")
        except lk.errors.BackendUnavailableError as error:
            print(error)
        """
    ).splitlines()
    assert out[0] == "aten"
    assert out[1].startswith("lora_linear: backend='cpu' cannot run this problem: ")
    assert len(out) == 2


def test_lora_linear_module_runs_on_torch_alone():
    out = run(
        """
        import torch
        import lora_kernels as lk
        model = torch.nn.Sequential(torch.nn.Linear(20, 33), torch.nn.Linear(33, 7))
        lk.replace_modules(model, r=4, alpha=8)
        model(torch.randn(5, 20)).sum().backward()
        print(sum(p.grad is not None for p in model.parameters()))
        """
    )
    assert out.strip() == "4"


@pytest.mark.parametrize("name", sorted(set(lora_kernels.__all__) - {"__version__"}))
def test_public_names_resolve(name):
    assert getattr(lora_kernels, name) is not None
    assert name in dir(lora_kernels)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'turbo'"):
        _ = lora_kernels.turbo


def test_missing_extra_says_what_to_install():
    out = run(
        """
        import lora_kernels as lk
        try:
            import torch
            lk.apply(torch.nn.Linear(2, 2))
        except ImportError as error:
            print(str(error))
        """
    )
    assert "peft" in out
    assert len(out.strip().splitlines()) == 1
