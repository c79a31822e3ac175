"""aten's library kernels on a GPU, shown on a CPU: our arguments, their conventions, the choice.

The kernels are stand-ins (attention_library_standins.py) with the signatures and the documented
meaning of the real ones. The real FlexAttention runs on a CPU too, in minutes, as it compiles anew
for every function: the tests of it are slow ones.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

import lora_kernels as lk
from benchmarks.gpu_ops import ROWS
from benchmarks.gpu_ops.attention_libraries import PROVIDERS
from benchmarks.peers import UnavailableError
from lora_kernels.errors import BackendUnavailableError, InvalidArgumentError
from lora_kernels.ops import attention
from lora_kernels.ops.attention import aten, capabilities, libraries
from lora_kernels.ops.attention.libraries import (
    decode,
    flash,
    form,
    here,
    proof,
    requested,
    table,
)
from lora_kernels.ops.attention.problem import AttentionProblem
from lora_kernels.testing import attention_inputs, attention_op, check_attention
from tests.ops.attention_cases import CASES, together
from tests.ops.attention_kernel_standins import Log
from tests.ops.attention_library_standins import Pretended, install

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = tuple(table.COLUMNS)
STANDINS = tuple(name for name in NAMES if name != "flex")


@pytest.fixture
def log(monkeypatch) -> Log:
    return install(monkeypatch)


def _take(monkeypatch: pytest.MonkeyPatch, library: str, check: bool = False) -> None:
    """By name; `check`: with its check on the device, which is most of the time it takes here."""
    monkeypatch.setenv(libraries.VARIABLE, library)
    if not check:
        monkeypatch.setattr(proof, "failure", lambda *arguments: "")


def _arguments(library: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """In a dtype that the library has, where the case names none; cuDNN is not deterministic."""
    made = {"dtype": BF16 if "float32" in table.LACKS[library] else FP32, **arguments}
    if library == "cudnn":
        made["deterministic"] = False
        if "lengths" in made:  # it takes no single key
            made["lengths"] = (3, 0, 17, 2)
    return made


def _needs(feature: str) -> tuple[str, ...] | None:
    return ("q", "k", "v") if feature in ("additive_mask",) else None


def test_the_table_is_about_the_features_that_there_are():
    known = {**capabilities.FEATURES, **table.ONCE_MORE}
    assert all(set(lacks) <= set(known) for lacks in table.LACKS.values())
    assert set(table.LACKS) == set(table.COLUMNS) == set(table.TITLES)
    assert set(table.ORDER) | {"flex"} == set(table.COLUMNS)


@pytest.mark.parametrize("feature", CASES)
@pytest.mark.parametrize("library", NAMES)
def test_every_answer_of_the_table(log, monkeypatch, library, feature):
    """A yes runs there, forward and backward, within the budget; a no says why."""
    _take(monkeypatch, library, check=library in ("flash-attn-2", "efficient"))
    i = attention_inputs(**_arguments(library, CASES[feature]))
    answer = table.answer(library, feature)
    if answer is True or feature == "empty":
        check_attention(i, "aten", _needs(feature))
        return
    with pytest.raises(BackendUnavailableError, match=libraries.VARIABLE) as raised:
        check_attention(i, "aten", None)
    assert answer in str(raised.value)


PAIRS = [p for p in itertools.combinations(CASES, 2) if together(*p) is not None]


@pytest.mark.parametrize(
    "library", ["flash-attn-2", "efficient", pytest.param("flex", marks=pytest.mark.slow)]
)
def test_pairs_of_features(log, monkeypatch, library):
    """Whatever the table allows one by one works together."""
    _take(monkeypatch, library)
    for pair in PAIRS:
        if any(table.answer(library, feature) is not True for feature in pair):
            continue
        needs = ("q", "k", "v") if "additive_mask" in pair else None
        check_attention(attention_inputs(**_arguments(library, together(*pair))), "aten", needs)


EVERYTHING = {"causal": True, "window": (9, 0), "sinks": True, "Hk": 2, "Dv": 24, "D": 20}


@pytest.mark.parametrize("library", ["flash-attn-4", "flash-attn-3", "flash-attn-2", "flash"])
@pytest.mark.parametrize("lengths", [None, (30, 0, 1, 17)], ids=["dense", "packed"])
def test_everything_at_once(log, monkeypatch, library, lengths):
    _take(monkeypatch, library)
    more: dict[str, Any] = {} if library == "flash" else {"softcap": 2.0}
    if library == "flash-attn-2":
        more["alibi"] = True
    if library == "flash-attn-4":
        more["return_lse"] = True
    keys = {"lengths": lengths, "key_lengths": (20, 4, 3, 17)} if lengths else {"S": 33, "Sk": 50}
    check_attention(attention_inputs(**keys, **EVERYTHING, **more, dtype=BF16), "aten")


@pytest.mark.parametrize("library", NAMES)
@pytest.mark.parametrize(("S", "Sk"), [(1, 40), (40, 9), (3, 1)])
def test_lengths(log, monkeypatch, library, S, Sk):
    """Also a single query or key, and queries that see nothing under the bottom-right mask."""
    _take(monkeypatch, library)
    causal = table.answer(library, "causal_unequal") is True
    if library == "cudnn" and Sk == 1:
        pytest.skip("cuDNN takes no single key")
    i = attention_inputs(S=S, Sk=Sk, **_arguments(library, {"causal": causal, "Hk": 2}))
    check_attention(i, "aten", ("v",) if Sk == 1 else None)


@pytest.mark.parametrize("layout", ["sliced", "strided", "permuted", "misaligned"])
@pytest.mark.parametrize("library", ["flash", "efficient", "cudnn", "flash-attn-4"])
def test_layouts(log, monkeypatch, library, layout):
    """The kernels read rows of 16 bytes: the stand-ins refuse operands that are not so."""
    _take(monkeypatch, library)
    check_attention(attention_inputs(layout=layout, **_arguments(library, {"Hk": 2})), "aten")


@pytest.mark.parametrize("shape", [(2, 4, 9, 9), (2, 1, 1, 9), (1, 4, 9, 1), (1, 1, 9, 9), (9,)])
@pytest.mark.parametrize("causal", [False, True])
def test_masks_of_every_shape(log, monkeypatch, shape, causal):
    _take(monkeypatch, "efficient")
    for dtype in (FP32, BF16):
        i = attention_inputs(mask="bool", mask_shape=shape, causal=causal, dtype=dtype)
        check_attention(i, "aten")
    wide = i.attn_mask.expand(2, 4, 9, 9)  # strides of 0
    check_attention(dataclasses.replace(i, attn_mask=wide), "aten")


def test_a_row_that_a_mask_and_causal_blind_together(log, monkeypatch):
    """Left padding: the first queries see padding alone, which causal leaves them."""
    _take(monkeypatch, "efficient")
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mask[1, ..., :4] = False
    i = dataclasses.replace(attention_inputs(causal=True, sinks=True), attn_mask=mask)
    check_attention(i, "aten")
    got = attention_op(dataclasses.replace(i, sinks=None), "aten")
    assert (got["lse"][1, :, :4] == -torch.inf).all() and not got["out"][1, :4].any()


FAULTS = ("top-left", "exclusive", "no softcap", "scale", "base 2")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernel_that_means_something_else_is_not_taken(log, fault):
    """Its check fails, the next one's as well, and what remains gives the right result."""
    log.fault = fault
    asks = {
        "top-left": {"causal": True, "Sk": 14}, "exclusive": {"window": (3, 0)},
        "no softcap": {"softcap": 1.5},
    }.get(fault, {})  # fmt: skip
    i = attention_inputs(dtype=BF16, **asks)
    problem = AttentionProblem.from_shapes(
        B=2, S=9, H=4, D=16, Sk=asks.get("Sk", 9), causal=asks.get("causal", False),
        window=asks.get("window"), softcap=asks.get("softcap"), dtype=BF16,
    )  # fmt: skip
    for direction in ("fwd", "bwd"):
        library, why = libraries.choose(problem, direction)
        if fault == "base 2" and direction == "bwd":
            continue  # of which only the forward makes a log-sum-exp
        assert library is None and "failed its check against fp64" in why
    check_attention(i, "aten", ("q", "k", "v"))


def test_a_kernel_that_raises_is_not_taken(log, monkeypatch):
    def broken(*arguments, **keywords):
        raise RuntimeError("no kernel\nfound")

    monkeypatch.setattr(flash, "_forward", broken)
    problem = AttentionProblem.from_shapes(B=1, S=64, H=4, D=64, dtype=BF16)
    assert "RuntimeError: no kernel found" in libraries.lacking("flash", problem, "fwd")
    assert libraries.lacking("flash", problem, "bwd") == ""


def test_the_check_is_made_once_and_not_while_a_graph_is_captured(log, monkeypatch):
    problem = AttentionProblem.from_shapes(B=1, S=64, H=4, D=64, dtype=BF16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "being captured" in libraries.lacking("flash", problem, "fwd")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert libraries.lacking("flash", problem, "fwd") == ""
    calls = len(log.of("flash fwd"))
    other = dataclasses.replace(problem, S=70, Sk=70)
    assert libraries.lacking("flash", other, "fwd") == "" and len(log.of("flash fwd")) == calls
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert libraries.lacking("flash", problem, "fwd") == ""


def test_the_check_leaves_the_generator_alone(log):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    problem = AttentionProblem.from_shapes(B=1, S=64, H=4, D=64, causal=True, dtype=BF16)
    assert not libraries.lacking("flash", problem, "bwd")
    assert torch.equal(torch.rand(3), want)


ORDERS = [
    ((9, 0), {}, "flash-attn-3"), ((10, 0), {}, "flash-attn-4"), ((8, 0), {}, "flash-attn-2"),
    ((9, 0), {"D": 200}, "flash-attn-3"), ((8, 9), {"dtype": "float32"}, "efficient"),
    ((7, 5), {"dtype": "float16"}, "efficient"), ((7, 5), {}, None),
    ((10, 0), {"alibi": True}, "flash-attn-2"), ((9, 0), {"mask": "bool"}, "efficient"),
    ((9, 0), {"dtype": "float64"}, None), ((9, 0), {"dropout_p": 0.1}, None),
    ((9, 0), {"D": 320}, "efficient"), ((10, 0), {"D": 192, "Dv": 128}, "flash-attn-4"),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "asks", "want"), ORDERS, ids=str)
def test_the_order(monkeypatch, arch, asks, want):
    install(monkeypatch, arch)
    monkeypatch.setattr(proof, "failure", lambda *arguments: "")
    problem = AttentionProblem.from_shapes(
        **{"B": 1, "S": 64, "H": 4, "D": 64, "dtype": "bfloat16", **asks}
    )
    assert libraries.choose(problem, "fwd")[0] == want


LIMITS = [
    ("flash-attn-3", (9, 0), {"D": 256}, "bwd", "no deterministic backward"),
    ("flash-attn-3", (8, 0), {}, "fwd", "compute capability 9.x"),
    ("flash-attn-4", (12, 0), {}, "bwd", "compute capability 9.x to 11.x"),
    ("flash-attn-4", (10, 0), {"D": 160}, "fwd", "neither 256 nor 192"),
    ("flash-attn-2", (7, 5), {}, "fwd", "needs compute capability 8.0"),
    ("flash", (9, 0), {"D": 264}, "fwd", "larger than 256"),
    ("cudnn", (8, 0), {"deterministic": False}, "fwd", "9.x and 10.x"),
    ("cudnn", (9, 0), {"deterministic": False, "Sk": 1}, "fwd", "no single key"),
    ("cudnn", (9, 0), {}, "fwd", "not deterministic"),
    ("efficient", (7, 5), {}, "fwd", "bf16 needs"),
    ("flash", (9, 0), {"B": 70000}, "fwd", "beyond 65535"),
    ("cudnn", (9, 0), {"varlen": True, "deterministic": False}, "fwd", "one by one"),
    ("flex", (9, 0), {"D": 512}, "fwd", "larger than 256"),
]  # fmt: skip


@pytest.mark.parametrize(("library", "arch", "asks", "direction", "message"), LIMITS, ids=str)
def test_limits(monkeypatch, library, arch, asks, direction, message):
    install(monkeypatch, arch)
    problem = AttentionProblem.from_shapes(
        **{"B": 1, "S": 64, "H": 4, "D": 64, "dtype": "bfloat16", **asks}
    )
    assert message in libraries.lacking(library, problem, direction)
    hip = libraries.static(library, problem, direction, frozenset(), here.Device(0, arch, True))
    assert hip


def test_an_old_cudnn_is_left_alone(log, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    problem = AttentionProblem.from_shapes(B=1, S=8, H=4, D=64, dtype=BF16, deterministic=False)
    assert "needs cuDNN 91501, this is 91002" in libraries.lacking("cudnn", problem, "fwd")


def test_what_the_tensors_alone_tell(log):
    """Fallbacks to blocks that give the right result: each argument is honoured or refused."""
    wide = attention_inputs(mask="additive", dtype=BF16)
    wide = dataclasses.replace(wide, attn_mask=wide.attn_mask.float())
    ahead = attention_inputs(S=40, Sk=8, window=(4, 12), dtype=BF16)
    for i, feature in ((wide, "wide_mask"), (ahead, "ahead")):
        for library in ("flash", "flash-attn-2", "efficient"):
            assert feature in table.LACKS[library] and feature not in table.LACKS["flex"]
        check_attention(i, "aten", ("q", "k", "v"))
    for scale in (0.0, -0.3):
        i = attention_inputs(causal=True, scale=scale, dtype=BF16)
        check_attention(i, "aten", ("v",) if scale == 0.0 else None)
    assert not [k for k in log.of("flash fwd") if k["scale"] <= 0.0]
    unequal = {"lengths": (40, 9), "key_lengths": (8, 20)}
    check_attention(attention_inputs(window=(4, 25), dtype=BF16, **unequal), "aten")


def test_deterministic_is_passed_on(log, monkeypatch):
    i = attention_inputs(dtype=BF16, causal=True)
    flags = {}
    for library, call in (("flash", "flash bwd"), ("flash-attn-2", "fa2 bwd"),
                          ("flash-attn-3", "fa3 bwd"), ("flash-attn-4", "fa4 bwd")):  # fmt: skip
        _take(monkeypatch, library)
        for asked in (True, False):
            options = {**i.options, "deterministic": asked}
            attention_op(dataclasses.replace(i, options=options), "aten")
            flags[library, asked] = log.of(call)[-1]["deterministic"]
    assert all(got == asked for (_, asked), got in flags.items())
    _take(monkeypatch, "efficient")
    for asked in (True, False):
        options = {**i.options, "deterministic": asked}
        attention_op(dataclasses.replace(i, options=options), "aten")
        assert log.of("efficient bwd")[-1]["num_splits_key"] == (1 if asked else None)


def test_torchs_flag_is_put_back():
    before = torch.are_deterministic_algorithms_enabled()
    assert not before
    with pytest.raises(ZeroDivisionError), flash.deterministic_algorithms(True):
        assert torch.are_deterministic_algorithms_enabled()
        raise ZeroDivisionError
    assert not torch.are_deterministic_algorithms_enabled()
    with flash.deterministic_algorithms(False):
        assert not torch.are_deterministic_algorithms_enabled()
    torch._C._set_deterministic_algorithms(True, warn_only=True)  # torch's own imports inductor
    try:
        with flash.deterministic_algorithms(True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch._C._set_deterministic_algorithms(False, warn_only=False)


def test_packed_sequences_of_fp32_are_taken_one_by_one(log):
    i = attention_inputs(lengths=(9, 0, 1, 30), causal=True, sinks=True)
    check_attention(i, "aten")
    assert len(log.of("efficient bwd")) >= 3
    able, why = libraries.explain(
        AttentionProblem.from_shapes(B=4, S=40, H=4, D=16, varlen=True, causal=True)
    )
    assert able and why.startswith("one sequence after the other: memory-efficient attention")


def test_explain_names_the_kernel_and_why_no_other(log, monkeypatch):
    shapes = {"B": 1, "S": 64, "H": 4, "D": 64, "dtype": "bfloat16", "device": "cuda"}

    def of_aten(**more):
        return lk.explain("attention", **{**shapes, **more})["backends"]["aten"]

    why = of_aten(alibi=True, causal=True)["reason"]
    assert why.startswith("FlashAttention 2, the package flash_attn; flash-attn-3: ")
    assert "flash-attn-3: FlashAttention 3 has no ALiBi" in why
    assert "cudnn: " in why and "flash: " not in why
    blocks = of_aten(dropout_p=0.2)["reason"]
    assert (
        blocks.startswith("blocks of queries x keys") and "efficient: a library's dropout" in blocks
    )
    _take(monkeypatch, "flash-attn-3")
    assert of_aten()["reason"] == table.TITLES["flash-attn-3"]
    refused = of_aten(alibi=True)
    assert not refused["supported"] and "has no ALiBi" in refused["reason"]
    _take(monkeypatch, "blocks")
    assert f"by {libraries.VARIABLE}" in of_aten()["reason"]


def test_explain_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU")
    answer = lk.explain("attention", B=1, S=64, H=4, D=64, dtype="bfloat16", device="cuda")
    assert answer["backend"] == "aten"
    assert "torch sees no GPU here" in answer["backends"]["aten"]["reason"]


def test_the_variable(log, monkeypatch):
    i = attention_inputs(dtype=BF16)
    _take(monkeypatch, "flash-attn-5")
    with pytest.raises(InvalidArgumentError, match=r"flash-attn-5.*accepted: auto, blocks, "):
        attention(i.q, i.k, i.v, backend="aten")
    _take(monkeypatch, "blocks")
    attention(i.q, i.k, i.v, backend="aten")
    assert not log.calls


def test_packages_that_are_absent_or_older(monkeypatch):
    install(monkeypatch)
    from lora_kernels.ops.attention.libraries import flash_attn_2

    problem = AttentionProblem.from_shapes(B=1, S=64, H=4, D=64, dtype=BF16)
    device = Pretended(0, (9, 0))
    monkeypatch.setattr(flash_attn_2, "load", lambda name: (None, f"{name} cannot be imported"))
    assert "cannot be imported" in flash_attn_2.limits(problem, "fwd", device)

    class Older:
        @staticmethod
        def _flash_attn_forward(q, k, v, dropout_p, softmax_scale, causal, window_size): ...

    monkeypatch.setattr(flash_attn_2, "load", lambda name: (Older, ""))
    assert "has no window_size_left" in flash_attn_2.limits(problem, "fwd", device)
    assert "older than 2.7" in flash_attn_2.limits(problem, "bwd", device)
    assert here.load("lora_kernels_has_no_such_module")[0] is None


@pytest.mark.parametrize("provider", PROVIDERS)
def test_gpu_check_runs_each_of_them(log, provider):
    """As a provider of the benchmark: named forward and backward, judged, and put back."""
    row = ROWS["attention"]
    i = row.inputs(**row.small[0])
    row.judge(i)(row.work(i, provider).results(), provider)
    assert requested() == "auto"
    with pytest.raises(UnavailableError, match="dropout"):
        row.work(row.inputs(**row.small[4]), provider)
    cache = row.inputs(**row.small[10])
    if provider.removeprefix("aten-") in decode.ORDER:
        row.judge(cache)(row.work(cache, provider).results(), provider)
    else:
        with pytest.raises(UnavailableError, match="cache"):
            row.work(cache, provider)


@pytest.mark.slow
@pytest.mark.parametrize("asks", [
    {"causal": True}, {"window": (3, 2), "Hk": 2}, {"softcap": 1.5, "alibi": True},
    {"mask": "bool", "sinks": True}, {"return_lse": True}, {"lengths": (3, 0, 17, 1)},
], ids=str)  # fmt: skip
def test_the_real_flex_attention(monkeypatch, asks):
    """Uncompiled on a CPU, where torch runs its backward all the same."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *arguments: None)
    monkeypatch.setattr(aten, "_has_libraries", lambda t: True)
    monkeypatch.setattr(here, "device", lambda: Pretended(0, (9, 0)))
    _take(monkeypatch, "flex")
    check_attention(attention_inputs(**asks), "aten", ("q", "k", "v"))


def test_the_longest_lengths_are_one_copy(log):
    p = form.packing(torch.tensor([0, 3, 3, 9]), torch.tensor([0, 1, 8, 9]))
    assert (p.max_q, p.max_k) == (6, 7) and p.q.dtype == p.k.dtype == torch.int32
