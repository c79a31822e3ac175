"""A frozen W may be kept packed; every way to change it must be noticed by the next call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lora_kernels.ops import lora_linear
from lora_kernels.testing import (
    LoraLinearInputs,
    check_lora_linear,
    lora_linear_inputs,
    lora_linear_op,
)


def copy_in_no_grad(w: torch.nn.Parameter, new: torch.Tensor) -> None:
    with torch.no_grad():
        w.copy_(new)


def load_state_dict(w: torch.nn.Parameter, new: torch.Tensor) -> None:
    layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    layer.weight = w
    layer.load_state_dict({"weight": new})


def optimizer_step(w: torch.nn.Parameter, new: torch.Tensor) -> None:
    w.requires_grad_()
    w.grad = (w - new).detach()
    torch.optim.SGD([w], lr=1.0).step()
    w.grad = None


def data_add(w: torch.nn.Parameter, new: torch.Tensor) -> None:
    w.data.add_(new - w.data)


def data_replace(w: torch.nn.Parameter, new: torch.Tensor) -> None:
    w.data = new.clone()


def set_(w: torch.nn.Parameter, new: torch.Tensor) -> None:
    with torch.no_grad():
        w.set_(new.clone())


def one_element(w: torch.nn.Parameter, new: torch.Tensor) -> None:
    with torch.no_grad():
        w[-1, -1] = new[-1, -1] + 50.0


def one_row_of_a_view(w: torch.nn.Parameter, new: torch.Tensor) -> None:
    with torch.no_grad():
        w.view(-1)[w.shape[1] : 2 * w.shape[1]] = new[1]


def through_numpy(w: torch.nn.Parameter, new: torch.Tensor) -> None:
    """Leaves no trace in torch at all."""
    bits = torch.int16 if w.dtype == torch.bfloat16 else torch.int32
    w.data.view(bits).numpy()[:] = new.contiguous().view(bits).numpy()


CHANGES: dict[str, Callable[[torch.nn.Parameter, torch.Tensor], None]] = {
    f.__name__: f
    for f in (
        copy_in_no_grad, load_state_dict, optimizer_step, data_add, data_replace, set_,
        one_element, one_row_of_a_view, through_numpy,
    )
}  # fmt: skip


def check_current(i: LoraLinearInputs, backend: str) -> None:
    check_lora_linear(i, backend, "xab")


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_change_of_w_is_noticed(backend, require, dtype, change):
    i = lora_linear_inputs(70, 130, 96, 8, dtype)
    require(i)
    parameter = torch.nn.Parameter(i.weights[0].clone(), requires_grad=False)
    i.weights[0] = parameter
    for _ in range(3):  # often enough for any packing policy to have kept W
        check_current(i, backend)
    new = lora_linear_inputs(70, 130, 96, 8, dtype, generator_seed=1).weights[0]
    CHANGES[change](parameter, new)
    for _ in range(2):
        check_current(i, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_new_weight_at_an_old_address_is_noticed(backend, require, dtype):
    require(lora_linear_inputs(70, 130, 96, 8, dtype))
    for seed in range(12):
        i = lora_linear_inputs(70, 130, 96, 8, dtype, generator_seed=seed)
        check_current(i, backend)
        del i  # gives the memory back, so that the next weight may get the same address


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_share_a_storage(backend, require, dtype):
    """Two layers as row ranges of one buffer, and one matrix with its transpose."""
    i = lora_linear_inputs(70, 96, (96, 96), 8, dtype)
    require(i)
    buffer = torch.cat(i.weights)
    i.weights[:] = [buffer[:96], buffer[96:]]
    check_current(i, backend)
    i.weights[:] = [buffer[96:], buffer[:96]]
    check_current(i, backend)
    i.weights[:] = [buffer[:96], buffer[:96].t()]
    check_current(i, backend)


def test_change_between_forward_and_backward_is_refused(backend, require):
    i = lora_linear_inputs(70, 130, 96, 8, torch.float32)
    require(i)
    x = i.x.clone().requires_grad_()
    w = i.weights[0].clone()
    y = lora_linear(x, w, i.lora_as[0], i.lora_bs[0], 0.7, backend=backend)
    w.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(i.dys[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_w_itself(backend, require, dtype):
    """An unfrozen W moves at every step; each step must see the current one."""
    i = lora_linear_inputs(70, 130, 96, 8, dtype)
    require(i)
    for _ in range(4):
        check_lora_linear(i, backend, "xwabc")
        dw = lora_linear_op(i, backend).dws[0]
        i.weights[0].sub_(0.1 * dw)


def test_many_layers_stay_apart(backend, require):
    layers = [
        lora_linear_inputs(33, 64, 48, 4, torch.bfloat16, generator_seed=s) for s in range(20)
    ]
    require(layers[0])
    for _ in range(2):
        for i in layers:
            check_current(i, backend)
