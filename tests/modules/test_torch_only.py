"""The modules need torch and nothing else."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys, tempfile
for name in ("peft", "transformers", "safetensors", "accelerate", "numpy", "triton"):
    sys.modules[name] = None
import torch
import lora_kernels as lk

base = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
state = base.state_dict()
lk.replace_modules(base, r=2, targets=["0", "2"], dora=True)
torch.nn.init.normal_(base[0].lora_B)
x = torch.randn(4, 6)
with tempfile.TemporaryDirectory() as folder:
    lk.save_adapter(base, folder)
    twin = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    twin.load_state_dict(state, strict=False)
    lk.load_adapter(twin, folder)
assert torch.equal(base(x), twin(x))
assert lk.merge(twin) == lk.unmerge(twin) == ["0", "2"]
loaded = [n for n in ("peft", "transformers", "safetensors", "numpy") if sys.modules.get(n)]
assert not loaded, loaded
"""


def test_replace_save_load_and_merge_without_any_other_package():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
