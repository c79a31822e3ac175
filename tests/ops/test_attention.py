"""attention against the fp64 formula with all scores, on every backend and path."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from lora_kernels.ops import _philox, _registry, attention
from lora_kernels.ops.attention import bands, blocked, capabilities, sdpa
from lora_kernels.testing import (
    BudgetExceededError,
    assert_within_budget,
    attention_inputs,
    attention_op,
    check_attention,
)
from lora_kernels.testing.attention import compare_attention
from tests.ops.attention_cases import CASES, ON_GPU, force_path, needs_library, together

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EVERYTHING = {
    "causal": True, "window": (60, 0), "softcap": 2.0, "sinks": True, "mask": "additive",
    "alibi": True, "dropout_p": 0.2, "seed": 3, "Hk": 2, "Dv": 8, "return_lse": True,
}  # fmt: skip


# A query with all its weight on one key has dq = 0 as the difference of two equal sums, of which
# nothing but rounding is left: no yardstick for it.
NO_CANCELLATION = ("v",)


@pytest.fixture(params=[c for c in capabilities.COLUMNS if c not in ON_GPU])
def column(request, monkeypatch) -> str:
    """A column of the table; `bands` and `blocked` are aten made to take that path if it can."""
    if request.param in ("bands", "blocked"):
        force_path(monkeypatch, request.param)
    return request.param


@pytest.fixture
def backend(column) -> str:
    """Its backend, `sdpa` standing for aten with its own choice of the path."""
    if column == "cpu":
        needs_library()
    return column if column in ("reference", "cpu") else "aten"


PAIRS = [pair for pair in itertools.combinations(CASES, 2) if together(*pair) is not None]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_every_pair_of_features(backend, pair):
    if backend == "cpu" and "float64" in pair:
        pytest.skip(capabilities.TABLE["cpu"]["float64"])
    check_attention(attention_inputs(**together(*pair)), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everything_at_once(backend, dtype, monkeypatch):
    """Over several blocks of rows and of keys, with edges that divide nothing."""
    monkeypatch.setattr(blocked, "_ROWS", 24)
    monkeypatch.setattr(blocked, "_KEYS", 40)
    check_attention(attention_inputs(S=61, Sk=101, dtype=dtype, **EVERYTHING), backend)


@pytest.mark.parametrize("D", [1, 16, 40, 59, 72, 80, 96, 112, 128, 192, 256])
def test_head_dims(backend, D):
    for dtype in (torch.float32, torch.bfloat16):
        check_attention(attention_inputs(S=33, D=D, Hk=1, causal=True, dtype=dtype), backend)
    check_attention(attention_inputs(1, 7, D=D, Dv=128 if D == 192 else D + 3), backend)


@pytest.mark.parametrize(("S", "Sk"), [(1, 1), (1, 300), (300, 1), (97, 129), (257, 257)])
@pytest.mark.parametrize("causal", [False, True])
def test_ragged_lengths(backend, S, Sk, causal):
    for dtype in (torch.float32, torch.bfloat16):
        i = attention_inputs(1, S, 2, 40, Sk=Sk, causal=causal, dtype=dtype)
        check_attention(i, backend, NO_CANCELLATION if Sk == 1 else None)


@pytest.mark.slow
@pytest.mark.parametrize("S", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300])
@pytest.mark.parametrize("window", [None, (0, 0), (17, -1), (-1, 5), (130, 40)])
def test_many_lengths(backend, S, window):
    for Sk, sinks in itertools.product((1, 40, 255, 300), (False, True)):
        alone = (Sk == 1 or window == (0, 0)) and not sinks
        for dtype in (torch.float32, torch.bfloat16):
            i = attention_inputs(
                1, S, 2, 32, Sk=Sk, Hk=1, window=window, sinks=sinks, softcap=4.0, dtype=dtype
            )
            few_keys = alone or dtype == torch.float32
            check_attention(i, backend, NO_CANCELLATION if few_keys else None)


@pytest.mark.parametrize("layout", ["sliced", "strided", "permuted", "misaligned"])
def test_layouts(backend, layout):
    check_attention(attention_inputs(layout=layout, Hk=2), backend)
    check_attention(attention_inputs(layout=layout, mask="additive", sinks=True), backend)


@pytest.mark.parametrize(
    "shape", [(2, 4, 9, 9), (2, 1, 1, 9), (1, 4, 9, 1), (1, 1, 9, 9), (9, 9), (9,), ()], ids=str
)
@pytest.mark.parametrize("mask", ["bool", "additive"])
def test_mask_shapes(backend, mask, shape):
    i = attention_inputs(mask=mask, mask_shape=shape or (1,))
    if not shape:
        i = dataclasses.replace(i, attn_mask=i.attn_mask[0])
    constant = i.attn_mask.shape[-1:] in ((1,), ())  # along the keys: no gradient but rounding
    check_attention(i, backend, ("q", "k", "v") if constant else None)
    if shape == (2, 1, 1, 9):  # as transformers expands it: strides of 0
        wide = i.attn_mask.expand(2, 1, 9, 9)
        check_attention(dataclasses.replace(i, attn_mask=wide), backend, ("q", "k", "v"))


def test_slopes_of_each_sequence(backend):
    slopes = torch.rand(2, 4)
    for arguments in ({}, {"lengths": (4, 9)}):
        i = dataclasses.replace(attention_inputs(**arguments), alibi_slopes=slopes)
        check_attention(i, backend)


def test_keys_of_other_lengths(backend):
    """Also more queries than keys, and no key at all, under the bottom-right causal mask."""
    i = attention_inputs(lengths=(3, 5, 2, 0, 1), key_lengths=(7, 2, 0, 4, 1), causal=True)
    check_attention(i, backend)
    check_attention(dataclasses.replace(i, cu_seqlens=i.cu_seqlens.long()), backend)


@pytest.mark.parametrize("needs", [("q",), ("v",), ("sinks",), ("attn_mask",), ("k", "sinks"), ()])
def test_subsets_of_gradients(backend, needs):
    i = attention_inputs(sinks=True, mask="additive")
    assert set(check_attention(i, backend, needs)) == {"out", "lse", *(f"d{n}" for n in needs)}


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_without_a_key(backend, sinks):
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    mask[1], mask[0, 0, 4] = False, False
    i = dataclasses.replace(attention_inputs(sinks=sinks), attn_mask=mask)
    check_attention(i, backend)
    got = attention_op(i, backend)
    assert not got["out"][1].any() and not got["out"][0, 4].any()
    assert not any(got[name][1].any() for name in ("dq", "dk", "dv"))
    want = i.sinks if sinks else torch.full((4,), -torch.inf)
    assert torch.equal(got["lse"][1], want[:, None].expand(4, 9))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("shape", [{"B": 0}, {"S": 0}, {"Sk": 0}, {"lengths": (0, 0)}])
def test_nothing_to_do(backend, shape, dropout_p):
    got = attention_op(attention_inputs(**shape, Hk=2, dropout_p=dropout_p, seed=1), backend)
    assert not any(t.any() for name, t in got.items() if name != "lse")
    assert (got["lse"] == -torch.inf).all()


def test_extreme_scores(backend):
    i = attention_inputs(sinks=True)
    check_attention(dataclasses.replace(i, q=i.q * 300.0), backend, NO_CANCELLATION)


def test_a_number_that_is_none_is_not_hidden(backend):
    i = attention_inputs()
    i.q[0, 3, 1, 2] = torch.nan
    out = attention(i.q, i.k, i.v, backend=backend)
    assert out[0, 3, 1].isnan().all()
    assert out.isnan().sum() == out.shape[-1]


@pytest.mark.parametrize("seqlens", [(9, 9), (4, 9)])
def test_packed_drops_what_padded_does(backend, seqlens):
    i = attention_inputs(dropout_p=0.4, seed=11, return_lse=False)
    padded = attention(i.q, i.k, i.v, backend=backend, **i.options)
    first, second = seqlens
    q, k, v = (torch.cat([t[0, 9 - first :], t[1]]) for t in (i.q, i.k, i.v))
    cu_seqlens = torch.tensor([0, first, first + second])
    packed = attention(q, k, v, cu_seqlens=cu_seqlens, backend=backend, **i.options)
    assert torch.equal(packed[first:], padded[1])


@pytest.mark.parametrize("span", [(0, 9), (5, 140), (128, 256), (130, 131), (250, 300)])
def test_dropout_of_a_block_is_that_of_the_whole(span):
    i = attention_inputs(2, 21, 3, 8, Sk=300)
    operands = blocked.Operands(
        i.q, i.k, i.v, None, None, None, torch.tensor(2**40 + 9), 1.0, (-1, -1), 0.0, 0.3, 6
    )
    kept = blocked.Block(operands, (4, 17), span).kept()
    for b, h in itertools.product(range(2), range(3)):
        whole = _philox.keep_mask(torch.tensor(2**40 + 9), 21, 300, 0.3, 6 + 3 * b + h)
        assert torch.equal(kept[b, h], whole[4:17, slice(*span)])


def test_seed(backend):
    i = attention_inputs(S=40)
    options = {"dropout_p": 0.5, "backend": backend}
    same = [attention(i.q, i.k, i.v, seed=s, **options) for s in (7, torch.tensor(7))]
    assert torch.equal(*same)
    assert not torch.equal(same[0], attention(i.q, i.k, i.v, seed=8, **options))
    torch.manual_seed(3)
    drawn = attention(i.q, i.k, i.v, **options)
    torch.manual_seed(3)
    assert torch.equal(drawn, attention(i.q, i.k, i.v, **options))
    assert not attention(i.q, i.k, i.v, dropout_p=1.0, backend=backend).any()


def test_against_scaled_dot_product_attention():
    """The same where the two agree, and the stated other alignment where they do not."""
    i = attention_inputs(S=5, Sk=8, Hk=2)
    q, k, v = (t.transpose(1, 2) for t in (i.q, i.k, i.v))

    def sdpa(**options) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options).transpose(1, 2)

    assert torch.equal(attention(i.q, i.k, i.v), sdpa())
    ours = attention(i.q, i.k, i.v, causal=True)
    seen = torch.ones(5, 8, dtype=torch.bool).tril(3)
    exact = attention(*(t.double() for t in (i.q, i.k, i.v)), attn_mask=seen)
    low = sdpa(attn_mask=seen)
    assert_within_budget(ours, exact, low)
    with pytest.raises(BudgetExceededError):
        assert_within_budget(sdpa(is_causal=True), exact, low)


@pytest.mark.parametrize("wrong", ["mask", "sink", "alignment", "seed", "window", "slope", "cap"])
def test_a_planted_fault_is_found(wrong):
    """The op gets the inputs with one thing changed; the oracle does not."""
    arguments = {
        "causal": True, "window": (12, 0), "sinks": True, "mask": "additive", "alibi": True,
        "dropout_p": 0.2, "seed": 3, "softcap": 2.0,
    }  # fmt: skip
    i = attention_inputs(S=20, Sk=27, dtype=torch.bfloat16, **arguments)
    changed = {
        "mask": {"attn_mask": i.attn_mask.roll(1, -1)},
        "sink": {"sinks": i.sinks - 20.0},
        "alignment": {"options": {**i.options, "causal": False, "window": (12, 1)}},
        "seed": {"options": {**i.options, "seed": 4}},
        "window": {"options": {**i.options, "window": (11, 0)}},
        "slope": {"alibi_slopes": i.alibi_slopes * 1.1},
        "cap": {"options": {**i.options, "softcap": 2.2}},
    }[wrong]
    assert check_attention(i, "aten")
    got = attention_op(dataclasses.replace(i, **changed), "aten")
    for only in ("out", "dq", "dk"):
        with pytest.raises(BudgetExceededError):
            compare_attention(i, {"lse": attention_op(i, "aten")["lse"], only: got[only]}, wrong)


@pytest.mark.parametrize("lengths", [None, (40, 0, 1, 150)])
def test_backward_is_bitwise_repeatable(backend, lengths):
    i = attention_inputs(1, 150, 4, 32, Hk=2, lengths=lengths, dtype=torch.bfloat16, causal=True)
    first, second = (attention_op(i, backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_tensor_of_queries_by_keys(monkeypatch):
    """What aten allocates, forward and backward, stays below one head's scores."""
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(blocked, "_ROWS", 32)
    monkeypatch.setattr(blocked, "_KEYS", 32)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.untyped_storage().nbytes())
            return out

    i = attention_inputs(1, 700, 2, 8, causal=True, window=(90, 0), sinks=True, softcap=3.0)
    with Watch():
        attention_op(i, "aten")
    assert 0 < largest < 700 * 700 * 4 / 4


def test_bands_see_their_own_keys_only(monkeypatch):
    """Keys of every call of the kernel; several bands are exact at their edges."""
    monkeypatch.setattr(bands, "_ROWS", 16)
    keys = []
    real = sdpa.forward

    def spy(d):
        keys.append(d.k.shape[1])
        return real(d)

    monkeypatch.setattr(sdpa, "forward", spy)
    for dtype in (torch.float32, torch.bfloat16):
        i = attention_inputs(
            1, 50, Sk=70, Hk=2, causal=True, window=(20, 0), sinks=True, dtype=dtype
        )
        keys.clear()
        check_attention(i, "aten")
        assert keys == [36, 36, 36, 22]
    check_attention(attention_inputs(1, 70, Sk=30, causal=True, sinks=True), "aten")
    check_attention(attention_inputs(2, 50, mask="bool", causal=True), "aten")


def test_blocks_that_nobody_sees_are_skipped(monkeypatch):
    monkeypatch.setattr(blocked, "_ROWS", 16)
    monkeypatch.setattr(blocked, "_KEYS", 16)
    made = 0
    real = blocked.Block.scores

    def counted(*arguments):
        nonlocal made
        made += 1
        return real(*arguments)

    monkeypatch.setattr(blocked.Block, "scores", counted)
    i = attention_inputs(1, 160, 1, 8, causal=True, softcap=3.0)
    attention(i.q, i.k, i.v, **i.options, backend="aten")
    assert made == 55  # the lower triangle of 10 x 10 blocks
    made = 0
    attention(i.q, i.k, i.v, window=(15, 0), softcap=3.0, backend="aten")
    assert made == 19


def test_flops_count_what_is_visible():
    spec = _registry.find("attention")
    problem = spec.problem(B=2, S=5, H=3, D=8, Sk=7, causal=True)
    assert problem.visible() == 3 + 4 + 5 + 6 + 7
    assert spec.flops(problem, "fwd") == 2 * 2 * 3 * 25 * 16
    assert spec.flops(problem, "bwd") == 2.5 * spec.flops(problem, "fwd")
    assert spec.min_bytes(problem, "bwd") > spec.min_bytes(problem, "fwd")
