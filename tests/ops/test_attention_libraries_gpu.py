"""The library kernels of attention's `aten` on a GPU, each held to FlashAttention's rule.

Marked gpu: part of make gpu-check. A library that is absent, or not for this GPU, skips with the
reason that `lk.explain` gives.
"""

from __future__ import annotations

import pytest
import torch

from lora_kernels.ops import attention
from lora_kernels.ops.attention import libraries
from lora_kernels.ops.attention.libraries import decode, here, table
from lora_kernels.ops.attention.problem import AttentionProblem
from lora_kernels.testing import attention_inputs, attention_op, check_attention, moved
from tests.ops.attention_cases import CASES
from tests.ops.decode_cases import CASES as DECODE_CASES
from tests.ops.decode_cases import check_decode, decode_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EXACT = ("flash-attn-4", "flash-attn-3", "flash-attn-2", "flash", "efficient")
FLEX_FEATURES = ("causal", "window", "softcap", "alibi", "varlen", "bool_mask", "lse_gradient")


@pytest.fixture(params=table.ORDER)
def library(request, monkeypatch) -> str:
    return _take(request.param, monkeypatch)


def _take(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    half = "float32" in table.LACKS[name]
    plain = AttentionProblem.from_shapes(
        B=1, S=64, H=2, D=64, dtype=BF16 if half else FP32, device="cuda",
        deterministic=name != "cudnn",
    )  # fmt: skip
    why = libraries.static(name, plain, "bwd", frozenset(), here.device())
    if why:
        pytest.skip(f"{name}: {why}")
    monkeypatch.setenv(libraries.VARIABLE, name)
    return name


def _inputs(library: str, **arguments):
    arguments.setdefault("dtype", BF16 if "float32" in table.LACKS[library] else FP32)
    if library == "cudnn":
        arguments["deterministic"] = False
        if "lengths" in arguments:
            arguments["lengths"] = tuple(2 if n == 1 else n for n in arguments["lengths"])
    return moved(attention_inputs(**arguments), "cuda")


@pytest.mark.parametrize("feature", CASES)
def test_features(library, feature):
    """Every yes of the table."""
    if table.answer(library, feature) is not True:
        pytest.skip(str(table.answer(library, feature)))
    needs = ("q", "k", "v") if feature == "additive_mask" else None
    check_attention(_inputs(library, **CASES[feature]), "aten", needs)


@pytest.mark.parametrize("feature", FLEX_FEATURES)
def test_flex_attention(monkeypatch, feature):
    """Some features alone: each compiles kernels of its own, for seconds."""
    i = _inputs(_take("flex", monkeypatch), D=64, S=140, **CASES[feature])
    check_attention(i, "aten")


@pytest.mark.parametrize("D", [16, 40, 64, 72, 80, 96, 112, 128, 192, 256])
def test_head_sizes_over_several_tiles(library, D):
    unequal = table.answer(library, "causal_unequal") is True
    i = _inputs(
        library, B=1, S=333, H=2, D=D, Sk=401 if unequal else 333, Hk=1, causal=True,
        Dv=128 if D == 192 else D,
    )  # fmt: skip
    sizes = {"B": 1, "S": 333, "H": 2, "D": D, "Dv": 128 if D == 192 else D}
    problem = AttentionProblem.from_shapes(
        **sizes, dtype=i.q.dtype, device="cuda", deterministic=library != "cudnn"
    )
    for direction in ("fwd", "bwd"):
        why = libraries.static(library, problem, direction, frozenset(), here.device())
        if why:
            pytest.skip(why)
    check_attention(i, "aten")


@pytest.mark.parametrize("lengths", [(300, 0, 1, 129), (64, 64, 200)], ids=str)
def test_packed_sequences(library, lengths):
    i = _inputs(library, H=4, D=64, Hk=2, lengths=lengths, causal=True, sinks=True)
    check_attention(i, "aten")


@pytest.mark.parametrize("layout", ["strided", "permuted", "misaligned"])
def test_layouts(library, layout):
    check_attention(_inputs(library, S=150, D=64, Hk=2, layout=layout, causal=True), "aten")


@pytest.mark.parametrize("S", [1, 2, 17, 64, 129, 1024])
def test_lengths(library, S):
    check_attention(_inputs(library, B=1, S=S, Sk=max(S, 2), D=64, Hk=2), "aten")


def test_bitwise_from_run_to_run(library):
    if library not in EXACT:
        pytest.skip("called where no determinism is asked for")
    i = _inputs(library, B=2, S=700, H=8, D=64, Hk=2, causal=True, sinks=True)
    first = attention_op(i, "aten")
    for _ in range(5):
        second = attention_op(i, "aten")
        assert all(torch.equal(t, second[name]) for name, t in first.items())
    assert not torch.are_deterministic_algorithms_enabled()


def test_in_a_graph(library):
    i = _inputs(library, B=1, S=256, H=4, D=64, causal=True)
    options = {"causal": True, "backend": "aten", "deterministic": library != "cudnn"}
    want = attention(i.q, i.k, i.v, **options)  # checks the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(i.q, i.k, i.v, **options)
    graph.replay()
    assert torch.equal(out, want)


@pytest.mark.parametrize("case", DECODE_CASES)
@pytest.mark.parametrize("page", [0, 16, 256])
def test_a_cache(library, case, page):
    if library not in decode.ORDER:
        pytest.skip(f"{library} is not called with a cache")
    i = decode_inputs(page=page, lengths=(700, 0, 33), D=64, dtype=BF16, **DECODE_CASES[case])
    try:
        check_decode(i, "aten", "cuda")
    except libraries.BackendUnavailableError as refused:
        assert "failed its check" not in str(refused)
        pytest.skip(str(refused))


def test_the_choice_without_a_name():
    """Whatever comes first on this GPU; `lk.explain` says which."""
    for arguments in ({"causal": True, "dtype": BF16}, {"dtype": FP32}, {"mask": "bool"}):
        check_attention(moved(attention_inputs(S=300, D=64, Hk=2, **arguments), "cuda"), "aten")
    for page in (0, 16):
        i = decode_inputs(page=page, lengths=(700, 0, 33), D=64, dtype=BF16)
        check_decode(i, "aten", "cuda")
