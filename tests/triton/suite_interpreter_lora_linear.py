"""lora_linear's Triton kernels in the interpreter, against the fp64 oracle.

Not collected by itself: the interpreter holds for a whole process, so suite_runner.py runs this
file in a process of its own with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from lora_kernels.errors import BackendUnavailableError
from lora_kernels.ops._philox import keep_mask, keep_scale, threshold
from lora_kernels.ops._triton_philox import keep_tile, philox_words
from lora_kernels.ops.lora_linear import (
    configs,
    lora_linear,
    triton_adapter_grads,
    triton_gemm,
    triton_shrink,
)
from lora_kernels.ops.lora_linear import triton as host
from lora_kernels.testing import (
    LAYOUTS,
    BudgetExceededError,
    LoraLinearInputs,
    check_lora_linear,
    compare,
    lora_linear_inputs,
    lora_linear_op,
    lora_linear_results,
    poisoned_empty,
    yardstick,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOW = (torch.bfloat16, torch.float16)


def check(*args, needs: str = "xab", **kwargs) -> LoraLinearInputs:
    inputs = lora_linear_inputs(*args, **kwargs)
    with poisoned_empty():
        check_lora_linear(inputs, "triton", needs)
    return inputs


@pytest.fixture
def launches(monkeypatch) -> Iterator[list[tuple[str, dict]]]:
    """(kernel, constants) of every launch."""
    seen: list[tuple[str, dict]] = []

    class Watch:
        def __init__(self, kernel) -> None:
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **options):
                seen.append((self.kernel.fn.__name__, options))
                return self.kernel[grid](*args, **options)

            return launch

    real = host._kernels()
    watched = real._replace(**{k: Watch(getattr(real, k)) for k in real._fields[:6]})
    monkeypatch.setattr(host, "_kernels", lambda: watched)
    yield seen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("m", "k", "n", "r"), [(1, 1, 1, 1), (33, 70, 45, 12)])
def test_shapes(dtype, dropout_p, m, k, n, r):
    check(m, k, n, r, dtype, dropout_p=dropout_p, needs="xwabc")


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("layout", ["contiguous", "misaligned"])
def test_many_tiles_by_tensor_maps_and_by_pointers(dropout_p, layout):
    check(129, 136, 264, 16, torch.bfloat16, dropout_p=dropout_p, layout=layout)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("m", "k", "n", "r"), [(129, 136, 264, 16), (70, 264, 131, 100), (257, 520, 136, 32)]
)
def test_larger_shapes(dtype, dropout_p, m, k, n, r):
    check(m, k, n, r, dtype, dropout_p=dropout_p, needs="xwabc")


@pytest.mark.parametrize("rank", [1, 3, 8, 16, 24, 40, 64, 130, 256])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_ranks(rank, dropout_p):
    check(37, 72, 40, rank, torch.bfloat16, dropout_p=dropout_p)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_groups_of_different_sizes_and_ranks(dtype):
    check(
        (2, 33), 70, (45, 16, 130), (8, 3, 24), dtype,
        scaling=(0.5, -2.0, 1.25), dropout_p=0.1, needs="xwabc",
    )  # fmt: skip


def test_groups_that_need_several_launches(launches):
    """Two shrinks write their columns of one buffer of partial sums."""
    split = configs.Rows(32, 64, 2, 4, 2)
    with configs.forced(shrink=split, da_pass=configs.Rows(128, 32, 2, 4, 2)):
        check(70, 200, (40, 24, 16), (130, 100, 7), torch.bfloat16)
    names = [name for name, _ in launches]
    forward = launches[: next(i for i, name in enumerate(names) if name.startswith("gemm"))]
    shrinks = [options for name, options in forward if name == "shrink"]
    assert len(shrinks) > 1
    assert all(options["PARTIAL"] for options in shrinks)


@pytest.mark.parametrize(("rank", "apart"), [(16, False), (70, True)])
def test_partial_sums_of_large_ranks_do_not_outgrow_dy(launches, rank, apart):
    check(37, 72, 300, rank, torch.bfloat16, dropout_p=0.2)
    (pass_,) = [options for name, options in launches if name == "dy_pass"]
    assert pass_["NEED_DS"] is not apart
    assert [name for name, _ in launches].count("shrink") == 1 + apart


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_fp32_adapter_over_low_precision_base(dtype, dropout_p):
    inputs = check(
        130, 72, 48, 12, dtype, adapter_dtype=torch.float32, dropout_p=dropout_p, needs="xwabc"
    )
    result = lora_linear_op(inputs, "triton")
    for grad in (result.das[0], result.dbs[0]):
        assert grad.dtype == torch.float32
        assert not torch.equal(grad, grad.to(dtype).float())


def test_fp64_adapter_is_accumulated_in_fp32():
    check(33, 40, 48, 4, torch.float32, adapter_dtype=torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_layouts(layout, dropout_p):
    check((3, 11), 72, (40, 45), (12, 16), torch.bfloat16, layout=layout, dropout_p=dropout_p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_around_a_slice_stays_outside(dtype):
    inputs = lora_linear_inputs(33, 45, 46, 5, dtype).with_layout("sliced", float("nan"))
    with poisoned_empty():
        check_lora_linear(inputs, "triton", "xab")


def test_nan_that_is_dropped_stays_out_of_the_update():
    i = lora_linear_inputs(5, 40, 24, 4, torch.float32, dropout_p=0.5, bias=False)
    mask = keep_mask(torch.tensor(i.seed), 5, 40, 0.5)
    dropped = (~mask[0]).nonzero()[0].item()
    x = i.x.clone()
    x[0, dropped] = float("nan")
    ys, s = host.lora_linear_fwd(
        x, i.weights, i.lora_as, i.lora_bs, [None], [0.7], 0.5, torch.tensor(i.seed)
    )
    assert s.isfinite().all()
    assert ys[0][0].isnan().all()  # the frozen product does see it


@pytest.mark.parametrize("m", [0, 1, 7])
@pytest.mark.parametrize(("k", "n"), [(0, 24), (24, 0), (0, 0)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_extents_of_zero(m, k, n, dropout_p):
    i = lora_linear_inputs(m, 1, 1, 3, torch.bfloat16)
    x = i.x.new_ones(m, k)
    a, b, bias = i.x.new_ones(3, k), i.x.new_ones(n, 3), i.x.new_ones(n)
    w, seed = i.x.new_ones(n, k), torch.tensor(4)
    with poisoned_empty():
        (y,), s = host.lora_linear_fwd(x, [w], [a], [b], [bias], [0.5], dropout_p, seed)
        dy = torch.ones_like(y)
        dx, (da,), (db,) = host.lora_linear_bwd(
            [dy], x, [w], [a], [b], s, [0.5], dropout_p, seed, True, True, True
        )
    assert y.shape == (m, n)
    assert torch.equal(s, s.new_zeros(m, 3) if k == 0 else s)
    for result, shape in ((dx, (m, k)), (da, (3, k)), (db, (n, 3))):
        assert result.shape == shape
        assert result.isfinite().all()
    if k == 0:
        assert torch.equal(y, torch.ones_like(y)), "the bias alone"
        assert not db.any()
    if n == 0 or m == 0:
        assert not dx.any()
        assert not da.any()


def test_rows_more_than_two_billion_elements_apart(monkeypatch):
    """Of the 4 GiB only the touched pages exist, unless the interpreter copies them back."""
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    wide, k = 2**31 + 64, 40
    i = lora_linear_inputs(2, k, 24, 4, torch.bfloat16, dropout_p=0.2)
    x = torch.empty(wide + k, dtype=torch.bfloat16).as_strided((2, k), (wide, 1)).copy_(i.x)
    seed = torch.tensor(i.seed)
    results = []
    for source in (i.x, x):
        ys, s = host.lora_linear_fwd(
            source, i.weights, i.lora_as, i.lora_bs, i.biases, i.scalings, 0.2, seed
        )
        _, das, _ = host.lora_linear_bwd(
            i.dys, source, i.weights, i.lora_as, i.lora_bs, s, i.scalings, 0.2, seed,
            False, True, False,
        )  # fmt: skip
        results.append((ys[0], s, das[0]))
    assert all(torch.equal(near, apart) for near, apart in zip(*results, strict=True))


@pytest.mark.parametrize("seed", [0, 2**31 + 5, 2**62 + 12345])
@pytest.mark.parametrize("columns", [32, 64, 128, 256])
def test_mask_is_that_of_the_other_backends(seed, columns):
    rows, first = 32, 0 if columns == 32 else columns % 128 or 128
    out = torch.zeros(rows, columns, dtype=torch.int8)
    _store_mask[(1,)](out, torch.tensor(seed), 7, first, 3, threshold(0.4), rows, columns)
    want = keep_mask(torch.tensor(seed), 7 + rows, first + columns, 0.4, 3)[7:, first:]
    assert torch.equal(out != 0, want)


@pytest.mark.parametrize("first", [0, 32, 64, 96, 160])
def test_mask_of_one_word_is_a_part_of_the_mask(first):
    out = torch.zeros(16, 32, dtype=torch.int8)
    _store_mask[(1,)](out, torch.tensor(99), 0, first, 0, threshold(0.4), 16, 32)
    assert torch.equal(out != 0, keep_mask(torch.tensor(99), 16, 300, 0.4)[:, first : first + 32])


def test_known_answers_of_the_generator():
    out = torch.zeros(4, 16, dtype=torch.int64)
    _store_words[(1,)](out)
    # The authors' vector for counter 0 and key 0 after seven rounds.
    want = (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    assert tuple(int(word) & 0xFFFFFFFF for word in out[:, 0]) == want


@triton.jit
def _store_mask(out, seed_ptr, row, first, stream, limit, R: tl.constexpr, C: tl.constexpr):
    keep = keep_tile(tl.load(seed_ptr), row + tl.arange(0, R), first, stream, limit, R, C)
    index = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(out + index, keep.to(tl.int8))


@triton.jit
def _store_words(out):
    counter = (tl.arange(0, 16) * 0).to(tl.uint32)
    zero = tl.zeros((), tl.int64)
    w0, w1, w2, w3 = philox_words(zero, counter, counter, 0)
    lane = tl.arange(0, 16)
    tl.store(out + lane, w0.to(tl.int64))
    tl.store(out + 16 + lane, w1.to(tl.int64))
    tl.store(out + 32 + lane, w2.to(tl.int64))
    tl.store(out + 48 + lane, w3.to(tl.int64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_of_the_op_draws_the_documented_mask(dtype):
    """W = 0 and A = B = I: the output of ones is the mask, and so are dX and dA."""
    m, k, p, seed = 20, 136, 0.3, 77
    eye, zero, ones = torch.eye(k, dtype=dtype), torch.zeros(k, k, dtype=dtype), torch.ones(m, k)
    ones = ones.to(dtype)
    i = LoraLinearInputs(
        x=ones, weights=[zero, zero], lora_as=[eye, eye], lora_bs=[eye, eye],
        biases=[None, None], scalings=[1.0, 1.0], dropout_p=p, seed=seed, dys=[ones, ones],
    )  # fmt: skip
    result = lora_linear_op(i, "triton", "xab")
    masks = [keep_mask(torch.tensor(seed), m, k, p, g) for g in (0, 1)]
    kept = torch.tensor(keep_scale(p)).to(dtype)
    for g in (0, 1):
        assert torch.equal(result.ys[g], masks[g].to(dtype) * kept)
        assert torch.equal(result.das[g] != 0, masks[g].any(0).expand(k, k))
    assert torch.equal(result.dx != 0, masks[0] | masks[1])


def test_dropping_everything_leaves_the_frozen_layer():
    i = lora_linear_inputs(33, 40, 50, 8, torch.bfloat16, dropout_p=1.0)
    plain = replace(i, scalings=[0.0], dropout_p=0.0)
    result = lora_linear_op(i, "triton")
    assert torch.equal(result.ys[0], lora_linear_op(plain, "triton").ys[0])
    assert not result.das[0].any()
    assert not result.dbs[0].any()


SM_90 = configs.target("sm_90", 132)
TILES = [
    (tile, dropout_p)
    for tile in configs.gemm_table(2, SM_90)
    for dropout_p in (0.0, 0.3)
    if not configs.invalid(tile, SM_90, 2, 40, dropout=dropout_p > 0)
]


@pytest.mark.parametrize(("tile", "dropout_p"), TILES, ids=str)
def test_every_tile_of_the_gemm(tile, dropout_p, launches, monkeypatch):
    """On two multiprocessors, so that a persistent program meets several tiles."""
    monkeypatch.setattr(host, "_target", lambda *args: configs.target("sm_90", 2))
    with configs.forced(gemm=tile):
        check(70, 72, 264, 40, torch.bfloat16, dropout_p=dropout_p)
    name = "gemm_descriptor" if tile.descriptor else "gemm_pointer"
    assert {n for n, _ in launches if n.startswith("gemm")} == {name}


@pytest.mark.parametrize("tile", configs._FP32, ids=str)
def test_every_tile_of_the_fp32_gemm(tile):
    with configs.forced(gemm=tile):
        check(70, 72, (50, 20), (8, 40), torch.float32, dropout_p=0.0 if tile.lora_last else 0.3)


@pytest.mark.parametrize("exact", [False, True])
def test_scale_before_and_after_the_product(exact):
    """fp16 scales the finished update: S times a large scaling leaves the range of fp16."""
    dtype = torch.float16 if exact else torch.bfloat16
    i = lora_linear_inputs(16, 64, 48, 4, dtype, scaling=3000.0, bias=False)
    i = replace(i, x=64 * i.x, weights=[64 * w for w in i.weights])
    (y,), s = host.lora_linear_fwd(
        i.x, i.weights, i.lora_as, i.lora_bs, [None], i.scalings, 0.0, None
    )
    assert (3000.0 * s.double()).abs().max() > 65504
    assert y.isfinite().all()


def test_splits_of_the_walks_change_rounding_only(launches):
    rows = {
        "shrink": lambda n: configs.Rows(32, 64, n, 4, 2),
        "dy_pass": lambda n: configs.Rows(64, 32, n, 4, 2),
        "da_pass": lambda n: configs.Rows(128, 32, n, 4, 2),
    }
    for splits in (1, 3):
        with configs.forced(**{name: make(splits) for name, make in rows.items()}):
            check(131, 200, (72, 40), (8, 5), torch.bfloat16, dropout_p=0.0)
    assert {options["PARTIAL"] for name, options in launches if name == "shrink"} == {False, True}


def test_run_to_run_bitwise():
    i = lora_linear_inputs(70, 136, (72, 40), (16, 5), torch.bfloat16, dropout_p=0.1)
    first, second = (lora_linear_op(i, "triton").named() for _ in range(2))
    assert all(torch.equal(t, second[name]) for name, t in first.items())


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("slack", [0, 3])
def test_given_s_and_ds_take_the_place_of_their_passes(dtype, slack, launches):
    """S of the kernels gives the same bits, without A; dS goes without B. Both may be slices."""
    i = lora_linear_inputs(37, 72, (40, 45), (16, 3), dtype, scaling=(0.7, -1.3))
    ys, s = host.lora_linear_fwd(
        i.x, i.weights, i.lora_as, i.lora_bs, i.biases, i.scalings, 0.0, None
    )
    ds = torch.cat([c * (d @ b) for d, b, c in zip(i.dys, i.lora_bs, i.scalings, strict=True)], 1)

    def inside(t: torch.Tensor) -> torch.Tensor:
        wide = t.new_full((t.shape[0], t.shape[1] + slack), float("nan"))
        return wide[:, slack:].copy_(t)

    nan = [[torch.full_like(t, float("nan")) for t in ts] for ts in (i.lora_as, i.lora_bs)]
    launches.clear()
    with poisoned_empty():
        again, _ = host.lora_linear_fwd(
            i.x, i.weights, nan[0], i.lora_bs, i.biases, i.scalings, 0.0, None, inside(s)
        )
    assert [name.partition("_")[0] for name, _ in launches] == ["gemm", "gemm"]
    assert all(torch.equal(p, q) for p, q in zip(again, ys, strict=True))
    oracle = lora_linear_results(i, torch.float64, needs="xab")
    low = yardstick(i, oracle, "xab")
    for need_db in (False, True):
        launches.clear()
        with poisoned_empty():
            dx, das, dbs = host.lora_linear_bwd(
                i.dys, i.x, i.weights, i.lora_as, nan[1], inside(s), i.scalings, 0.0, None,
                True, True, need_db, inside(ds),
            )  # fmt: skip
        assert [name for name, _ in launches].count("dy_pass") == 2 * need_db
        compare(replace(oracle, ys=[], dws=[], dbiases=[], dx=dx, das=das, dbs=dbs), oracle, low)


@pytest.mark.parametrize("needs", ["", "x", "a", "b", "ab", "xb", "wc"])
def test_only_what_is_needed_is_computed(needs, launches):
    check(33, 40, (50, 18), (8, 3), torch.float32, dropout_p=0.2, needs=needs)
    passes = [name for name, _ in launches]
    assert ("da_pass" in passes) == ("a" in needs)
    assert ("dy_pass" in passes) == bool(set(needs) & set("xab"))
    assert passes.count("gemm_pointer") + passes.count("gemm_descriptor") == 2 + ("x" in needs)


def test_inputs_are_not_written():
    i = lora_linear_inputs(33, 40, (50, 18), (8, 3), torch.bfloat16, dropout_p=0.2)
    tensors = [i.x, *i.weights, *i.lora_as, *i.lora_bs, *i.dys]
    before = [t.clone() for t in tensors]
    lora_linear_op(i, "triton", "xab")
    assert all(torch.equal(t, old) for t, old in zip(tensors, before, strict=True))


def test_weight_of_another_dtype_under_autocast():
    i = lora_linear_inputs(9, 40, 24, 4, torch.float32)
    args = (i.x, i.weights[0], i.lora_as[0], i.lora_bs[0], 0.7)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(*args, backend="triton")
    low = lora_linear(*(t.bfloat16() for t in args[:2]), *args[2:], backend="triton")
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, low)


def test_refusals_name_the_reason():
    cases: list[tuple[Callable[[], LoraLinearInputs], str]] = [
        (lambda: lora_linear_inputs(3, 8, 8, 2, torch.float64), "dtype torch.float64"),
        (lambda: lora_linear_inputs(3, 8, 8, 257), "rank 257 is too large; at most 256"),
        (lambda: lora_linear_inputs(3, 8, (8,) * 9, 2), "a group of 9 is too large; at most 4"),
    ]
    for make, why in cases:
        with pytest.raises(BackendUnavailableError, match=why) as caught:
            lora_linear_op(make(), "triton", "")
        assert "\n" not in str(caught.value)


# Planted faults: each must break the budget, or the tests above prove nothing.


def _no_update(right):
    return lambda acc, *rest: acc


def _shifted_mask(right):
    return lambda seed, rows, *rest: right(seed, rows + 1, *rest)


def _no_scale(right):
    return lambda u, m, r, M, rank, um, scale, SCALE, dtype: right(
        u, m, r, M, rank, um, scale, False, dtype
    )


def _one_partial_lost(right):
    return lambda sums: right([(part[:-1], out, scale) for part, out, scale in sums])


def _last_row_lost(right):
    return lambda ds, m, last, *rest: right(ds, m, last - 1, *rest)


FAULTS = {
    "update left out": (triton_gemm, "_update", _no_update, 0.0),
    "mask of dX shifted by a row": (triton_gemm, "keep_tile", _shifted_mask, 0.3),
    "mask of S shifted by a row": (triton_shrink, "keep_tile", _shifted_mask, 0.3),
    "mask of dA shifted by a row": (triton_adapter_grads, "keep_tile", _shifted_mask, 0.3),
    "update not scaled": (triton_gemm, "_u_tile", _no_scale, 0.0),
    "a partial sum left out": (host, "_sum_partials", _one_partial_lost, 0.0),
    "last row left out of dA": (triton_adapter_grads, "_ds_tile", _last_row_lost, 0.0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_noticed(monkeypatch, fault):
    module, name, spoil, dropout_p = FAULTS[fault]
    inputs = lora_linear_inputs(33, 72, 48, 40, torch.bfloat16, dropout_p=dropout_p)
    check_lora_linear(inputs, "triton", "xab")
    monkeypatch.setattr(module, name, spoil(getattr(module, name)))
    with pytest.raises(BudgetExceededError):
        check_lora_linear(inputs, "triton", "xab")


def test_the_interpreter_alone_is_wrong_in_bf16():
    """Why the launches correct it: a version that no longer needs that makes this test fail."""
    i = lora_linear_inputs(33, 72, 48, 8, torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "_arithmetic", nullcontext)
        with pytest.raises((BudgetExceededError, InterpreterError)):
            check_lora_linear(i, "triton", "")
    check_lora_linear(i, "triton", "")
