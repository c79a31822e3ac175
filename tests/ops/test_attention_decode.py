"""attention_decode: the cache as prefill sees it, pages, splits, bad input."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.library import opcheck

import lora_kernels as lk
from lora_kernels._backends import cpu as library_loader
from lora_kernels.errors import BackendUnavailableError, InvalidArgumentError
from lora_kernels.ops import _registry, attention_decode
from lora_kernels.testing import BudgetExceededError
from tests.ops.decode_cases import CASES, check_decode, decode_inputs

_library, _reason = library_loader.load()
if _library is not None and not hasattr(_library, "attention_decode"):
    _library, _reason = None, "lora_kernels._C was built without attention_decode"


@pytest.fixture(params=["reference", "aten", "cpu"])
def backend(request) -> str:
    if request.param == "cpu" and _library is None:
        pytest.skip(_reason)
    return request.param


@pytest.fixture(params=_library.machine_isas() if _library is not None else ["none"])
def isa(request) -> Iterator[str]:
    if _library is None:
        pytest.skip(_reason)
    _library.set_isa_limit(request.param)
    yield request.param
    _library.set_isa_limit("")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("page", [0, 5], ids=["contiguous", "paged"])
def test_is_attention_over_the_keys_of_each_sequence(backend, case, page):
    check_decode(decode_inputs(page=page, **CASES[case]), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "strided", "permuted"])
def test_dtypes_and_layouts(backend, dtype, layout):
    check_decode(decode_inputs(page=4, dtype=dtype, layout=layout, S=3, window=(7, 0)), backend)


@pytest.mark.parametrize("page", [0, 4], ids=["contiguous", "paged"])
def test_decoding_with_a_cache_equals_prefill(backend, page):
    """Token by token against all at once: every query sees the same keys."""
    from lora_kernels.ops import attention

    i = decode_inputs(lengths=(12, 12), S=12, page=page, sinks=True, window=(5, 0), causal=True)
    k, v = (i.sequence(t, b) for t in ("k", "v") for b in range(1))
    whole = attention(
        i.q[:1], k[None], v[None], causal=True, window=(5, 0), sinks=i.options["sinks"],
        backend=backend,
    )  # fmt: skip
    for t in range(12):
        step = attention_decode(
            i.q[:1, t : t + 1], i.k_cache if page else i.k_cache[:1],
            i.v_cache if page else i.v_cache[:1], torch.tensor([t + 1]),
            block_table=i.block_table[:1] if page else None, window=(5, 0),
            sinks=i.options["sinks"], backend=backend,
        )  # fmt: skip
        assert (step[0, 0] - whole[0, t]).abs().max() <= 2.0**-20 * whole.abs().max()


def test_what_lies_past_the_keys_is_not_used(backend):
    for page in (0, 4):
        i = decode_inputs(page=page)
        assert i.k_cache.isnan().any() and i.v_cache.isnan().any()
        assert attention_decode(**i.arguments(), backend=backend).isfinite().all()


@pytest.mark.parametrize("shape", [{"S": 0}, {"lengths": ()}, {"lengths": (0, 0)}])
def test_nothing_to_do(backend, shape):
    i = decode_inputs(**shape)
    out, lse = attention_decode(**i.arguments(), return_lse=True, backend=backend)
    assert out.shape == (len(i.lengths), i.q.shape[1], 4, 16) and not out.any()
    assert (lse == -torch.inf).all()


def test_opcheck(backend):
    i = decode_inputs(page=4, sinks=True, dtype=torch.bfloat16)
    op = torch.ops.lora_kernels.attention_decode.default
    assert op.name() in _registry.find("attention").schemas
    opcheck(
        op,
        (i.q, i.k_cache, i.v_cache, i.cache_seqlens, i.block_table, i.options["sinks"], None, 0.3,
         [-1, 0], 0.0, 0, backend),
    )  # fmt: skip


def test_one_graph_for_all_lengths(backend):
    torch._dynamo.reset()
    compiled = torch.compile(attention_decode, fullgraph=True, backend="aot_eager")
    for lengths in ((3, 7, 0), (4, 8, 1)):
        i = decode_inputs(page=4, lengths=lengths)
        with torch.no_grad():
            got = compiled(**i.arguments(), backend=backend)
        assert torch.equal(got, attention_decode(**i.arguments(), backend=backend))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"q": torch.zeros(3, 4, 16)}, r"q has shape \[3, 4, 16\]"),
    ({"k_cache": torch.zeros(3, 2, 16)}, r"k_cache has shape"),
    ({"cache_seqlens": torch.zeros(3)}, "accepted: an int32 or int64 tensor"),
    ({"cache_seqlens": torch.tensor([1, 2])}, r"cache_seqlens has shape \[2\]; accepted: \[3\]"),
    ({"cache_seqlens": torch.tensor([1, 2, 99])}, "cache_seqlens holds 99; accepted: 0 to 12"),
    ({"cache_seqlens": torch.tensor([1, -1, 2])}, "cache_seqlens holds -1"),
    ({"block_table": torch.zeros(2, 3, dtype=torch.int32)}, r"accepted: \[3, pages\]"),
    ({"block_table": torch.full((3, 3), 77)}, "block_table holds 77; accepted: 0 to"),
    ({"v_cache": torch.zeros(8, 3, 2, 16)}, "accepted: pages as those of k_cache"),
    ({"num_splits": 0}, "num_splits=0"),
    ({"num_splits": 129}, "1 to 128"),
    ({"window": (1,)}, "is not a pair"),
    ({"sinks": torch.zeros(3)}, "one per head"),
    ({"alibi_slopes": torch.zeros(5)}, "alibi_slopes has shape"),
    ({"k_cache": torch.zeros(8, 4, 3, 16), "v_cache": torch.zeros(8, 4, 3, 16)}, "a divisor"),
    ({"q": torch.zeros(3, 2, 4, 16, requires_grad=True)}, "gradient, which is not computed"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_is_refused_in_one_line(backend, change, message):
    arguments = decode_inputs(page=4, lengths=(3, 12, 1)).arguments()
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        attention_decode(**{**arguments, **change}, backend=backend)
    assert "\n" not in str(caught.value)


def test_backends_without_a_cache_say_so():
    arguments = decode_inputs().arguments()
    with pytest.raises(BackendUnavailableError, match="no cuda kernels for a cache"):
        attention_decode(**arguments, backend="cuda")
    with pytest.raises(BackendUnavailableError, match="kernels"):
        attention_decode(**arguments, backend="triton")
    shapes = {"B": 2, "S": 1, "H": 8, "Hk": 2, "D": 64, "Sk": 4096}
    for cache, dtype in itertools.product(("contiguous", "paged"), ("float64", "bfloat16")):
        told = lk.explain("attention", **shapes, cache=cache, dtype=dtype)
        if dtype == "float64":
            assert told["backend"] == "aten" and "the cache as a batch" in told["reason"]
        else:
            assert told["backend"] in ("aten", "cpu")
    with pytest.raises(InvalidArgumentError, match="cache='ring'"):
        lk.explain("attention", **shapes, cache="ring")


def test_out_of_range_is_not_a_number_where_it_cannot_be_refused():
    """What a GPU answers, where reading the values would wait for it."""
    from lora_kernels.ops.attention import decode_aten

    i = decode_inputs(page=4, lengths=(3, 12, 1))
    table = i.block_table.clone()
    table[2, 0] = 10**6
    bad = decode_aten._out_of_range(torch.tensor([-1, 13, 1]), table, i.k_cache)
    assert bad.tolist() == [True, True, True]
    fine = decode_aten._out_of_range(i.cache_seqlens, i.block_table, i.k_cache)
    assert not fine.any()


# Edges of the kernel: 4 rows, 64 keys of a block, 256 of a chunk, vectors of 4, 8 and 16.
SHAPES: dict[str, dict[str, Any]] = {
    "chunks": {"lengths": (600, 256, 1, 0), "D": 64, "H": 6},
    "rows": {"lengths": (65, 300), "S": 5, "H": 6, "D": 24, "Dv": 72},
    "tails": {"lengths": (70, 257), "D": 7, "Dv": 130, "H": 3, "Hk": 3, "S": 2},
    "window": {"lengths": (700, 31), "S": 2, "window": (300, 0), "D": 40, "softcap": 2.0},
    "one element": {"lengths": (5, 3), "D": 1, "Dv": 1, "alibi": True, "sinks": True},
    "tiles": {"lengths": (90, 33, 0), "S": 20, "sinks": True, "alibi": True, "window": (40, 0)},
}  # fmt: skip


@pytest.mark.parametrize("page", [0, 16], ids=["contiguous", "paged"])
@pytest.mark.parametrize("case", SHAPES)
def test_every_isa(isa, case, page):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_decode(decode_inputs(page=page, dtype=dtype, **SHAPES[case]), "cpu")


@pytest.mark.parametrize("splits", [1, 3, 128])
def test_any_number_of_splits(isa, splits):
    i = decode_inputs(lengths=(600, 70, 0), S=2, page=7, sinks=True, window=(400, 0))
    check_decode(i, "cpu", num_splits=splits)


def test_bits_of_a_sequence_depend_on_neither_the_batch_nor_the_threads(isa):
    i = decode_inputs(lengths=(600, 70, 333), S=2, D=40, page=8, dtype=torch.bfloat16)
    arguments = i.arguments()
    whole = attention_decode(**arguments, backend="cpu")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(attention_decode(**arguments, backend="cpu"), whole)
    finally:
        torch.set_num_threads(threads)
    for b in range(3):
        one = {n: arguments[n][b : b + 1] for n in ("q", "cache_seqlens", "block_table")}
        assert torch.equal(attention_decode(**{**arguments, **one}, backend="cpu")[0], whole[b])


def test_one_wrong_value_of_600_is_noticed(monkeypatch):
    from lora_kernels.ops.attention import decode_cpu

    if _library is None:
        pytest.skip(_reason)
    i = decode_inputs(lengths=(600,), D=64, page=8)
    check_decode(i, "cpu")
    right = decode_cpu.attention_decode

    def wrong(q: Any, k_cache: Any, v_cache: Any, *rest: Any) -> Any:
        v_cache = v_cache.clone()
        v_cache[i.block_table[0, 70].item(), 3] += 1.0
        return right(q, k_cache, v_cache, *rest)

    monkeypatch.setattr(decode_cpu, "attention_decode", wrong)
    with pytest.raises(BudgetExceededError):
        check_decode(i, "cpu")
