"""Layers without an adapter beside adapted ones of the same input, as q and v alone leave k."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from peft_models import QkvBlock, as_fp64, layer, lora_config, results
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels.modules import blocks, layer_group
from lora_kernels.modules.layer_group import group_of
from lora_kernels.testing import BudgetExceededError, assert_within_budget

NAMES = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_rows", blocks.rows())
    blocks.register_block(QkvBlock, NAMES)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which members of each grouped call had an adapter."""
    found, op = [], layer_group.grouped_lora_linear

    def recorded(x, weights, lora_as, *args, **kwargs) -> list[Tensor]:
        found.append("".join("-" if a is None else "a" for a in lora_as))
        return op(x, weights, lora_as, *args, **kwargs)

    monkeypatch.setattr(layer_group, "grouped_lora_linear", recorded)
    return found


def block(*targets: str, dtype: torch.dtype = torch.bfloat16, **overrides: object) -> nn.Module:
    torch.manual_seed(0)
    settings = {"target_modules": list(targets or ("q_proj", "v_proj"))} | overrides
    return get_peft_model(QkvBlock().to(dtype), lora_config(**settings))


def inner(model: nn.Module) -> QkvBlock:
    return model.base_model.model


def assert_same(got: dict, stock: dict, reference: dict) -> None:
    assert got.keys() == stock.keys() == reference.keys()
    for name, value in got.items():
        assert value.dtype == stock[name].dtype
        assert_within_budget(value, reference[name], stock[name].bfloat16(), name)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize(
    ("targets", "want"),
    [(("q_proj", "v_proj"), "a-a"), (("v_proj",), "--a"), (("q_proj",), "a--")],
    ids=lambda t: "-".join(t) if isinstance(t, tuple) else "",
)
def test_results_and_gradients(targets, want, autocast, calls):
    model = block(*targets, rank_pattern={"v_proj": 7})
    x = torch.randn(3, 11, 48).to(torch.float32 if autocast else torch.bfloat16)
    reference = results(as_fp64(model), x.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        stock = results(model, x)
        (group,) = lk.apply(model).groups
        assert (group["members"], group["status"]) == (list(NAMES), "fused")
        fused = results(model, x)
        inner(model).k_proj.bias.data.zero_()
        wrong = results(model, x)
    assert calls == [want] * 2
    assert_same(fused, stock, reference)
    with pytest.raises(BudgetExceededError):
        assert_same(wrong, stock, reference)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_the_masks(reentrant, calls):
    model = block(lora_dropout=0.3).train()
    lk.apply(model)
    x = torch.randn(17, 48).bfloat16()
    found = []
    for run in (model, lambda t: checkpoint(model, t, use_reentrant=reentrant)):
        torch.manual_seed(5)
        model.zero_grad(set_to_none=True)
        t = x.clone().requires_grad_()
        run(t).float().square().sum().backward()
        found.append([t.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert calls == ["a-a"] * 3
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_dropout_leaves_the_frozen_layer_alone(calls):
    model = block(lora_dropout=0.5).train()
    lk.apply(model)
    x = torch.randn(9, 48).bfloat16()
    with torch.no_grad():
        first, again = ([layer_(x) for layer_ in inner(model).children()] for _ in range(2))
    assert calls == ["a-a"] * 2
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], again[0]) and not torch.equal(first[2], again[2])


def test_nothing_but_the_class_changes():
    model = block()
    k, keys, text = inner(model).k_proj, list(model.state_dict()), str(model)
    lk.apply(model)
    assert type(k) is not nn.Linear and isinstance(k, nn.Linear)
    assert list(model.state_dict()) == keys and "GroupedLinear" not in str(model)
    assert inner(model).k_proj is k and text.count("Linear(") == str(model).count("Linear(")
    other, x = copy.deepcopy(model), torch.randn(3, 48).bfloat16()
    loaded = pickle.loads(pickle.dumps(inner(model).k_proj))
    assert torch.equal(other(x), model(x)) and torch.equal(loaded(x), k(x))
    lk.unapply(model)
    assert type(k) is nn.Linear and group_of(k) is None
    with lk.applied(model):
        assert group_of(k) is not None
    assert type(k) is nn.Linear and group_of(k) is None


def _trains(model: nn.Module) -> None:
    inner(model).k_proj.weight.requires_grad_()


def _is_hooked(model: nn.Module) -> None:
    inner(model).k_proj.register_forward_hook(lambda *_: None)


def _is_another_class(model: nn.Module) -> None:
    class Own(nn.Linear):
        pass

    inner(model).k_proj.__class__ = Own


def _is_replaced(model: nn.Module) -> None:
    k = inner(model).k_proj
    k.forward = lambda x: nn.functional.linear(x, k.weight, k.bias)


@pytest.mark.parametrize("change", [_trains, _is_hooked, _is_another_class, _is_replaced])
def test_frozen_layers_that_stay_out(change, calls):
    model = block()
    change(model)
    (group,) = lk.apply(model).groups
    assert (group["members"], group["status"]) == (["q_proj", "v_proj"], "fused")
    model(torch.randn(3, 48).bfloat16())
    assert calls == ["aa"]


def test_where_nothing_is_gained_they_stay_out(calls):
    model = block(dtype=torch.float32)
    (group,) = lk.apply(model).groups
    assert group["members"] == ["q_proj", "v_proj"]
    (group,) = lk.apply(block("v_proj", dtype=torch.float32)).groups
    assert (group["status"], group["reason"]) == ("stock", "only v_proj has an adapter")


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_kernels_that_want_an_adapter_do_not_get_them(backend, monkeypatch):
    model = block()
    lk.apply(model)
    monkeypatch.setenv("LORA_KERNELS_BACKEND", backend)
    monkeypatch.setattr(
        layer_group, "grouped_lora_linear",
        lambda x, weights, *_, **__: [x @ w.t() for w in weights if len(weights) == 2],
    )  # fmt: skip
    assert model(torch.randn(3, 48).bfloat16()).isfinite().all()


def test_what_changes_after_apply_is_obeyed(calls):
    model = block()
    lk.apply(model)
    k, x = inner(model).k_proj, torch.randn(5, 48).bfloat16()
    k.weight.requires_grad_()
    results(model, x)
    assert k.weight.grad is not None and calls == ["aa"]
    k.weight.requires_grad_(False)
    k.to(torch.float32)
    with pytest.raises(RuntimeError, match="dtype"):
        model(x)
    k.to(torch.bfloat16)
    with torch.no_grad():
        want = model(x)
        k.register_forward_pre_hook(lambda _, args: (args[0] * 2.0,))
        doubled = model(x)
    assert not torch.equal(want, doubled)


def test_merging_for_good_leaves_nothing_behind(caplog):
    for targets in (("q_proj", "v_proj"), ("v_proj",)):
        model = block(*targets)
        lk.apply(model)
        x = torch.randn(5, 48).bfloat16()
        merged = model.merge_and_unload()
        for _ in range(4):
            merged(x)
        assert group_of(merged.k_proj)._pending == {} and not caplog.text
        lk.apply(merged)
        assert all(type(m) is nn.Linear for m in merged.children())


def test_mixed_batches_do_not_dissolve_the_group(calls):
    model = block()
    model.add_adapter("other", lora_config(target_modules=["q_proj", "v_proj"]))
    lk.apply(model.eval())
    x = torch.randn(2, 3, 48).bfloat16()
    for _ in range(4):
        model(x, adapter_names=["default", "other"])
    assert calls == [] and not group_of(inner(model).k_proj).dissolved
    model(x)
    assert calls == ["a-a"]


def test_a_frozen_layer_that_gets_an_adapter_later(calls):
    model = block()
    lk.apply(model)
    torch.manual_seed(4)
    model.add_adapter("all", lora_config(target_modules=list(NAMES)))
    model.set_adapter("all")
    x = torch.randn(6, 48).bfloat16()
    plain = copy.deepcopy(model)
    lk.unapply(plain)
    stock, reference = results(plain, x), results(as_fp64(plain), x.double())
    assert_same(results(model, x), stock, reference)
    (group,) = lk.apply(model).groups
    assert group["members"] == list(NAMES)
    assert type(layer(model, "k_proj").base_layer) is nn.Linear
    calls.clear()
    assert_same(results(model, x), stock, reference)
    assert calls == ["aaa"]


def test_compiled():
    torch.compiler.reset()
    model = block()
    lk.apply(model)
    x = torch.randn(6, 48).bfloat16().requires_grad_()
    graph = torch.compile(model, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(model(x).float().square().sum(), x)[0]
    got = torch.autograd.grad(graph(x).float().square().sum(), x)[0]
    assert_within_budget(got, want.double(), want)


def test_layers_of_this_package(calls):
    torch.manual_seed(0)
    model = nn.Sequential(QkvBlock().bfloat16().requires_grad_(False))
    lk.replace_modules(model, r=4, alpha=8, targets=["q_proj", "v_proj"])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.normal_(0.0, 0.5)
    x = torch.randn(7, 48).bfloat16()
    stock, reference = results(model, x), results(as_fp64(model), x.double())
    assert [g["members"] for g in lk.apply(model).groups] == [list(NAMES)]
    assert_same(results(model, x), stock, reference)
    assert calls == ["a-a"]
