"""The first element-wise call of a process is as accurate as the second."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels.ops import _mkl_dispatch

PACKAGE = Path(_mkl_dispatch.__file__).parents[1]

FIRST_CALL = """
import torch
import lora_kernels.ops
torch.set_num_threads(4)
z = torch.linspace(-4, 4, 40000).view(4, 100, 100)
assert torch.equal(torch.tanh(z), torch.tanh(z)) and torch.equal(torch.exp(z), torch.exp(z))
"""


class Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if isinstance(args[0], torch.Tensor):
            assert args[0].device.type == "cpu"
            self.seen.add((func.overloadpacket.__name__, args[0].dtype))
        return func(*args, **(kwargs or {}))


def test_every_function_in_both_precisions_on_the_cpu():
    if not torch.backends.mkl.is_available():
        pytest.skip("this torch has no MKL")
    torch.set_default_device("meta")
    try:
        with Record() as record:
            _mkl_dispatch.settle()
    finally:
        torch.set_default_device(None)
    names = {function.__name__ for function in _mkl_dispatch._FUNCTIONS}
    wanted = {(name, d) for name in names for d in (torch.float32, torch.float64)}
    assert wanted <= {(name.removeprefix("special_"), dtype) for name, dtype in record.seen}


def test_the_list_has_what_the_package_calls():
    """Functions of torch that MKL serves (aten/src/ATen/cpu/vml.h) and that this package uses."""
    served = {
        "acos", "asin", "atan", "cos", "cosh", "erf", "erfc", "erfinv", "exp", "expm1", "lgamma",
        "log", "log10", "log1p", "log2", "sin", "sinh", "sqrt", "tan", "tanh",
    }  # fmt: skip
    called = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                called.add(node.attr.removesuffix("_"))
    missing = (served & called) - {f.__name__ for f in _mkl_dispatch._FUNCTIONS}
    assert not missing


@pytest.mark.slow
def test_first_calls_of_many_processes():
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "4"}
    for _ in range(60):
        subprocess.run([sys.executable, "-c", FIRST_CALL], check=True, env=env)
