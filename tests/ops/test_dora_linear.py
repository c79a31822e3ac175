"""dora_linear: outputs and gradients, row norms, contracts, errors, PEFT's convention."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

import lora_kernels as lk
from lora_kernels.errors import BackendUnavailableError, InvalidArgumentError
from lora_kernels.ops import _registry, dora_linear
from lora_kernels.ops.dora_linear import row_norm
from lora_kernels.testing import (
    BudgetExceededError,
    assert_within_budget,
    check_dora_linear,
    dora_linear_inputs,
    dora_linear_op,
    dora_linear_results,
)
from lora_kernels.testing.dora_linear import materialised

SPEC = _registry.find("dora_linear")
FWD = torch.ops.lora_kernels.dora_linear_fwd.default
BWD = torch.ops.lora_kernels.dora_linear_bwd.default
BACKENDS = [*SPEC.backends, None]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_outputs_and_gradients(name, dtype, dropout_p):
    check_dora_linear(dora_linear_inputs((3, 5), 20, 33, 4, dtype, dropout_p=dropout_p), name)
    check_dora_linear(
        dora_linear_inputs(129, 70, 40, 5, dtype, dropout_p=dropout_p, bias=False), name
    )


@pytest.mark.parametrize("rank", [1, 3, 16, 100])
@pytest.mark.parametrize("rows", [1, 127, 600])
def test_ranks_and_rows(rows, rank):
    check_dora_linear(dora_linear_inputs(rows, 48, 21, rank), None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_fp32_adapter_over_a_low_base(dtype, dropout_p):
    i = dora_linear_inputs(64, 48, 40, 8, dtype, adapter_dtype=torch.float32, dropout_p=dropout_p)
    got = dora_linear_op(i, None)
    check_dora_linear(i, None)
    assert got["dlora_a"].dtype == got["dmagnitude"].dtype == torch.float32
    assert got["y"].dtype == dtype


@pytest.mark.parametrize("layout", ["sliced", "strided", "permuted", "misaligned"])
def test_layouts(layout):
    i = dora_linear_inputs((2, 9), 24, 30, 3, dropout_p=0.2)
    want, got = dora_linear_op(i, None), dora_linear_op(i.with_layout(layout), None)
    for name, t in want.items():
        assert_within_budget(got[name], dora_linear_results(i, torch.float64)[name], t, name)


@pytest.mark.parametrize("needs", ["", "x", "m", "ab", "c", "xm", "w"])
@pytest.mark.parametrize("name", SPEC.backends)
def test_gradients_that_are_asked_for(name, needs):
    margins = check_dora_linear(dora_linear_inputs(9, dropout_p=0.2), name, needs)
    assert len(margins) == 1 + len(needs)


def test_without_a_trained_magnitude_no_second_output_is_kept():
    i = dora_linear_inputs(9)
    o = i.operands()
    for trains in (False, True):
        y = dora_linear(
            o["x"].requires_grad_(), o["weight"], o["lora_a"], o["lora_b"],
            o["magnitude"].detach().requires_grad_(trains), 0.7,
        )  # fmt: skip
        saved = y.grad_fn.next_functions[0][0].saved_tensors
        assert any(t is not None and t.shape == (9, 33) for t in saved) == trains


@pytest.mark.parametrize("name", BACKENDS)
def test_is_the_layer_with_its_weight_written_out(name):
    i = dora_linear_inputs(50, 40, 30, 6)
    got = dora_linear_op(i, name, needs="")["y"]
    assert_within_budget(got, materialised(i), dora_linear_results(i, torch.float32, "")["y"])


@pytest.mark.parametrize("shape", [(33, 20, 4), (1500, 12, 3), (1, 1, 1), (20, 500, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_row_norm(shape, dtype):
    n, k, r = shape
    w, a, b = torch.randn(n, k).to(dtype), torch.randn(r, k).to(dtype), torch.randn(n, r).to(dtype)
    want = (w.double() + 0.3 * b.double() @ a.double()).norm(dim=1)
    wide = torch.promote_types(dtype, torch.float32)
    low = (w.to(wide) + 0.3 * b.to(wide) @ a.to(wide)).norm(dim=1)
    got = row_norm(w, a, b, 0.3)
    assert got.dtype == wide
    assert_within_budget(got, want, low)


def test_row_norm_where_the_update_cancels_the_row():
    """The expanded square would be rounding noise; those rows are summed directly."""
    w = torch.randn(40, 64)
    a, b = torch.randn(64, 64), torch.zeros(40, 64)
    b[::3] = torch.linalg.solve(a.double().t(), -w.double()[::3].t()).t().float()
    want = (w.double() + b.double() @ a.double()).norm(dim=1)
    assert (want[::3] < 1e-3 * w.norm(dim=1)[::3]).all()
    assert_within_budget(row_norm(w, a, b, 1.0), want, (w + b @ a).norm(dim=1))


def test_row_without_direction_counts_as_norm_one():
    w, a, b = torch.zeros(3, 5), torch.randn(2, 5), torch.zeros(3, 2)
    for name in SPEC.backends:
        y = dora_linear(torch.randn(4, 5), w, a, b, torch.ones(3), 1.0, backend=name)
        assert torch.equal(y, torch.zeros(4, 3))


def test_norms_are_constants_for_the_gradient():
    """Control: gradients of A and B with the norm differentiated are others."""
    i = dora_linear_inputs(9, dtype=torch.float64)
    o = {n: t.detach().requires_grad_() for n, t in i.operands().items()}
    v = o["weight"] + 0.7 * o["lora_b"] @ o["lora_a"]
    y = o["x"] @ (v * (o["magnitude"] / v.norm(dim=1))[:, None]).t() + o["bias"]
    y.backward(i.plain.dys[0])
    got = dora_linear_op(i, None)
    with pytest.raises(BudgetExceededError):
        assert_within_budget(got["dlora_b"], o["lora_b"].grad, o["lora_b"].grad)
    assert_within_budget(got["dmagnitude"], o["magnitude"].grad, got["dmagnitude"])


def test_dropped_magnitude_is_noticed():
    i = dora_linear_inputs(9)
    o = i.operands()
    wrong = lk.ops.lora_linear(o["x"], o["weight"], o["lora_a"], o["lora_b"], 0.7, bias=o["bias"])
    low = dora_linear_results(i, torch.float32, "")["y"]
    with pytest.raises(BudgetExceededError):
        assert_within_budget(wrong, dora_linear_results(i, torch.float64, "")["y"], low)


def test_drops_what_lora_linear_drops():
    x, a = torch.ones(50, 40), torch.eye(40)
    w, b = torch.zeros(40, 40), torch.eye(40)
    y = lk.ops.lora_linear(x, w, a, b, 1.0, dropout_p=0.4, seed=5)
    # |V| = 1 by rows, W = 0: what comes out is what was kept.
    assert torch.equal(y, dora_linear(x, w, a, b, torch.ones(40), 1.0, dropout_p=0.4, seed=5))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("name", SPEC.backends)
def test_gradcheck(name, dropout_p):
    """A and B do not move the norm here: B A is zero and stays orthogonal to W to first order."""
    i = dora_linear_inputs((2, 3), 7, 5, 2, torch.float64, dropout_p=dropout_p)
    o = {n: t.detach() for n, t in i.operands().items()}

    def op(x, magnitude, bias):
        return dora_linear(
            x, o["weight"], o["lora_a"], o["lora_b"], magnitude, 0.7,
            bias=bias, dropout_p=dropout_p, seed=3, backend=name,
        )  # fmt: skip

    leaves = tuple(o[n].clone().requires_grad_() for n in ("x", "magnitude", "bias"))
    assert torch.autograd.gradcheck(op, leaves)


def fwd_args(i, name):
    o = i.operands()
    seed = torch.tensor(3) if i.plain.dropout_p else None
    return (*(o[n] for n in ("x", "weight", "lora_a", "lora_b", "magnitude")), o.get("bias"),
            0.7, i.plain.dropout_p, seed, True, name)  # fmt: skip


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("name", SPEC.backends)
def test_opcheck(name, dropout_p, layout):
    i = dora_linear_inputs(9, dropout_p=dropout_p).with_layout(layout)
    args = fwd_args(i, name)
    opcheck(FWD, args)
    _, p, s, norm = FWD(*args)
    x, w, a, b, m, _, scaling, p_drop, seed, _, _ = args
    opcheck(
        BWD,
        (i.plain.dys[0], x, w, a, b, m, p, s, norm, scaling, p_drop, seed, *[True] * 5, name),
    )
    assert SPEC.schemas == (FWD.name(), BWD.name())


def test_compiles_as_one_graph_for_any_number_of_rows():
    i = dora_linear_inputs(9)
    o = {n: t.detach().requires_grad_() for n, t in i.operands().items()}

    def step(x):
        return dora_linear(
            x, o["weight"], o["lora_a"], o["lora_b"], o["magnitude"], 0.7, bias=o["bias"]
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (9, 5, 130):
        x = torch.randn(rows, 20)
        assert torch.equal(compiled(x), step(x))
    compiled(torch.randn(3, 20)).sum().backward()
    assert o["magnitude"].grad.abs().sum() > 0


def test_no_rows_and_autocast():
    i = dora_linear_inputs(9)
    o = i.operands()
    arguments = [o[n] for n in ("weight", "lora_a", "lora_b", "magnitude")]
    x = torch.randn(2, 0, 20, requires_grad=True)
    y = dora_linear(x, *arguments, 0.7)
    y.sum().backward()
    assert y.shape == (2, 0, 33) and x.grad.shape == x.shape
    with torch.autocast("cpu", torch.bfloat16):
        y = dora_linear(o["x"], *arguments, 0.7)
    assert y.dtype == torch.bfloat16


def test_second_derivative_is_refused():
    i = dora_linear_inputs(4)
    o = {n: t.detach().requires_grad_() for n, t in i.operands().items()}
    y = dora_linear(o["x"], o["weight"], o["lora_a"], o["lora_b"], o["magnitude"], 0.7)
    (dx,) = torch.autograd.grad(y.square().sum(), o["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"x": [1.0]}, "x is a list"),
        ({"magnitude": torch.ones(4)}, "magnitude has shape [4]; accepted: [33]"),
        ({"lora_b": torch.ones(33, 3)}, "lora_b has shape [33, 3]; accepted: [33, 4]"),
        ({"lora_a": torch.ones(4, 21)}, "lora_a has shape"),
        ({"weight": torch.ones(33, 21)}, "weight has shape"),
        ({"weight": torch.ones(33, 20).bfloat16()}, "weight is torch.bfloat16 but x"),
        ({"magnitude": torch.ones(33).int()}, "magnitude has dtype torch.int32"),
        ({"scaling": float("nan")}, "scaling=nan"),
        ({"scaling": torch.ones(())}, "scaling is a tensor"),
        ({"dropout_p": 1.5}, "dropout_p=1.5"),
        ({"dropout_p": 0.5, "seed": -1}, "seed=-1"),
        ({"bias": torch.ones(3)}, "bias has shape [3]"),
    ],
)
def test_errors_name_the_argument(change, fragment):
    arguments = dora_linear_inputs(5).operands() | {"scaling": 0.7} | change
    with pytest.raises(InvalidArgumentError) as caught:
        dora_linear(**arguments)
    assert fragment in str(caught.value) and "\n" not in str(caught.value)


def test_backend_by_name_runs_or_raises(monkeypatch):
    arguments = dora_linear_inputs(5).operands() | {"scaling": 0.7}
    with pytest.raises(BackendUnavailableError, match="no cuda kernels"):
        dora_linear(**arguments, backend="cuda")
    assert lk.explain("dora_linear", M=5, K=20, N=33)["backend"] == "aten"
    # The variable speaks of lora_linear's backends, too; the products inside follow it.
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "reference")
    assert lk.explain("dora_linear", M=5, K=20, N=33)["backend"] == "reference"
    dora_linear(**arguments)


def test_agrees_with_peft():
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(20, 33))
    config = peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["0"])
    model = peft.get_peft_model(model, config).double()
    layer = model.base_model.model[0]
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.4)
    magnitude = layer.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        magnitude.mul_(torch.rand_like(magnitude) + 0.5)
    x = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
    y = model(x)
    y.square().sum().backward()
    base, leaves = layer.base_layer, [layer.lora_A["default"].weight,
                                      layer.lora_B["default"].weight, magnitude]  # fmt: skip
    want = [x.grad.clone(), *(t.grad.clone() for t in leaves)]
    x.grad = None
    mine = [t.detach().clone().requires_grad_() for t in leaves]
    got = dora_linear(x, base.weight, *mine, 2.0, bias=base.bias)
    got.square().sum().backward()
    assert_within_budget(got, y, y)
    for actual, exact in zip([x.grad, *(t.grad for t in mine)], want, strict=True):
        assert_within_budget(actual, exact, exact)
