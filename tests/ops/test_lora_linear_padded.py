"""lora_linear through one padded buffer: against the oracle, and when its sources change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops.lora_linear.padded_block import PaddedBlock, padding
from lora_kernels.ops.lora_linear.padded_linear import padded_lora_linear
from lora_kernels.testing import (
    BudgetExceededError,
    LoraLinearInputs,
    LoraLinearResults,
    assert_within_budget,
    compare,
    lora_linear_inputs,
    lora_linear_op,
    lora_linear_results,
    yardstick,
)
from tests.ops.test_lora_linear_launches import launches

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def block_of(i: LoraLinearInputs) -> PaddedBlock:
    return PaddedBlock(i.weights, i.lora_as, i.lora_bs)


def run(i: LoraLinearInputs, block: PaddedBlock, needs: str = "xabc") -> LoraLinearResults:
    """The producer writes X into the rows itself; the tail holds what it held before: NaN."""

    def leaf(t: Tensor, key: str) -> Tensor:
        return t.detach().clone().requires_grad_(key in needs)

    x = leaf(i.x, "x")
    las, lbs = ([leaf(t, key) for t in ts] for ts, key in ((i.lora_as, "a"), (i.lora_bs, "b")))
    biases = [None if b is None else leaf(b, "c") for b in i.biases]
    rows = block.empty_rows(*i.x.shape[:-1]).fill_(float("nan"))
    rows[..., : block.in_features] = x
    ys = padded_lora_linear(
        rows, block, i.weights, las, lbs, i.scalings,
        biases=biases, dropout_p=i.dropout_p, seed=i.seed,
    )  # fmt: skip
    if needs:
        torch.autograd.backward(ys, i.dys)

    def grads(ts: list[Tensor]) -> list[Tensor]:
        return [t.grad for t in ts if t.grad is not None]

    return LoraLinearResults(
        ys=[y.detach() for y in ys],
        dx=i.x.new_empty(0) if x.grad is None else x.grad,
        dws=[],
        das=grads(las),
        dbs=grads(lbs),
        dbiases=[None if b is None else b.grad for b in biases],
    )


def check(i: LoraLinearInputs, needs: str = "xabc", block: PaddedBlock | None = None) -> None:
    oracle = lora_linear_results(i, torch.float64, needs=needs)
    compare(run(i, block or block_of(i), needs), oracle, yardstick(i, oracle, needs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 24, 100])
@pytest.mark.parametrize("n", [(45,), (33, 20, 8)], ids=str)
def test_ranks(dtype, rank, n):
    check(lora_linear_inputs(37, 70, n, rank, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [0, 1, 129, (2, 3), (2, 1, 5)], ids=str)
def test_rows(dtype, m):
    check(lora_linear_inputs(m, 65, (131, 12), (12, 5), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("n", [(45,), (33, 20)], ids=str)
def test_dropout(dtype, dropout_p, n):
    check(lora_linear_inputs(70, 136, n, 8, dtype, dropout_p=dropout_p))


@pytest.mark.parametrize("scaling", [(0.7, 0.7), (0.5, -3.0), (0.0, 1.0)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_scalings(scaling, dropout_p):
    check(
        lora_linear_inputs(
            30, 40, (20, 24), (4, 6), torch.float32, scaling=scaling, dropout_p=dropout_p
        )
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [(45,), (33, 20)], ids=str)
def test_wider_adapters(dtype, n):
    i = lora_linear_inputs(600, 70, n, 8, dtype, adapter_dtype=torch.float32)
    # A and B are rounded where they are copied in: that is what the oracle has to see.
    rounded = [[t.to(dtype).float() for t in ts] for ts in (i.lora_as, i.lora_bs)]
    i.lora_as[:], i.lora_bs[:] = rounded
    check(i)
    result = run(i, block_of(i))
    assert {t.dtype for t in (*result.das, *result.dbs)} == {torch.float32}


@pytest.mark.parametrize("needs", ["x", "a", "b", "c", "ab", "xa", "xb", "bc", ""])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_subsets_of_gradients(needs, dropout_p):
    check(lora_linear_inputs(33, 40, (20, 24), 4, torch.float32, dropout_p=dropout_p), needs)


def test_masks_are_those_of_the_op():
    i = lora_linear_inputs(40, 64, (16, 8), 4, torch.float64, dropout_p=0.4, bias=False)
    ours, op = run(i, block_of(i)), lora_linear_op(i, "reference", "xab")
    for name, t in op.named().items():
        assert_within_budget(ours.named()[name], t, t, name)


def test_gradient_of_the_rows_is_zero_beside_x():
    i = lora_linear_inputs(9, 40, 20, 4, torch.float64)
    block = block_of(i)
    rows = block.pad(i.x).requires_grad_()
    (y,) = padded_lora_linear(rows, block, i.weights, i.lora_as, i.lora_bs, i.scalings)
    (gradient,) = torch.autograd.grad(y, rows, i.dys[0])
    assert gradient.shape == rows.shape
    assert not gradient[:, 40:].any()


def test_gradcheck():
    i = lora_linear_inputs(5, 7, (4, 3), (2, 3), torch.float64, dropout_p=0.3)
    leaves = [t.requires_grad_() for t in (i.x, *i.lora_as, *i.lora_bs)]

    def function(x, a0, a1, b0, b1):
        block = PaddedBlock(i.weights, (a0, a1), (b0, b1))
        ys = padded_lora_linear(
            block.pad(x), block, i.weights, (a0, a1), (b0, b1), i.scalings,
            biases=i.biases, dropout_p=0.3, seed=4,
        )  # fmt: skip
        return tuple(ys)

    assert torch.autograd.gradcheck(function, leaves)


class Rows:
    """A layer on its own block, as a module would own it."""

    def __init__(self, i: LoraLinearInputs) -> None:
        self.i, self.block = i, block_of(i)

    def __call__(self) -> Tensor:
        i = self.i
        rows = self.block.pad(i.x)
        return padded_lora_linear(rows, self.block, i.weights, i.lora_as, i.lora_bs, [1.0])[0]

    def want(self) -> Tensor:
        i = self.i
        return i.x @ i.weights[0].t() + i.x @ i.lora_as[0].t() @ i.lora_bs[0].t()

    def assert_right(self) -> None:
        want = self.want()
        assert_within_budget(self(), want.double(), want.float())


@pytest.fixture
def layer() -> Rows:
    return Rows(lora_linear_inputs(12, 40, 20, 4, torch.float32, bias=False, scaling=1.0))


def test_nothing_is_copied_while_nothing_changes(layer):
    layer.assert_right()
    i = layer.i
    assert layer.block.refresh(i.weights, i.lora_as, i.lora_bs) == 0


@pytest.mark.parametrize("which", ["weights", "lora_as", "lora_bs"])
def test_a_change_in_place_is_noticed(layer, which):
    layer()
    t = getattr(layer.i, which)[0]
    before = layer.want()
    t.mul_(-2.0)
    layer.assert_right()
    with pytest.raises(BudgetExceededError):
        assert_within_budget(layer(), before.double(), before)
    assert layer.block.refresh(layer.i.weights, layer.i.lora_as, layer.i.lora_bs) == 0


@pytest.mark.parametrize("which", ["weights", "lora_as", "lora_bs"])
def test_another_tensor_is_noticed(layer, which):
    layer()
    tensors = getattr(layer.i, which)
    tensors[0] = torch.randn_like(tensors[0])
    layer.assert_right()


def test_an_optimizer_step_is_noticed(layer):
    i = layer.i
    parameters = [nn.Parameter(t) for t in (i.lora_as[0], i.lora_bs[0])]
    i.lora_as[0], i.lora_bs[0] = parameters
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for _ in range(2):
        layer().square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            layer.assert_right()


def test_a_write_around_the_version_counter_needs_a_word(layer):
    layer()
    layer.i.lora_bs[0].data.mul_(3.0)
    layer.block.invalidate()
    layer.assert_right()


def test_adopted_weights_live_in_the_buffer(layer):
    weight = nn.Parameter(layer.i.weights[0].clone(), requires_grad=False)
    value = weight.clone()
    layer.i.weights[0] = weight
    layer.block.adopt([weight])
    assert torch.equal(weight, value)
    assert weight.untyped_storage().data_ptr() == layer.block.buffer.untyped_storage().data_ptr()
    layer.assert_right()
    with torch.no_grad():
        weight.mul_(2.0)  # written where the product reads
    layer.assert_right()


def test_a_change_between_forward_and_backward_is_an_error(layer):
    i = layer.i
    a, b = (t.clone().requires_grad_() for t in (i.lora_as[0], i.lora_bs[0]))
    block = layer.block
    (y,) = padded_lora_linear(block.pad(i.x), block, i.weights, [a], [b], [1.0])
    with torch.no_grad():
        b.mul_(2.0)
    block.refresh(i.weights, [a], [b])
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        y.sum().backward()


def test_rows_serve_one_call(layer):
    """A second call on the same rows overwrites S, which the first one's backward still needs."""
    i, block = layer.i, layer.block
    b = i.lora_bs[0].clone().requires_grad_()
    rows = block.pad(i.x)
    (first,) = padded_lora_linear(rows, block, i.weights, i.lora_as, [b], [1.0])
    padded_lora_linear(rows, block, i.weights, i.lora_as, [b], [5.0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.sum().backward()


def test_second_derivatives_are_refused(layer):
    i, block = layer.i, layer.block
    a = i.lora_as[0].clone().requires_grad_()
    (y,) = padded_lora_linear(block.pad(i.x), block, i.weights, [a], i.lora_bs, [1.0])
    (da,) = torch.autograd.grad(y.square().sum(), a, create_graph=True)
    with pytest.raises(NotImplementedError):
        da.sum().backward()


def test_autocast_changes_no_product(layer):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer()
    assert y.dtype == torch.float32
    assert torch.equal(y, layer())


@pytest.mark.parametrize(
    ("k", "rank", "dtype", "want"),
    [(64, 16, torch.bfloat16, 16), (64, 5, torch.bfloat16, 8), (65, 5, torch.bfloat16, 7),
     (65, 8, torch.bfloat16, 15), (7, 1, torch.float32, 1), (7, 2, torch.float32, 5),
     (3, 1, torch.float64, 1)],
)  # fmt: skip
def test_rows_are_whole_units_of_16_bytes(k, rank, dtype, want):
    assert padding(k, rank, dtype) == want
    assert (k + want) * dtype.itemsize % 16 == 0


def test_price():
    i = lora_linear_inputs(2, 64, (48, 32), 16, torch.bfloat16)
    assert block_of(i).nbytes == (48 + 32 + 32) * (64 + 32) * 2


@pytest.mark.parametrize(
    ("n", "want_forward", "want_backward"),
    [((32,), 3, 5), ((32, 16, 8), 3, 8)],
    ids=["single", "group"],
)
def test_launches(monkeypatch, n, want_forward, want_backward):
    """Forward: shrink and one product (and, on the CPU alone, zeros in the tail). Backward: one
    product, dX, dA (for a group copied apart), dB of each layer, and zeros beside dX."""
    from lora_kernels.ops.lora_linear import padded_linear, products

    monkeypatch.setattr(products, "on_gpu", lambda t: True)
    i = lora_linear_inputs(24, 40, n, 8, torch.bfloat16, bias=False)
    block = block_of(i)
    leaves = [t.requires_grad_() for t in (*i.lora_as, *i.lora_bs)]
    rows = block.pad(i.x).requires_grad_()
    function = padded_linear._PaddedLoraLinear
    y = function.apply(rows, block, (0.5,) * len(n), 0.0, None, None, *leaves)
    dy = torch.cat(i.dys, 1)
    other = block.pad(i.x)
    with torch.no_grad():
        forward = launches(
            lambda: function.apply(other, block, (0.5,) * len(n), 0.0, None, None, *leaves)
        )
    assert len(forward) == want_forward, forward
    assert y.grad_fn is not None
    with torch.no_grad():
        backward = launches(lambda: y.grad_fn.apply(dy))
    assert len(backward) == want_backward, backward
    assert y.shape == dy.shape


BAD = [
    (lambda i, b: {"rows": i.x}, "rows is [9, 40]"),
    (lambda i, b: {"rows": b.pad(i.x).double()}, "torch.float64"),
    (lambda i, b: {"rows": b.pad(i.x).t().contiguous().t()}, "contiguous=False"),
    (lambda i, b: {"scalings": [1.0, 2.0]}, "one entry for each"),
    (lambda i, b: {"scalings": [float("nan")]}, "scaling"),
    (lambda i, b: {"dropout_p": 2.0}, "dropout_p=2.0"),
    (lambda i, b: {"biases": [torch.zeros(7)]}, "a bias is [7]"),
    (lambda i, b: {"lora_as": [torch.zeros(5, 40)]}, "as the block was made"),
    (lambda i, b: {"weights": [i.weights[0].clone().requires_grad_()]}, "a weight is trained"),
]


@pytest.mark.parametrize(("changes", "says"), BAD, ids=[b[1] for b in BAD])
def test_what_does_not_fit_is_refused(changes, says):
    i = lora_linear_inputs(9, 40, 20, 4, torch.float32)
    block = block_of(i)
    arguments = {
        "rows": block.pad(i.x), "block": block, "weights": i.weights, "lora_as": i.lora_as,
        "lora_bs": i.lora_bs, "scalings": i.scalings,
    } | changes(i, block)  # fmt: skip
    with pytest.raises(InvalidArgumentError) as caught:
        padded_lora_linear(**arguments)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "sources",
    [
        ([], [], []),
        ([torch.zeros(3, 4)], [], []),
        ([torch.zeros(3, 4)], [torch.zeros(2, 5)], [torch.zeros(3, 2)]),
        ([torch.zeros(3, 4)], [torch.zeros(2, 4)], [torch.zeros(4, 2)]),
        ([torch.zeros(3)], [torch.zeros(2, 4)], [torch.zeros(4, 2)]),
        ([torch.zeros(3, 4), torch.zeros(3, 4).half()], [torch.zeros(2, 4)] * 2,
         [torch.zeros(3, 2)] * 2),
    ],
)  # fmt: skip
def test_sources_that_do_not_fit_each_other(sources):
    with pytest.raises(InvalidArgumentError) as caught:
        PaddedBlock(*sources)
    assert "\n" not in str(caught.value)


def test_adopting_other_weights_is_refused(layer):
    with pytest.raises(InvalidArgumentError):
        layer.block.adopt([nn.Parameter(torch.zeros(3, 40), requires_grad=False)])
    with pytest.raises(InvalidArgumentError):
        layer.block.adopt([])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_aten_padded_on_a_gpu(dropout_p):
    i = lora_linear_inputs(
        513, 264, (136, 72), 16, torch.bfloat16, dropout_p=dropout_p, device="cuda"
    )
    check(i)


def test_torch_compile_leaves_it_right():
    """Not traced as one graph, but a compiled model that holds it computes the same."""
    i = lora_linear_inputs(12, 40, 20, 4, torch.float32)
    block = block_of(i)
    b = i.lora_bs[0].clone().requires_grad_()

    def model(x: Tensor) -> Tensor:
        rows = block.pad(x * 2.0)
        return padded_lora_linear(rows, block, i.weights, i.lora_as, [b], [0.5])[0] + 1.0

    want = model(i.x)
    got = torch.compile(model, backend="aot_eager")(i.x)
    assert_within_budget(got, want.detach().double(), want.detach())
    (want_db,), (got_db,) = (torch.autograd.grad(y.sum(), b) for y in (want, got))
    assert_within_budget(got_db, want_db.double(), want_db)
