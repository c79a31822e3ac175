"""attention_decode: the cache as prefill sees it, pages, splits, bad input."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.library import opcheck

import lora_kernels as lk
from lora_kernels.errors import BackendUnavailableError, InvalidArgumentError
from lora_kernels.ops import _registry, attention_decode
from tests.ops.decode_cases import CASES, check_decode, decode_inputs


@pytest.fixture(params=["reference", "aten"])
def backend(request) -> str:
    return request.param


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
    for cache, dtype in itertools.product(("contiguous", "paged"), ("float32", "bfloat16")):
        told = lk.explain("attention", **shapes, cache=cache, dtype=dtype)
        assert told["backend"] == "aten" and "the cache as a batch" in told["reason"]
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
