"""Layers with one input are computed together: right where they can be, apart where not."""

from __future__ import annotations

import copy
import logging
import threading

import pytest
import torch
from peft import get_peft_model
from peft_models import CASES, as_fp64, layer, lora_config, results, run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels.modules import blocks, layer_group
from lora_kernels.modules.layer_group import group_of
from lora_kernels.testing import BudgetExceededError, assert_within_budget


class Block(nn.Module):
    """Two projections of one input; `second` sees it through `between`."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 40), nn.Linear(24, 40, bias=False)
        self.between = None

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        return torch.tanh(first) * self.second(x if self.between is None else self.between(x))


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_rows", blocks.rows())
    blocks.register_block(Block, ("first", "second"))


@pytest.fixture
def group_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each grouped call of the op had."""
    sizes, op = [], layer_group.grouped_lora_linear

    def recorded(*args: object, **kwargs: object) -> list[Tensor]:
        ys = op(*args, **kwargs)
        sizes.append(len(ys))
        return ys

    monkeypatch.setattr(layer_group, "grouped_lora_linear", recorded)
    return sizes


def block(**overrides: object) -> nn.Module:
    torch.manual_seed(0)
    settings = {"target_modules": ["first", "second"]} | overrides
    return get_peft_model(Block(), lora_config(**settings))


def inner(model: nn.Module) -> Block:
    return model.base_model.model


def assert_same(got: dict, stock: dict, reference: dict) -> None:
    assert got.keys() == stock.keys() == reference.keys()
    for name, value in got.items():
        assert value.dtype == stock[name].dtype
        assert_within_budget(value, reference[name], stock[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lora_bias", [False, True])
def test_different_ranks_scalings_and_biases(dtype, lora_bias, group_sizes):
    model = block(
        rank_pattern={"second": 7}, alpha_pattern={"second": 3}, lora_bias=lora_bias,
    ).to(dtype)  # fmt: skip
    x = torch.randn(5, 13, 24).to(dtype)
    reference, stock = results(as_fp64(model), x.double()), results(model, x)
    (group,) = lk.apply(model).groups
    assert group == {
        "kind": "grouped_lora_linear", "name": "base_model.model",
        "members": ["first", "second"], "status": "fused", "reason": "",
    }  # fmt: skip
    fused = results(model, x)
    assert group_sizes == [2]
    assert_same(fused, stock, reference)
    with torch.no_grad():
        layer(model, "second").lora_B["default"].weight.zero_()
    with pytest.raises(BudgetExceededError):
        assert_same(results(model, x), stock, reference)


def test_autocast_and_frozen_parts(group_sizes):
    model = block()
    layer(model, "first").lora_A.requires_grad_(False)
    x = torch.randn(9, 24)
    reference = results(as_fp64(model), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        stock = results(model, x)
        lk.apply(model)
        fused = results(model, x)
    assert group_sizes == [2]
    for name, value in fused.items():
        assert value.dtype == stock[name].dtype
        assert_within_budget(value, reference[name], stock[name].bfloat16(), name)


def test_each_adapter_drops_its_own_elements(group_sizes):
    model = block(lora_dropout=0.5).train()
    first, second = layer(model, "first"), layer(model, "second")
    with torch.no_grad():
        for part in (first, second):
            part.lora_A["default"].weight.fill_(1.0)
            part.lora_B["default"].weight.fill_(1.0)
            part.base_layer.weight.zero_()
        first.base_layer.bias.zero_()
    lk.apply(model)
    x = torch.ones(64, 24)
    a, b = first(x), second(x)
    assert group_sizes == [2] and not torch.equal(a, b)
    assert not torch.equal(first(x), a)  # and anew at every call
    second(x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_the_masks(reentrant, group_sizes):
    model = block(lora_dropout=0.3).train()
    lk.apply(model)
    x = torch.randn(17, 24)
    plain = []
    for run_it in (model, lambda t: checkpoint(model, t, use_reentrant=reentrant)):
        torch.manual_seed(5)
        model.zero_grad(set_to_none=True)
        t = x.clone().requires_grad_()
        run_it(t).square().sum().backward()
        plain.append([t.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert group_sizes == [2, 2, 2]
    for a, b in zip(*plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("inside", [False, True], ids=["plain", "checkpoint"])
def test_compiled(inside):
    torch.compiler.reset()
    model = block()
    lk.apply(model)
    x = torch.randn(6, 24, requires_grad=True)

    def call(t: Tensor) -> Tensor:
        return checkpoint(model, t, use_reentrant=False) if inside else model(t)

    graph = torch.compile(call, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(model(x).square().sum(), x)[0]
    got = torch.autograd.grad(graph(x).square().sum(), x)[0]
    assert_within_budget(got, want.double(), want)
    assert not group_of(layer(model, "first")).dissolved


def test_switching_disabling_and_merging(group_sizes):
    model = block()
    torch.manual_seed(3)
    model.add_adapter("other", lora_config(target_modules=["first"]))
    x = torch.randn(9, 24)

    def outputs() -> list[Tensor]:
        found = [model(x)]
        model.set_adapter("other")  # which `second` does not have
        found.append(model(x))
        model.set_adapter("default")
        with model.disable_adapter():
            found.append(model(x))
        model.merge_adapter()
        found.append(model(x))
        model.unmerge_adapter()
        return [t.detach() for t in (*found, model(x))]

    stock = outputs()
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        x64, x = x.double(), x
    lk.apply(model)
    fused = outputs()
    assert group_sizes == [2, 2]
    model, x = double, x64
    for got, plain, oracle in zip(fused, stock, outputs(), strict=True):
        assert_within_budget(got, oracle, plain)


def test_several_active_adapters_are_stock():
    model = block()
    model.add_adapter("other", lora_config(target_modules=["first", "second"]))
    lk.apply(model)
    model.base_model.set_adapter(["default", "other"])
    x = torch.randn(3, 24)
    fused = model(x)
    (group,) = lk.apply(model).groups
    assert group["reason"] == "first: several adapters are active"
    lk.unapply(model)
    assert torch.equal(model(x), fused)


@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_hooks_known_to_apply_keep_the_layers_apart(kind, group_sizes):
    model = block()
    member = layer(model, "second")
    register = {
        "forward": member.register_forward_hook,
        "pre": member.register_forward_pre_hook,
        "backward": member.register_full_backward_hook,
    }[kind]
    register(lambda *_: None)
    (group,) = lk.apply(model).groups
    assert (group["status"], group["reason"]) == ("stock", "second: the layer has hooks")
    model(torch.randn(2, 24)).sum().backward()
    assert group_sizes == []


def test_a_pre_hook_that_comes_later(group_sizes, caplog):
    model = block()
    lk.apply(model)
    layer(model, "second").register_forward_pre_hook(lambda _, args: (args[0] * 2.0,))
    x = torch.randn(4, 24)
    with caplog.at_level(logging.WARNING, "lora_kernels"):
        fused = results(model, x)
    assert "called with different inputs" in caplog.text
    again = results(model, x)
    assert group_sizes == [2]  # the first call alone
    reference = results(as_fp64(lk_unapplied(model)), x.double())
    stock = results(lk_unapplied(model), x)
    assert_same(fused, stock, reference)
    assert_same(again, stock, reference)


def lk_unapplied(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    lk.unapply(model)
    return model


def test_full_backward_hooks_that_come_later():
    model = block()
    lk.apply(model)
    seen = []
    layer(model, "second").register_full_backward_hook(lambda m, gi, go: seen.append(gi[0]))
    x = torch.randn(4, 24)
    fused, stock = results(model, x), results(lk_unapplied(model), x)
    assert len(seen) == 2
    assert_within_budget(seen[0], seen[1].double(), seen[1])
    assert_same(fused, stock, results(as_fp64(lk_unapplied(model)), x.double()))


def test_an_input_that_changes_between_the_calls(group_sizes):
    model = block()
    with torch.no_grad():
        lk.apply(model)
        inner(model).between = lambda t: t.mul_(2.0)
        x = torch.randn(4, 24)
        fused, stock = model(x.clone()), lk_unapplied(model)(x.clone())
        oracle = as_fp64(lk_unapplied(model))(x.double())
    assert_within_budget(fused, oracle, stock)
    assert group_of(layer(model, "first")).dissolved


def test_another_mode_between_the_calls():
    model = block()
    lk.apply(model)

    first, second = layer(model, "first"), layer(model, "second")
    x = torch.randn(4, 24)
    first(x)
    with torch.no_grad():
        assert not second(x).requires_grad
    first(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert second(x).dtype == torch.bfloat16


def test_a_member_that_is_never_called_costs_two_calls(group_sizes, caplog):
    model = block()
    lk.apply(model)
    first = layer(model, "first")
    for _ in range(4):
        first(torch.randn(2, 24))
    assert group_sizes == [2, 2]
    assert "not all of its layers were called" in caplog.text
    assert group_of(first)._pending == {}


def test_an_exception_between_the_calls_is_no_harm(group_sizes):
    model = block()
    lk.apply(model)

    def fails(_: Tensor) -> Tensor:
        raise RuntimeError("planted")

    x = torch.randn(2, 24)
    want = model(x)
    inner(model).between = fails
    with pytest.raises(RuntimeError, match="planted"):
        model(x)
    inner(model).between = None
    assert torch.equal(model(x), want)
    assert group_sizes == [2, 2, 2] and not group_of(layer(model, "first")).dissolved


def test_two_threads(group_sizes):
    model = block()
    lk.apply(model)
    xs = [torch.randn(33, 24) for _ in range(2)]
    want, got = [model(x).detach() for x in xs], [[], []]

    def work(i: int) -> None:
        got[i] = [model(xs[i]).detach() for _ in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(y, want[i]) for i in range(2) for y in got[i])
    assert set(group_sizes) == {2} and not group_of(layer(model, "first")).dissolved


def test_copies_and_replicas(group_sizes):
    model = block()
    lk.apply(model)
    x = torch.randn(3, 24)
    want = model(x)
    other = copy.deepcopy(model)
    assert group_of(layer(other, "first")) is not group_of(layer(model, "first"))
    assert torch.equal(other(x), want) and group_sizes == [2, 2]
    replica = layer(model, "second")._replicate_for_data_parallel()
    replica._parameters, replica._modules = (
        dict(layer(model, "second")._parameters), dict(layer(model, "second")._modules),
    )  # fmt: skip
    assert torch.equal(replica(x), layer(model, "second")(x))


def test_undoing_leaves_nothing(group_sizes):
    model = block()
    keys, x = list(model.state_dict()), torch.randn(3, 24)
    stock = model(x)
    with lk.applied(model):
        model(x)
    assert group_sizes == [2] and group_of(layer(model, "first")) is None
    assert torch.equal(model(x), stock)
    lk.apply(model)
    kept = group_of(layer(model, "first"))
    with lk.applied(model):
        assert group_of(layer(model, "first")) is kept
    assert group_of(layer(model, "first")) is kept
    assert list(model.state_dict()) == keys
    lk.unapply(model)
    assert all("_lora_kernels_group" not in m.__dict__ for m in model.modules())


def test_reasons(monkeypatch):
    def reason(model: nn.Module) -> str:
        (group,) = lk.apply(model).groups
        assert group["status"] == "stock"
        return group["reason"]

    assert reason(block(target_modules=["first"])) == "only first has an adapter"
    model = block(lora_dropout=0.1)
    layer(model, "second").lora_dropout["default"].p = 0.2
    assert "different dropout" in reason(model)
    model = block()
    layer(model, "second").to(torch.bfloat16)
    assert "different dtypes" in reason(model)
    assert "the adapter is DoRA with dropout" in reason(block(use_dora=True, lora_dropout=0.1))
    monkeypatch.setenv("LORA_KERNELS_DISABLE", "grouped_lora_linear")
    model = block()
    assert "LORA_KERNELS_DISABLE" in reason(model)
    assert len(lk.apply(model).fused) == 2


def test_a_dropout_changed_later_is_obeyed(group_sizes):
    model = block(lora_dropout=0.1).train()
    lk.apply(model)
    layer(model, "second").lora_dropout["default"].p = 0.2
    model(torch.randn(3, 24))
    assert group_sizes == []


def test_transforms_tracing_and_odd_inputs(group_sizes):
    model = block()
    lk.apply(model)
    x = torch.randn(3, 5, 24)
    want = model(x).detach()
    parameters = dict(model.named_parameters())

    def call(values, t):
        return torch.func.functional_call(model, values, (t,))

    mapped = torch.func.vmap(lambda t: call(parameters, t))(x)
    _, tangent = torch.func.jvp(lambda t: call(parameters, t), (x,), (x,))
    (grads,) = (torch.func.grad(lambda v: call(v, x).sum())(parameters),)
    exported = torch.export.export(model, (x,)).module()(x)
    for t in (mapped, exported):
        assert_within_budget(t.detach(), want.double(), want, factor=4.0)
    assert tangent.isfinite().all() and grads
    with pytest.raises((AttributeError, TypeError)):
        layer(model, "first")([1.0])
    assert torch.equal(model(x), want)
    assert not group_of(layer(model, "first")).dissolved


def test_unknown_blocks_are_named():
    class Other(Block):
        pass

    model = get_peft_model(Other(), lora_config(target_modules=["first", "second"]))
    (group,) = lk.apply(model).groups
    assert group["status"] == "stock" and "Other is not in the table of blocks" in group["reason"]
    blocks.register_block(Other, ("first", "second"))
    (group,) = lk.apply(model).groups
    assert group["status"] == "fused"


def test_layers_of_this_package(group_sizes):
    torch.manual_seed(0)
    model = nn.Sequential(Block())
    lk.replace_modules(model, r=4, alpha=8)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.normal_(0.0, 0.5)
    x = torch.randn(7, 24)
    stock, reference = results(model, x), results(as_fp64(model), x.double())
    report = lk.apply(model)
    assert [g["status"] for g in report.groups] == ["fused"] and not report.layers
    assert str(report) == "1 x *: first, second: computed together"
    assert_same(results(model, x), stock, reference)
    assert group_sizes == [2]
    model[0].second.adapter_enabled = False
    results(model, x)
    model[0].second.adapter_enabled = True
    assert group_sizes == [2]
    lk.merge(model)
    model(x)
    assert group_sizes == [2]
    lk.unapply(model)
    assert type(model[0].first) is lk.LoRALinear


@pytest.mark.parametrize("family", CASES)
def test_families(family, group_sizes, monkeypatch):
    # Its blocks stay what they are: a fused MLP asks its groups for nothing.
    monkeypatch.setenv("LORA_KERNELS_DISABLE", "gated_activation")
    case = CASES[family]
    model = case.peft_model()
    report = lk.apply(model)
    together = [g for g in report.groups if len(g["members"]) > 1]
    assert all(g["status"] == "fused" for g in report.groups if g["kind"] != "gated_activation")
    run(model, case.inputs())
    assert sorted(group_sizes) == sorted(len(g["members"]) for g in together)
    attached = {id(g): g for m in model.modules() if (g := group_of(m))}
    assert len(attached) == len(together)
    assert not any(g.dissolved or g._pending for g in attached.values())
