"""Plans of calls: used while nothing changes, dropped by every change that a call depends on."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_kernels as lk
from lora_kernels._backends import cpu
from lora_kernels.integrations.peft import call_plan
from lora_kernels.testing import BudgetExceededError, assert_within_budget

pytestmark = pytest.mark.skipif(
    cpu.load()[0] is None, reason="plans are compared by the compiled library"
)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(24, 40)

    def forward(self, x):
        return self.proj(x)


def pair(**options):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["proj"], **options)
    stock = get_peft_model(Toy(), config)
    with torch.no_grad():
        for p in stock.parameters():
            p.copy_(torch.randn_like(p))
    fused = copy.deepcopy(stock)
    lk.apply(fused)
    return stock, fused


def layer_of(model):
    return model.base_model.model.proj


def plan_of(model):
    return call_plan._plans.get(layer_of(model))


def warm(model, x):
    """Two calls: the first makes the plan, the second uses it."""
    model(x)
    before = plan_of(model).used
    model(x)
    assert plan_of(model).used == before + 1


def add_adapter(model):
    model.add_adapter("other", LoraConfig(r=2, target_modules=["proj"]))
    with torch.no_grad():
        layer_of(model).lora_A["other"].weight.fill_(0.25)
        layer_of(model).lora_B["other"].weight.fill_(0.5)
    model.set_adapter("other")


def new_weight(model):
    base = layer_of(model).base_layer
    base.weight = nn.Parameter(base.weight.detach() * 2, requires_grad=False)


def data_of_weight(model):
    layer_of(model).base_layer.weight.data = layer_of(model).base_layer.weight.data * 2


def hook_on_a(model):
    layer_of(model).lora_A["default"].register_forward_hook(lambda m, i, y: y * 2)


def forward_on_b(model):
    lora_b = layer_of(model).lora_B["default"]
    lora_b.forward = lambda s: torch.nn.functional.linear(s, lora_b.weight) * 3


def other_a(model):
    made = nn.Linear(24, 4, bias=False)
    made.weight = nn.Parameter(torch.ones(4, 24))
    layer_of(model).lora_A["default"] = made


def merge_in_place(model):
    layer_of(model).merge()


def halve(model):
    model.half()


CHANGES = {
    "scaling": lambda m: layer_of(m).scaling.update(default=0.25),
    "set_scale": lambda m: layer_of(m).set_scale("default", 3.0),
    "disabled": lambda m: layer_of(m).enable_adapters(False),
    "another adapter": add_adapter,
    "merged": merge_in_place,
    "weight replaced": new_weight,
    "data replaced": data_of_weight,
    "hook": hook_on_a,
    "forward": forward_on_b,
    "A replaced": other_a,
    "dtype": halve,
    "bias replaced": lambda m: setattr(layer_of(m).base_layer, "bias", None),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change, grad):
    (stock, fused), (exact, _) = pair(), pair()
    x = torch.randn(3, 5, 24)
    with torch.set_grad_enabled(grad):
        before = fused(x)
        warm(fused, x)
        for model in (stock, fused, exact):
            CHANGES[change](model)
        x = x.to(layer_of(stock).base_layer.weight.dtype)
        oracle, plain, got = exact.double()(x.double()).detach(), stock(x).detach(), fused(x)
    assert_within_budget(got.detach(), oracle, plain, change)
    if change not in ("merged", "dtype"):  # which change the way, not the result
        with pytest.raises(BudgetExceededError):
            assert_within_budget(before.detach(), oracle, plain, change)


def test_dropout_follows_the_mode():
    _, fused = pair(lora_dropout=0.5)
    x = torch.randn(64, 24)
    warm(fused.eval(), x)
    quiet = fused(x)
    assert not torch.equal(fused.train()(x), quiet)
    layer_of(fused).lora_dropout["default"].p = 0.0
    assert torch.equal(fused(x), quiet)
    assert torch.equal(fused.eval()(x), quiet)


def test_hooks_of_all_modules_are_seen():
    _, fused = pair()
    x = torch.randn(3, 24)
    warm(fused, x)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, y: seen.append(m))
    try:
        fused(x)
    finally:
        handle.remove()
    assert layer_of(fused).lora_A["default"] in seen


def test_autocast_and_mixed_inputs_are_seen():
    stock, fused = pair()
    x = torch.randn(3, 24)
    warm(fused, x)
    with torch.autocast("cpu", torch.bfloat16):
        want, got = stock(x), fused(x)
    assert got.dtype == want.dtype == torch.bfloat16
    with pytest.raises(RuntimeError):
        stock(x.double())
    with pytest.raises(RuntimeError):
        fused(x.double())


def test_copies_and_pickles_have_no_plan():
    _, fused = pair()
    x = torch.randn(3, 24)
    warm(fused, x)
    with torch.no_grad():
        want = fused(x)
        for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert plan_of(twin) is None
            assert torch.equal(twin(x), want)
            layer_of(twin).base_layer.weight.zero_()
            assert not torch.equal(twin(x), want)
        assert torch.equal(fused(x), want)
        shallow = copy.copy(layer_of(fused))
        shallow._modules = dict(shallow._modules, base_layer=nn.Linear(24, 40))
        assert not torch.equal(shallow(x), want)


def test_a_stock_layer_keeps_none():
    _, fused = pair()
    warm(fused, torch.randn(3, 24))
    lk.unapply(fused)
    assert plan_of(fused) is None


def test_a_plan_does_not_keep_its_layer_alive():
    layer = layer_of(pair()[1])
    x = torch.randn(3, 24)
    layer(x)
    layer(x)
    gone = weakref.ref(layer)
    gc.disable()
    try:
        del layer
        assert gone() is None
    finally:
        gc.enable()


def test_a_layer_that_changes_at_each_call_gets_no_more_plans():
    _, fused = pair()
    x = torch.randn(3, 24)
    for _ in range(20):
        new_weight(fused)
        fused(x)
    assert plan_of(fused).made == call_plan._POOR
