"""The machine code of _cuda.so. These are static checks: nothing here runs on a GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import sass_gate

from lora_kernels._backends import cuda

TOOLS = sass_gate.tools()
LIBRARY = cuda.path()
pytestmark = [
    pytest.mark.skipif(
        TOOLS is None, reason="cuobjdump and nvdisasm are absent (pip install triton)"
    ),
]
needs_library = pytest.mark.skipif(not LIBRARY.is_file(), reason=cuda.load()[1])
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@pytest.fixture(scope="module")
def kernels() -> list[sass_gate.Kernel]:
    assert TOOLS is not None
    return sass_gate.disassemble(LIBRARY, TOOLS)


@needs_library
def test_every_kernel_keeps_its_rules(kernels, capsys):
    wrong = sass_gate.violations(kernels, list(sass_gate.rules()))
    assert not wrong, "\n".join(wrong)
    with capsys.disabled():
        archs = ", ".join(sorted({f"sm_{k.arch}" for k in kernels}))
        print(f"\nsass: {len(kernels)} kernels of {LIBRARY.name} for {archs} checked;"
              " static checks, nothing ran on a GPU")  # fmt: skip


@needs_library
def test_products_of_hopper_are_not_serialized(kernels):
    """Where ptxas gives up on the asynchronous pipeline it waits after every single product."""
    hopper = [k for k in kernels if "_sm90_kernel" in k.name]
    assert sum("gemm" in k.name for k in hopper) == 12
    assert sum("project" in k.name for k in hopper) == 2
    assert sum("attention_forward" in k.name for k in hopper) == 4
    assert sum("attention_gradients" in k.name for k in hopper) == 8
    for kernel in hopper:
        assert kernel.longest_run("HGMMA", ended_by="WARPGROUP") >= 4, kernel.name


@needs_library
def test_registers_stack_and_shared_memory():
    assert TOOLS is not None
    found = sass_gate.usage(LIBRARY, TOOLS)
    assert found
    for name, (registers, stack, shared, local) in found.items():
        assert stack == local == 0, f"{name}: {stack} bytes of stack, {local} local"
        assert registers <= 255 and shared <= 48 << 10, name
        if "_sm90_kernel" in name:
            # setmaxnreg moves registers between warpgroups on the premise of 168 per thread.
            assert registers == 168, f"{name}: {registers} registers"


@needs_library
def test_newer_gpus_have_ptx_of_everything_but_the_hopper_gemm():
    assert TOOLS is not None
    listed = sass_gate.ptx(LIBRARY, TOOLS)
    units = [line for line in (sass_gate.ROOT / "csrc/sources.txt").read_text().splitlines()
             if line.startswith("cuda ")]  # fmt: skip
    assert len(listed) == len(units) and all("sm_90.ptx" in name for name in listed), listed


BROKEN = """
__global__ void gemm_sm90_kernel_plain(float* x) { x[threadIdx.x] *= 2.0f; }
__global__ void gemm_sm90_kernel_local(float* x, const int* at) {
  float array[64];
  for (int i = 0; i < 64; ++i) array[i] = x[i + threadIdx.x];
  for (int i = 0; i < 64; ++i) array[at[i] & 63] += x[at[i + 64]];
  for (int i = 0; i < 64; ++i) x[i + threadIdx.x] = array[at[i + 128] & 63];
}
"""


@needs_nvcc
def test_gate_notices_planted_faults(tmp_path: Path):
    assert TOOLS is not None
    source, cubin = tmp_path / "broken.cu", tmp_path / "broken.cubin"
    source.write_text(BROKEN)
    command = ["nvcc", "-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-o", cubin, source]
    subprocess.run(command, check=True, capture_output=True)
    wrong = sass_gate.violations(sass_gate.disassemble(cubin, TOOLS), list(sass_gate.rules()))
    for kernel in ("plain", "local"):
        assert any(kernel in line and "no HGMMA" in line for line in wrong), wrong
    assert any("local" in line and " LDL" in line for line in wrong), wrong
    assert not any("plain" in line and " LDL" in line for line in wrong), wrong
    assert "no kernel pad_kernel for sm_80" in wrong
    assert sass_gate.usage(cubin, TOOLS)  # the table is there and
    assert any(stack for _, stack, _, _ in sass_gate.usage(cubin, TOOLS).values())  # tells of it


@needs_nvcc
def test_local_memory_is_a_compile_error(tmp_path: Path):
    source = tmp_path / "broken.cu"
    source.write_text(BROKEN)
    gates = ["-Xptxas", "-Werror,-warn-spills,-warn-lmem-usage"]
    command = ["nvcc", "-gencode=arch=compute_90a,code=sm_90a", *gates, "-cubin"]
    command += ["-o", str(tmp_path / "x"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ocal memory" in done.stdout + done.stderr
