"""lora_qkv's CUDA kernels on a GPU, each by name: few rows reach the sm_90a one only when it is
asked for, so the small problems of every op do not.

Marked gpu: part of make gpu-check. Without a GPU every test skips and says so.
"""

from __future__ import annotations

import pytest
import torch

from lora_kernels.ops import _registry
from lora_kernels.testing import check_lora_qkv, lora_qkv_inputs, lora_qkv_op, moved, poisoned_empty
from lora_kernels.testing.lora_qkv import LoraQkvInputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


@pytest.fixture(params=["sm80", "sm90"], autouse=True)
def gemm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the sm_90a kernel needs compute capability 9.0")
    monkeypatch.setenv("LORA_KERNELS_CUDA_GEMM", request.param)
    return request.param


def made(*args, **options) -> LoraQkvInputs:
    spec = _registry.find("lora_qkv")
    able, why = spec.supports("cuda", spec.problem(M=8, K=8, H=1, D=64, device="cuda",
                                                   dtype=torch.bfloat16))  # fmt: skip
    if not able:
        pytest.skip(why)
    return moved(lora_qkv_inputs(*args, **options), "cuda")


@pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_heads(dtype, D, joint):
    """Rows that end inside of a tile, of one block and of a cluster; tiles of heads that are not
    there, and of heads some of which are rotated."""
    for lead in ((1, 67), (3, 131)):
        i = made(lead, 136, 3, 1, D, joint=joint, dtype=dtype, tables="cache", rank=24)
        with poisoned_empty():
            check_lora_qkv(i, "cuda", "xab")


def test_ranks_members_and_tables(gemm):
    for options in (
        {"rank": (5, 64, 16), "bias": False, "tables": "batch"},
        {"rank": (8, 0, 16)},
        {"rank": (8, 8, 8), "dropout_p": 0.25},
        {"adapter_dtype": torch.float32},
    ):
        i = made((2, 150), 264, 4, 2, 128, dtype=torch.bfloat16, **options)
        check_lora_qkv(i, "cuda", "xab" if options.get("rank") != (8, 0, 16) else "x")


def test_the_same_bits_twice():
    i = made((2, 200), 520, 8, 2, 128, dtype=torch.bfloat16)
    first, second = (lora_qkv_op(i, "cuda", "xab") for _ in range(2))
    assert all(torch.equal(first[name], t) for name, t in second.items())
