"""Freed pages stay in the process, unless the environment says how."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys, torch
from lora_kernels.training.allocator import keep_freed_pages
kept = keep_freed_pages() if sys.argv[1] == "keep" else None

def step():
    some = [torch.ones(12 << 20) for _ in range(2)]  # 48 MiB each, more than glibc learns to keep
    return sum(t[-1].item() for t in some)

for _ in range(4):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str, **environment: str) -> tuple[str, int]:
    theirs = ("GLIBC_TUNABLES", "LD_PRELOAD")
    clean = {k: v for k, v in os.environ.items() if k[:7] != "MALLOC_" and k not in theirs}
    done = subprocess.run(
        [sys.executable, "-c", CODE, mode], capture_output=True, text=True, check=True,
        env={**clean, **environment}, timeout=300,
    )  # fmt: skip
    kept, count = done.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_a_step_maps_its_pages_once():
    _, before = faults("as it is")
    kept, after = faults("keep")
    assert kept == "True"
    assert before > 5 * 20_000  # 5 steps with 2 x 12288 pages of 4 KiB
    assert after < before // 5


def test_settings_of_the_environment_stay():
    assert faults("keep", MALLOC_TOP_PAD_="4096")[0] == "False"
