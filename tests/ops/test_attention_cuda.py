"""The CUDA C++ kernels of attention, each set by name, on a GPU; what the backend says of itself.

Their logic is tested without one in tests/test_emulator_attention*.py.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_ops import ROWS
from lora_kernels._backends import cuda as backend
from lora_kernels.errors import BackendUnavailableError, InvalidArgumentError
from lora_kernels.ops import attention
from lora_kernels.ops.attention import cuda
from lora_kernels.ops.attention.problem import AttentionProblem

BF16, FP16 = torch.bfloat16, torch.float16
PLAIN = (
    {"B": 1, "S": 143, "Sk": 171, "H": 2, "Hk": 1, "D": 64, "causal": True, "dtype": BF16},
    {"B": 2, "S": 300, "H": 6, "Hk": 2, "D": 128, "causal": True, "dtype": FP16},
    {"B": 1, "S": 257, "Sk": 640, "H": 2, "D": 128, "window": (100, 0), "dtype": BF16},
    {"B": 1, "S": 130, "Sk": 60, "H": 2, "D": 64, "causal": True, "sinks": True, "dtype": BF16},
    {"lengths": (3, 125, 0, 1, 128, 20), "H": 2, "D": 64, "causal": True, "dtype": BF16},
    {"lengths": (3, 130, 0, 1), "key_lengths": (7, 0, 3, 260), "H": 2, "D": 128, "dtype": FP16},
)
MODIFIED = (
    {"B": 1, "S": 143, "H": 2, "D": 64, "dropout_p": 0.25, "seed": 5, "dtype": BF16},
    {"B": 1, "S": 200, "H": 4, "Hk": 1, "D": 128, "softcap": 3.0, "alibi": True, "causal": True,
     "window": (100, 0), "dropout_p": 0.25, "seed": 5, "sinks": True, "dtype": FP16},
    {"B": 1, "S": 70, "H": 2, "D": 64, "scale": -0.3, "dtype": BF16},
)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(bool(backend.device_reason()), reason=backend.device_reason())
@pytest.mark.parametrize(
    ("kernel", "keywords"),
    [
        *(("sm80", k) for k in (*PLAIN, *MODIFIED)),
        *(("sm90", k) for k in PLAIN),
        *(("auto", k) for k in MODIFIED),
    ],
    ids=str,
)
def test_kernels_by_name(kernel, keywords, monkeypatch):
    if kernel == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the sm_90a kernels need compute capability 9.0")
    monkeypatch.setenv("LORA_KERNELS_CUDA_ATTENTION", kernel)
    ROWS["attention"].check(keywords, "cuda")


def problem(**changes: object) -> AttentionProblem:
    shapes = {"B": 1, "S": 64, "H": 4, "D": 64, "dtype": "bfloat16", "device": "cuda"}
    return AttentionProblem.from_shapes(**{**shapes, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu"}, "q is on cpu, the kernels work on cuda tensors"),
        ({"dtype": "float32"}, "for bf16 and fp16"),
        ({"dtype": "float64"}, "for bf16 and fp16"),
        ({"D": 80, "Dv": 80}, "for head sizes 64 and 128"),
        ({"Dv": 128}, "value heads as wide as query heads"),
        ({"mask": "bool"}, "no mask of queries x keys"),
        ({"mask": "additive", "causal": True}, "no mask of queries x keys"),
        ({"S": 2**30 + 1}, "an extent is larger than"),
        ({"H": 65536}, "65536 heads are too many"),
    ],
    ids=str,
)
def test_predicate_says_why_not(changes, reason):
    able, why = cuda.supports(problem(**changes))
    assert not able and reason in why
    assert why.count("no mask of queries x keys") <= 1


@pytest.mark.parametrize(
    ("capability", "changes", "told"),
    [
        ((9, 0), {}, "sm_90a"),
        ((9, 0), {"softcap": 30.0}, "softcap, ALiBi and dropout are not in those of sm_90a"),
        ((8, 9), {}, "compute capability 8.9"),
    ],
    ids=str,
)
def test_which_kernels_run_is_told(capability, changes, told, monkeypatch):
    monkeypatch.setattr(backend, "device_reason", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.delenv("LORA_KERNELS_CUDA_ATTENTION", raising=False)
    able, why = cuda.supports(problem(**changes))
    assert able and told in why
    monkeypatch.setenv("LORA_KERNELS_CUDA_ATTENTION", "sm80")
    assert "by LORA_KERNELS_CUDA_ATTENTION" in cuda.supports(problem(**changes))[1]
    monkeypatch.setenv("LORA_KERNELS_CUDA_ATTENTION", "sm70")
    with pytest.raises(InvalidArgumentError, match="accepted: auto, sm80, sm90"):
        cuda.supports(problem(**changes))


def test_asked_for_by_name_on_the_cpu():
    q = torch.zeros(1, 4, 2, 64, dtype=BF16)
    with pytest.raises(BackendUnavailableError, match="the kernels work on cuda tensors"):
        attention(q, q, q, backend="cuda")
