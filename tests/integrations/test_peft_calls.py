"""Calls of fused layers that PEFT's forward has to serve, and calls that it need not."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora.layer import Linear
from peft_models import Calls, layer, lora_config, mlp
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import lora_kernels as lk
from lora_kernels.testing import assert_within_budget


def _two_adapters() -> nn.Module:
    model = mlp()
    model.add_adapter("second", lora_config(r=3, target_modules=["up", "mid", "down"]))
    return model


def _expect_fallback(
    model: nn.Module, call: Callable[[], torch.Tensor], reason: str, calls: Calls,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    lk.unapply(model)
    stock = call()
    lk.apply(model)
    calls.take()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "lora_kernels"):
        fused = call()
    assert calls.take() == 0
    assert torch.equal(fused, stock)
    assert reason in caplog.text


def test_several_active_adapters(fused_calls: Calls, caplog: pytest.LogCaptureFixture) -> None:
    model, x = _two_adapters(), torch.randn(5, 20)
    lk.apply(model)
    model.base_model.set_adapter(["default", "second"])
    up = layer(model, "up")
    lk.unapply(model)
    stock = up(x)
    model.set_adapter("default")
    lk.apply(model)
    model.base_model.set_adapter(["default", "second"])
    with caplog.at_level(logging.WARNING, "lora_kernels"):
        assert torch.equal(up(x), stock)
    assert fused_calls.take() == 0
    assert "several adapters are active" in caplog.text
    assert {e.reason for e in lk.apply(model).layers} == {"several adapters are active"}
    model.set_adapter("second")
    up(x)
    assert fused_calls.take() == 1


def test_layer_with_one_fusable_adapter_of_two(fused_calls: Calls) -> None:
    model, x = mlp(lora_dropout=0.1).eval(), torch.randn(5, 20)
    for name in ("up", "mid", "down"):
        layer(model, name).lora_dropout["default"].inplace = True
    model.add_adapter("plain", lora_config(target_modules=["up", "mid", "down"]))
    assert {e.status for e in lk.apply(model).layers} == {"stock"}
    model(x)
    assert fused_calls.take() == 0
    model.set_adapter("plain")
    model(x)
    assert fused_calls.take() == 3


def test_active_adapter_that_this_layer_lacks(
    fused_calls: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = mlp(), torch.randn(5, 20)
    model.add_adapter("only_down", lora_config(target_modules=["down"]))
    model.set_adapter("only_down")
    lk.apply(model)
    with caplog.at_level(logging.WARNING, "lora_kernels"):
        fused = model(x)
    assert fused_calls.take() == 1 and not caplog.records
    lk.unapply(model)
    reference = copy.deepcopy(model).double()(x.double())
    assert_within_budget(fused, reference, model(x), "y")


def test_mixed_batch(fused_calls: Calls, caplog: pytest.LogCaptureFixture) -> None:
    model, x = _two_adapters().eval(), torch.randn(3, 20)
    names = ["default", "__base__", "second"]
    _expect_fallback(
        model, lambda: model(x, adapter_names=names), "adapter_names", fused_calls, caplog
    )
    lk.apply(model)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(x, adapter_names=["default"])


@pytest.mark.parametrize("state", ["disabled", "merged"])
def test_base_only_calls_are_quiet(
    state: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = mlp(), torch.randn(5, 20)
    lk.apply(model)
    monkeypatch.setenv("LORA_KERNELS_STRICT", "1")
    with caplog.at_level(logging.WARNING, "lora_kernels"):
        if state == "merged":
            model.merge_adapter()
            y = model(x)
            model.unmerge_adapter()
            model.merge_adapter()
            assert torch.equal(y, model(x))
        else:
            with model.disable_adapter():
                model(x)
    assert not caplog.records


def test_disabling_unmerges_as_in_peft() -> None:
    model, x = mlp(), torch.randn(5, 20)
    lk.apply(model)
    model.merge_adapter()
    with model.disable_adapter():
        model(x)
    assert not layer(model, "up").merged


def test_input_of_another_dtype_raises_as_in_peft(fused_calls: Calls) -> None:
    model = mlp().double()
    lk.apply(model)
    with pytest.raises(RuntimeError, match="dtype"):
        model(torch.randn(5, 20))
    assert fused_calls.take() == 0


def test_input_casting_turned_off(fused_calls: Calls) -> None:
    model = mlp().bfloat16()
    up = layer(model, "up")
    up.lora_A.float()
    up.lora_B.float()
    lk.apply(model)
    x = torch.randn(5, 20).bfloat16()
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        up(x)
    assert fused_calls.take() == 0
    assert up(x).dtype == torch.bfloat16 and fused_calls.take() == 1


def test_unknown_keyword_raises_as_in_peft() -> None:
    model = mlp()
    lk.apply(model)
    with pytest.raises(TypeError):
        layer(model, "up")(torch.randn(5, 20), colour=None)


def test_global_hooks_see_every_module(fused_calls: Calls) -> None:
    model, x, seen = mlp(), torch.randn(5, 20), []
    lk.apply(model)
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(m))
    try:
        model(x)
    finally:
        handle.remove()
    assert fused_calls.take() == 0
    assert layer(model, "up").lora_A["default"] in seen


def test_function_transforms(fused_calls: Calls) -> None:
    model, x = mlp(), torch.randn(5, 20)
    up = layer(model, "up")
    stock = torch.func.vmap(up)(x)
    tangent = torch.func.jvp(up, (x,), (x,))[1]
    lk.apply(model)
    assert torch.equal(torch.func.vmap(up)(x), stock)
    assert torch.equal(torch.func.jvp(up, (x,), (x,))[1], tangent)
    assert fused_calls.take() == 0


def test_trace_and_export_hold_library_ops_only(fused_calls: Calls) -> None:
    model, x = mlp(), torch.randn(5, 20)
    lk.apply(model)
    with torch.no_grad():
        traced = torch.jit.trace(model, (x,), check_trace=False)
        exported = torch.export.export(layer(model, "up"), (x,))
    assert fused_calls.take() == 0
    operators = str(traced.inlined_graph)
    assert "aten::linear" in operators and "LoraLinear(" not in operators
    assert "lora_kernels::" not in operators and "^" not in operators
    assert "lora_kernels" not in str(exported.graph)


def test_nested_input(fused_calls: Calls) -> None:
    model = mlp()
    up = layer(model, "up")
    x = torch.nested.nested_tensor([torch.randn(2, 20), torch.randn(3, 20)], layout=torch.jagged)
    stock = up(x)
    lk.apply(model)
    assert torch.equal(up(x).values(), stock.values())
    assert fused_calls.take() == 0


def test_unapply_after_accelerate_hooked_a_layer(fused_calls: Calls) -> None:
    model, x = mlp(), torch.randn(5, 20)
    up = layer(model, "up")
    stock = up(x)
    lk.apply(model)
    add_hook_to_module(up, ModelHook())
    up(x)
    assert fused_calls.take() == 1
    lk.unapply(model)
    assert torch.equal(up(x), stock) and fused_calls.take() == 0
    remove_hook_from_module(up)
    assert torch.equal(up(x), stock) and type(up) is Linear


def test_replaced_weights_are_read_anew(fused_calls: Calls) -> None:
    model, x = mlp(), torch.randn(5, 20)
    up = layer(model, "up")
    lk.apply(model)
    other = copy.deepcopy(up)
    weights = {n: torch.randn_like(p) for n, p in up.named_parameters()}
    swapped = torch.func.functional_call(up, weights, (x,))
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(weights[name])
    assert torch.equal(swapped, other(x))
    assert fused_calls.take() == 2


def test_meta_and_fake_tensors_get_shapes(fused_calls: Calls) -> None:
    model = mlp()
    lk.apply(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(torch.randn(3, 20)).shape == (3, 11)
    assert fused_calls.take() == 3
    model.to("meta")
    assert model(torch.randn(3, 20, device="meta")).shape == (3, 11)


def test_flop_counter_sees_what_it_sees_in_peft() -> None:
    model, x, totals = mlp(), torch.randn(3, 20), []
    for change in (lk.unapply, lk.apply):
        change(model)
        with FlopCounterMode(display=False) as counter:
            model(x)
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


@pytest.mark.parametrize("shape", [(20,), (3, 20), (2, 3, 20)])
def test_output_is_no_view_and_can_be_changed_in_place(shape: tuple[int, ...]) -> None:
    model, x = mlp(), torch.randn(shape, requires_grad=True)
    up = layer(model, "up")
    lk.apply(model)
    y = up(x)
    assert y._base is None
    y.relu_().sum().backward()
    lk.unapply(model)
    changed, x.grad = x.grad, None
    up(x).relu().sum().backward()
    assert_within_budget(changed, _input_gradient(model, x), x.grad, "dx")


def _input_gradient(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    rows = x.detach().double().requires_grad_()
    layer(copy.deepcopy(model).double(), "up")(rows).relu().sum().backward()
    return rows.grad
