"""attention's Triton kernels in the interpreter, against the fp64 oracle.

Not collected by itself: the interpreter holds for a whole process, so suite_runner.py runs this
file in a process of its own with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from lora_kernels.errors import BackendUnavailableError
from lora_kernels.ops import _registry, attention
from lora_kernels.ops._philox import keep_mask, keep_scale
from lora_kernels.ops.attention import (
    capabilities,
    triton_backward,
    triton_configs,
    triton_forward,
    triton_mask_gradient,
)
from lora_kernels.ops.attention import triton as host
from lora_kernels.testing import (
    BudgetExceededError,
    attention_inputs,
    attention_op,
    check_attention,
    poisoned_empty,
)
from tests.ops.attention_cases import CASES, together
from tests.ops.test_attention import PAIRS

SMALL = triton_configs.Tile(16, 32, 4, 1)
KERNELS = ("forward", "grad_q", "grad_kv", "grad_mask")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EVERYTHING: dict[str, Any] = {
    "causal": True, "window": (18, 0), "softcap": 2.0, "sinks": True, "mask": "additive",
    "alibi": True, "dropout_p": 0.2, "seed": 3, "Hk": 1, "Dv": 24, "return_lse": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _small_tiles():
    """So that a small problem has several tiles, edges and programs."""
    with triton_configs.forced(**dict.fromkeys(KERNELS, SMALL)):
        yield


def check(*sizes: int, needs: tuple[str, ...] | None = None, **arguments: Any) -> None:
    with poisoned_empty():
        check_attention(attention_inputs(*sizes, **arguments), "triton", needs)


def small(**arguments: Any) -> dict[str, Any]:
    """One sequence and two heads where the case does not say."""
    return {"B": 1, "H": 2, **arguments, **({"Hk": 1} if "Hk" in arguments else {})}


FEATURES = [name for name in CASES if capabilities.TABLE["triton"][name] is True]


@pytest.mark.parametrize("feature", FEATURES)
def test_every_yes_of_the_table(feature):
    case = dict(CASES[feature])
    if "mask_shape" in case:
        case["mask_shape"] = (1, 2, 1, 9)
    check(**small(**case))


def test_every_no_of_the_table():
    spec = _registry.find("attention")
    nos = {n: capabilities.TABLE["triton"][n] for n in CASES if n not in FEATURES}
    assert nos
    for feature, why in nos.items():
        with pytest.raises(BackendUnavailableError, match=why):
            attention_op(attention_inputs(**CASES[feature]), "triton")
    problem = spec.problem(B=1, S=8, H=1, D=264)
    assert spec.supports("triton", problem) == (False, "a head of 264 is too large; at most 256")
    assert spec.choose(problem, None)[0] == "aten"


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_everything_at_once(dtype):
    """Several tiles of rows and keys, edges that divide nothing, heads of two parts."""
    check(1, 20, 2, 40, Sk=45, dtype=dtype, **EVERYTHING)


@pytest.mark.parametrize("D", [1, 40, 72, 80, 112])
def test_head_sizes(D):
    check(1, 17, 1, D, causal=True, dtype=FP16 if D % 8 else BF16, Dv=D + 3 if D == 72 else D)


@pytest.mark.slow
@pytest.mark.parametrize("D", [16, 59, 64, 96, 128, 160, 192, 224, 256])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_more_head_sizes(D, dtype):
    check(1, 33, 2, D, Hk=1, Sk=40, causal=True, dtype=dtype, Dv=128 if D == 192 else D)


@pytest.mark.parametrize(
    ("S", "Sk", "window"), [(33, 70, (20, 3)), (40, 9, (-1, 0)), (1, 65, (12, -1))]
)
def test_windows_over_several_tiles(S, Sk, window):
    check(1, S, 1, 16, Sk=Sk, window=window, sinks=True)


@pytest.mark.slow
@pytest.mark.parametrize("S", [1, 15, 16, 17, 33, 64, 70])
@pytest.mark.parametrize("window", [None, (0, 0), (17, -1), (-1, 5), (30, 12), (40, 0)])
def test_many_lengths(S, window):
    for Sk, dtype in ((1, FP32), (31, BF16), (64, FP32), (97, BF16)):
        for softcap in (None, 4.0):  # with and without a loop of unchecked tiles
            few = window == (0, 0) or Sk == 1
            check(
                1, S, 2, 16, Sk=Sk, Hk=1, window=window, softcap=softcap, dtype=dtype,
                needs=("v",) if few else None,
            )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("pair", [p for p in PAIRS if "float64" not in p], ids="-".join)
def test_every_pair_of_features(pair):
    check(**together(*pair))


def test_packed_sequences_of_other_lengths():
    """More queries than keys, no key, no query, and rows of several tiles."""
    i = attention_inputs(
        H=2, Hk=1, lengths=(3, 5, 2, 0, 20), key_lengths=(7, 2, 0, 4, 40), causal=True,
        sinks=True, dropout_p=0.2, seed=9,
    )  # fmt: skip
    slopes = torch.rand(5, 2)
    with poisoned_empty():
        check_attention(dataclasses.replace(i, alibi_slopes=slopes), "triton")


@pytest.mark.parametrize("layout", ["strided", "permuted", "misaligned"])
def test_layouts(layout):
    check(1, 20, 2, 16, layout=layout, Hk=1, mask="additive", dtype=BF16)


def test_rows_far_apart_are_copied():
    """Offsets inside of a tile have 32 bits."""
    i = attention_inputs(1, 3, 1, 16, causal=True)
    far = torch.empty(2 * 2**22 + 16).as_strided((1, 3, 1, 16), (16, 2**22, 16, 1)).copy_(i.q)
    assert host.reachable(i.q) is i.q and host.reachable(far).is_contiguous()
    near, apart = (attention_op(dataclasses.replace(i, q=q), "triton") for q in (i.q, far))
    assert all(torch.equal(t, apart[name]) for name, t in near.items())


@pytest.mark.parametrize("shape", [(2, 1, 1, 40), (1, 2, 20, 1), (1, 1, 1, 1), (20, 40)], ids=str)
@pytest.mark.parametrize("mask", ["bool", "additive"])
def test_broadcast_masks(mask, shape):
    whole = shape[-1] == 1  # along the keys: no gradient but rounding
    batch = shape[0] if len(shape) == 4 else 1
    i = attention_inputs(batch, 20, 2, 16, Sk=40, mask=mask, mask_shape=shape)
    if whole and mask == "bool":
        i.attn_mask.fill_(True)
    with poisoned_empty():
        check_attention(i, "triton", ("q", "k", "v") if whole else None)


def test_rows_without_a_key():
    mask = torch.ones(1, 1, 20, 40, dtype=torch.bool)
    mask[0, 0, 4] = False
    i = dataclasses.replace(attention_inputs(1, 20, 2, 16, Sk=40), attn_mask=mask)
    with poisoned_empty():
        check_attention(i, "triton")
        got = attention_op(i, "triton")
    assert not got["out"][0, 4].any() and not got["dq"][0, 4].any()
    assert (got["lse"][:, :, 4] == -torch.inf).all()


@pytest.mark.parametrize("shape", [{"B": 0}, {"S": 0}, {"Sk": 0}, {"lengths": (0, 0)}])
def test_nothing_to_do(shape):
    with poisoned_empty():
        got = attention_op(attention_inputs(**{"H": 2, **shape}, Hk=1, sinks=False), "triton")
    assert not any(t.any() for name, t in got.items() if name != "lse")
    assert (got["lse"] == -torch.inf).all()


def test_a_number_that_is_none_is_not_hidden():
    i = attention_inputs(1, 20, 2, 16)
    i.q[0, 3, 1, 2] = torch.nan
    out = attention(i.q, i.k, i.v, backend="triton")
    assert out[0, 3, 1].isnan().all()
    assert out.isnan().sum() == out.shape[-1]


def test_extreme_scores():
    i = attention_inputs(1, 9, 2, 16, sinks=True)
    check_attention(dataclasses.replace(i, q=i.q * 300.0), "triton", ("v",))


@pytest.mark.parametrize("keys", [32, 64, 128])
def test_dropout_drops_what_the_reference_drops(keys):
    """Equal scores and V = I: the output is the mask, for every width of a tile."""
    length, p, seed = 150, 0.4, 2**33 + 7
    q = torch.zeros(1, 3, 2, 16)
    v = torch.eye(length, 150)[None, :, None].expand(1, length, 2, 150).contiguous()
    k = torch.zeros(1, length, 2, 16)
    with triton_configs.forced(forward=triton_configs.Tile(16, keys, 4, 1)):
        out = attention(q, k, v, dropout_p=p, seed=seed, backend="triton")
    for h in (0, 1):
        kept = keep_mask(torch.tensor(seed), 3, length, p, h)
        assert torch.equal(out[0, :, h] != 0, kept)
        weight = out[0, :, h][kept]
        assert (weight - keep_scale(p) / length).abs().max() <= weight.max() * 2.0**-20
    assert not attention(q, k, v, dropout_p=1.0, backend="triton").any()


def test_only_what_is_needed_is_computed(monkeypatch):
    seen: list[str] = []

    class Watch:
        def __init__(self, kernel) -> None:
            self.kernel = kernel

        def __getitem__(self, grid):
            seen.append(self.kernel.fn.__name__)
            return self.kernel[grid]

    real = host._kernels()
    watched = real._replace(**{k: Watch(getattr(real, k)) for k in real._fields[:5]})
    monkeypatch.setattr(host, "_kernels", lambda: watched)
    i = attention_inputs(1, 9, 1, 16, sinks=True, mask="additive")
    for needs, ran in (
        (("q",), {"grad_q"}), (("v",), {"grad_kv"}), (("sinks",), set()),
        (("attn_mask",), {"grad_mask"}),
    ):  # fmt: skip
        seen.clear()
        assert set(attention_op(i, "triton", needs)) == {"out", "lse", *(f"d{n}" for n in needs)}
        assert set(seen) == {"forward", "row_terms", *ran}


def test_tiles_that_nobody_sees_are_not_visited(monkeypatch):
    """Every tile visited makes its scores once: counted by the calls of `scores`."""
    counts = {}
    for module in (triton_forward, triton_backward):
        real, name = module.scores, module.__name__.rpartition("_")[2]

        def counted(*arguments, real=real, name=name):
            counts[name] = counts.get(name, 0) + 1
            return real(*arguments)

        monkeypatch.setattr(module, "scores", counted)
    i = attention_inputs(1, 64, 1, 16, window=(15, 0))
    attention_op(i, "triton", ("q",))
    # Row tiles of 16 see their own 16 keys and the 15 before: tiles of 32 keys, 1 1 2 1 2 ... of 2.
    assert counts == {"forward": 5, "backward": 5}
    counts.clear()
    attention_op(i, "triton", ("v",))
    assert counts == {"forward": 5, "backward": 5}
    counts.clear()
    attention(i.q, i.k, i.v, backend="triton")
    assert counts == {"forward": 8}


def test_run_to_run_bitwise():
    i = attention_inputs(
        1, 20, 2, 16, Hk=1, dtype=BF16, causal=True, sinks=True, dropout_p=0.1, seed=1
    )
    first, second = (attention_op(i, "triton") for _ in range(2))
    assert all(torch.equal(t, second[name]) for name, t in first.items())


def test_inputs_are_not_written():
    i = attention_inputs(1, 20, 2, 16, mask="additive", sinks=True, dtype=BF16)
    before = {n: t.clone() for n, t in i.leaves().items()}
    attention_op(i, "triton")
    assert all(torch.equal(t, before[n]) for n, t in i.leaves().items())


# Planted faults: each must break the budget, or the tests above prove nothing.


def _no_rescaling(right):
    return lambda acc, factor, D2: acc if factor.shape[0] != 1 and factor.shape[1] == 1 else right(
        acc, factor, D2
    )  # fmt: skip


def _late_window(right):
    def spoilt(products, rows, keys, S, Sk, left, *rest):
        return right(products, rows, keys, S, Sk, left - 1, *rest)

    return spoilt


def _shifted_mask(right):
    return lambda seed, rows, *rest: right(seed, rows + 1, *rest)


def _no_delta(right):
    return lambda z, t, dp, lse, delta, *rest: right(z, t, dp, lse, delta * 0.0, *rest)


def _no_cap(right):
    return lambda *a: right(*a[:7], False, a[8])


def _short_range(right):
    def spoilt(*arguments):
        low, high = right(*arguments)
        return low, high - 1

    return spoilt


FAULTS = {
    "O is not rescaled": (triton_forward, "scale_parts", _no_rescaling, ()),
    "window off by one in the forward": (triton_forward, "scores", _late_window, ()),
    "window off by one in the backward": (triton_backward, "scores", _late_window, ("q", "k")),
    "mask of the forward shifted by a row": (triton_forward, "kept", _shifted_mask, ()),
    "mask of the backward shifted by a row": (triton_backward, "kept", _shifted_mask, ("v",)),
    "delta left out": (triton_backward, "weight_gradient", _no_delta, ("q", "k")),
    "derivative of the softcap left out": (triton_backward, "weight_gradient", _no_cap, ("q",)),
    "last row left out of dk and dv": (triton_backward, "row_range", _short_range, ("k", "v")),
    "delta left out of db": (
        triton_mask_gradient, "weight_gradient", _no_delta, ("attn_mask",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_noticed(monkeypatch, fault):
    module, name, spoil, needs = FAULTS[fault]
    i = attention_inputs(
        1, 20, 1, 16, Sk=60, window=(25, 40), softcap=2.0, dropout_p=0.3, seed=3, mask="additive",
        mask_shape=(1, 1, 1, 60),
    )  # fmt: skip
    monkeypatch.setattr(module, name, spoil(getattr(module, name)))
    with pytest.raises(BudgetExceededError):
        check_attention(i, "triton", needs)
