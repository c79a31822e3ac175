"""LoRALinear as a module: numbers, state, modes, copies, compositions."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from adapter_models import strengthen
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels.errors import InvalidArgumentError
from lora_kernels.modules.lora_linear import adapters_disabled
from lora_kernels.testing import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer_of(k=24, n=20, **options):
    return strengthen(lk.LoRALinear(k, n, **{"r": 4, "alpha": 6, **options}))


def formula(layer, x, dtype):
    """Plain PyTorch in `dtype` on the layer's own parameters, no dropout."""
    w, a, b = (t.to(dtype) for t in (layer.weight, layer.lora_A, layer.lora_B))
    bias = None if layer.bias is None else layer.bias.to(dtype)
    x = x.to(dtype)
    if not layer.dora:
        return F.linear(x, w, bias) + layer.scaling * (x @ a.t() @ b.t())
    adapted = w + layer.scaling * (b @ a)
    ratio = layer.lora_magnitude_vector.to(dtype) / adapted.norm(dim=1).detach()
    y = F.linear(x, w) + layer.scaling * (x @ a.t() @ b.t())
    return y * ratio + (0 if bias is None else bias)


def slope(y):
    """An output gradient that every dtype holds exactly."""
    return (torch.arange(y.numel()).reshape(y.shape) % 17 - 8).to(y.dtype) / 8


def gradients(layer, y, x=None):
    named = dict(layer.named_parameters())
    wanted = {n: p for n, p in named.items() if p.requires_grad}
    if x is not None:
        wanted["x"] = x
    return dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), slope(y)), strict=True))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_gradients_against_fp64(dtype, bias, dora):
    layer = layer_of(bias=bias, dora=dora, dtype=dtype)
    x = torch.randn(33, 24).to(dtype).requires_grad_()
    results = {}
    for name, of in (
        ("module", lambda: layer(x)),
        ("fp64", lambda: formula(layer, x, torch.float64)),
        ("plain", lambda: formula(layer, x, dtype)),
    ):
        y = of()
        results[name] = {"y": y} | gradients(layer, y, x)
    expected = {"y", "x", "lora_A", "lora_B"} | ({"lora_magnitude_vector"} if dora else set())
    assert results["module"].keys() == expected
    for key, actual in results["module"].items():
        low = results["plain"][key].to(dtype)
        assert_within_budget(actual, results["fp64"][key].double(), low, key)


def test_gradcheck():
    layer = layer_of(k=5, n=4, r=2, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def forward(x, a, b):
        return torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, (x,))

    assert torch.autograd.gradcheck(forward, (x, layer.lora_A, layer.lora_B))


def test_the_budget_notices_a_lost_adapter():
    layer = layer_of()
    x = torch.randn(9, 24)
    with pytest.raises(AssertionError), adapters_disabled(layer):
        assert_within_budget(
            layer(x), formula(layer, x, torch.float64), formula(layer, x, torch.float32)
        )


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("shape", [(24,), (0, 24), (5, 24), (2, 3, 24), (2, 3, 2, 24)], ids=str)
def test_any_leading_shape(shape, dora):
    layer = layer_of(dora=dora)
    x = torch.randn(shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 20)
    assert_within_budget(y, formula(layer, x, torch.float64), formula(layer, x, torch.float32))
    y.sum().backward()
    assert layer.lora_A.grad.shape == layer.lora_A.shape


def test_strided_input():
    layer = layer_of()
    x = torch.randn(24, 9).t()
    assert torch.equal(layer(x), layer(x.contiguous()))


def test_a_new_layer_is_the_base_layer():
    for dora in (False, True):
        layer = lk.LoRALinear(24, 20, dora=dora)
        x = torch.randn(9, 24)
        base = F.linear(x, layer.weight, layer.bias)
        assert_within_budget(
            layer(x), F.linear(*(t.double() for t in (x, layer.weight, layer.bias))), base
        )
        assert not layer.lora_B.any() and layer.lora_A.any()


def test_initialisation_is_kaiming_uniform():
    layer = lk.LoRALinear(256, 8, r=64)
    bound = 1 / math.sqrt(256)  # sqrt(6 / ((1 + 5) * fan_in))
    a = layer.lora_A.detach()
    assert a.abs().max() <= bound
    # The standard error of the mean of n uniform draws, five times over.
    assert a.mean().abs() < 5 * bound / math.sqrt(3 * a.numel())
    assert a.abs().max() > bound * 0.999


@pytest.mark.parametrize(
    ("base", "asked", "got"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
def test_adapter_dtype(base, asked, got):
    layer = layer_of(dtype=base, adapter_dtype=asked)
    assert layer.weight.dtype == base and layer.lora_A.dtype == layer.lora_B.dtype == got
    layer(torch.randn(3, 24).to(base)).sum().backward()
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == got


def test_state_dict_has_the_keys_of_linear_and_round_trips():
    layer, other = layer_of(dora=True), layer_of(dora=True)
    x = torch.randn(3, 24)
    assert set(layer.state_dict()) - set(nn.Linear(24, 20).state_dict()) == {
        "lora_A", "lora_B", "lora_magnitude_vector",
    }  # fmt: skip
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(layer(x), other(x))
    plain = lk.LoRALinear(24, 20)
    missing = plain.load_state_dict(nn.Linear(24, 20).state_dict(), strict=False)
    assert set(missing.missing_keys) == {"lora_A", "lora_B"} and not missing.unexpected_keys


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
def test_copies_are_independent(duplicate):
    layer = layer_of(dora=True, dropout=0.25, rslora=True)
    x = torch.randn(3, 24)
    twin = duplicate(layer)
    twin.eval(), layer.eval()
    assert torch.equal(twin(x), layer(x)) and twin.extra_repr() == layer.extra_repr()
    assert [p.requires_grad for p in twin.parameters()] == [
        p.requires_grad for p in layer.parameters()
    ]
    with torch.no_grad():
        twin.lora_B.zero_()
    assert layer.lora_B.any()


def test_from_linear_shares_and_freezes():
    linear = nn.Linear(24, 20).eval()
    layer = lk.LoRALinear.from_linear(linear, r=3)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not layer.weight.requires_grad and not layer.bias.requires_grad
    assert layer.lora_A.requires_grad and layer.lora_B.requires_grad and not layer.training
    assert isinstance(layer, nn.Linear) and (layer.in_features, layer.out_features) == (24, 20)
    assert lk.LoRALinear.from_linear(nn.Linear(4, 4, bias=False)).bias is None


def test_dropout_only_in_training_and_from_torchs_generator():
    layer = layer_of(dropout=0.5)
    x = torch.randn(6, 24)
    layer.eval()
    without = layer(x)
    assert torch.equal(layer(x), without)
    assert_within_budget(
        without, formula(layer, x, torch.float64), formula(layer, x, torch.float32)
    )
    layer.train()
    torch.manual_seed(1)
    first = layer(x)
    assert not torch.equal(layer(x), first) and not torch.equal(first, without)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_dropout_is_unbiased_and_leaves_the_base_alone(dora):
    layer = layer_of(dropout=0.3, dora=dora)
    x = torch.randn(2, 24)
    with torch.no_grad():
        runs = torch.stack([layer(x) for _ in range(4000)]).double()
        layer.eval()
        mean = layer(x).double()
    error = runs.std(0) / math.sqrt(len(runs))
    assert ((runs.mean(0) - mean).abs() < 6 * error).all()
    assert (error > 0).all()


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_full_dropout_is_the_base_layer(dora):
    layer = layer_of(dropout=1.0, dora=dora)
    x = torch.randn(6, 24)
    base = F.linear(x, layer.weight, layer.bias)
    wide = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert_within_budget(layer(x), wide, base)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved-hooks", "reentrant"])
def test_activation_checkpointing_replays_the_mask(reentrant, dora):
    layer = layer_of(dropout=0.4, dora=dora)
    x = torch.randn(9, 24, requires_grad=True)
    torch.manual_seed(5)
    y = layer(x)
    want = gradients(layer, y, x)
    torch.manual_seed(5)
    again = checkpoint(layer, x, use_reentrant=reentrant)
    assert torch.equal(again, y)
    again.backward(slope(y))
    got = {n: p.grad for n, p in layer.named_parameters() if p.requires_grad} | {"x": x.grad}
    for name, gradient in want.items():
        assert torch.equal(got[name], gradient), name


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_autocast(dora):
    layer = layer_of(dora=dora)
    x = torch.randn(9, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        plain = formula(layer, x, torch.float32)
    assert y.dtype == torch.bfloat16
    assert_within_budget(y, formula(layer, x, torch.float64), plain.bfloat16())
    y.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_compiles_to_one_graph(dora):
    layer = layer_of(dora=dora, dropout=0.3).eval()
    x = torch.randn(9, 24)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_within_budget(
        compiled(x), formula(layer, x, torch.float64), formula(layer, x, torch.float32)
    )
    want = gradients(layer, layer(x))
    for name, gradient in gradients(layer, compiled(x)).items():
        assert_within_budget(gradient, want[name].double(), want[name], name)


def test_scaling_is_computed_when_read():
    layer = layer_of(r=4, alpha=6)
    assert layer.scaling == 1.5
    layer.alpha = 12
    assert layer.scaling == 3.0
    layer.rslora = True
    assert layer.scaling == 6.0
    x = torch.randn(3, 24)
    assert_within_budget(
        layer(x), formula(layer, x, torch.float64), formula(layer, x, torch.float32)
    )


def test_disabled_adapters_are_the_base_layer():
    layer = layer_of()
    x = torch.randn(3, 24)
    base, adapted = F.linear(x, layer.weight, layer.bias), layer(x)
    with adapters_disabled(layer):
        assert torch.equal(layer(x), base)
        with pytest.raises(RuntimeError, match="inner"), adapters_disabled(layer):
            raise RuntimeError("inner")
        assert torch.equal(layer(x), base)
    assert torch.equal(layer(x), adapted)
    layer.adapter_enabled = False
    assert torch.equal(layer(x), base)


def test_reset_parameters_starts_anew():
    layer = layer_of(dora=True)
    weight, factor = layer.weight.clone(), layer.lora_A.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, weight) and not torch.equal(layer.lora_A, factor)
    assert not layer.lora_B.any()
    assert torch.equal(layer.lora_magnitude_vector, layer.weight.norm(dim=1))


def test_dora_row_of_zeros_stays_zero():
    layer = lk.LoRALinear(24, 20, dora=True, bias=False)
    with torch.no_grad():
        layer.weight[3] = 0
    layer.reset_adapter()
    y = layer(torch.randn(5, 24))
    y.sum().backward()
    assert not y[:, 3].any() and all(
        p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad
    )


def test_meta_device_and_to_empty():
    layer = lk.LoRALinear(24, 20, dora=True, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert layer(torch.randn(3, 24)).isfinite().all()


def test_repr_names_what_matters():
    text = repr(lk.LoRALinear(3, 4, r=2, alpha=5, dropout=0.1, bias=False, rslora=True))
    for part in ("in_features=3", "out_features=4", "bias=False", "r=2", "alpha=5",
                 "dropout=0.1", "rslora"):  # fmt: skip
        assert part in text
    assert "dora" not in text


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"r": 0}, "r=0"),
        ({"r": -3}, "r=-3"),
        ({"r": 2.0}, "r=2.0"),
        ({"r": True}, "r=True"),
        ({"r": "8"}, "r='8'"),
        ({"alpha": 0}, "alpha=0"),
        ({"alpha": math.nan}, "alpha=nan"),
        ({"alpha": math.inf}, "alpha=inf"),
        ({"alpha": "16"}, "alpha='16'"),
        ({"alpha": None}, "alpha=None"),
        ({"dropout": 1.5}, "dropout=1.5"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"dropout": math.nan}, "dropout=nan"),
        ({"dtype": torch.int8}, "dtype=torch.int8"),
        ({"adapter_dtype": torch.int8}, "adapter_dtype=torch.int8"),
        ({"adapter_dtype": "bf16"}, "adapter_dtype='bf16'"),
    ],
)
def test_bad_arguments(options, problem):
    with pytest.raises(InvalidArgumentError, match=problem) as caught:
        lk.LoRALinear(8, 8, **options)
    assert "accepted" in str(caught.value) and "\n" not in str(caught.value)


def test_what_cannot_be_adapted_says_why():
    class Special(nn.Linear):
        pass

    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    patched = nn.Linear(4, 4)
    patched.forward = lambda x: x
    whole_numbers = nn.Linear(4, 4)
    whole_numbers.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    shard = nn.Linear(4, 4)
    shard.weight = nn.Parameter(torch.zeros(0))
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    for linear, problem in (
        (Special(4, 4), "Special"), (nn.LayerNorm(4), "LayerNorm"), (hooked, "hooks"),
        (patched, "forward was replaced"), (whole_numbers, "int8"), (shard, "shard"),
        (normed, "type is"), (lk.LoRALinear(4, 4), "LoRALinear"),
    ):  # fmt: skip
        with pytest.raises(InvalidArgumentError, match=problem):
            lk.LoRALinear.from_linear(linear)
    assert hooked.weight.requires_grad
