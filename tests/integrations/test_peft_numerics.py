"""Fused PEFT models give what PEFT gives: outputs and every gradient, against fp64."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from peft_models import CASES, Calls, as_fp64, layer, lora_config, mlp, run
from torch import nn

import lora_kernels as lk
from lora_kernels.ops import _philox
from lora_kernels.testing import BudgetExceededError, assert_within_budget


@pytest.fixture(autouse=True, params=["auto", "aten"])
def _backend(
    request: pytest.FixtureRequest, fresh_warnings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What users get, and the floor that every machine has."""
    monkeypatch.setenv("LORA_KERNELS_BACKEND", request.param)


def _layer_results(module: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    y = module(x)
    y.backward(dy.to(y.dtype))
    grads = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad} | grads


def _assert_same(fused: dict, stock: dict, reference: dict) -> None:
    assert fused.keys() == stock.keys() == reference.keys()
    for name, value in fused.items():
        assert value.dtype == stock[name].dtype, name
        assert_within_budget(value, reference[name], stock[name], name)


@pytest.mark.parametrize("family", CASES)
def test_model_outputs_and_gradients(family: str, fused_calls: Calls) -> None:
    case = CASES[family]
    model = case.peft_model()
    inputs = case.inputs()
    reference = run(as_fp64(model), inputs)
    stock = run(model, inputs)
    report = lk.apply(model)
    assert len(report.fused) == len(report.layers) == case.layers
    fused = run(model, inputs)
    assert fused_calls.take() == case.layers
    _assert_same(fused, stock, reference)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_zeroed_lora_b_is_noticed(family: str) -> None:
    case = CASES[family]
    model = case.peft_model()
    inputs = case.inputs()
    reference = run(as_fp64(model), inputs)
    stock = run(model, inputs)
    lk.apply(model)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).zero_()
    with pytest.raises(BudgetExceededError):
        _assert_same(run(model, inputs), stock, reference)


@pytest.mark.parametrize("target", ["up", "mid"])
@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
def test_layer_in_every_dtype(
    base: torch.dtype, adapter: torch.dtype, lora_bias: bool, target: str, fused_calls: Calls
) -> None:
    model = mlp(lora_bias=lora_bias)
    module = layer(model, target).to(base)
    for part in (module.lora_A, module.lora_B):
        part.to(adapter)
    x = torch.randn(2, 65, module.in_features).to(base)
    dy = torch.randn(2, 65, module.out_features).to(base)
    reference = _layer_results(as_fp64(module), x.double(), dy.double())
    stock = _layer_results(module, x, dy)
    with lk.applied(model) as report:
        assert len(report.fused) == 3
        fused = _layer_results(module, x, dy)
    assert fused_calls.take() == 1
    # The yardstick of a gradient is PyTorch in the dtype of the activations.
    low = {n: t if n in ("y", "dx") else t.to(base) for n, t in stock.items()}
    for name, value in fused.items():
        assert value.dtype == stock[name].dtype, name
        assert_within_budget(value, reference[name], low[name], name)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast(weights: torch.dtype, x_dtype: torch.dtype, fused_calls: Calls) -> None:
    model = mlp()
    module = layer(model, "up").to(weights)
    x, dy = torch.randn(33, 20).to(x_dtype), torch.randn(33, 37)
    reference = _layer_results(as_fp64(module), x.double(), dy.double())
    with torch.autocast("cpu", torch.bfloat16):
        stock = _layer_results(module, x, dy)
        lk.apply(model)
        fused = _layer_results(module, x, dy)
    assert fused_calls.take() == 1
    assert fused["y"].dtype == stock["y"].dtype == torch.bfloat16
    for name, value in fused.items():
        assert value.dtype == stock[name].dtype, name
        assert_within_budget(value, reference[name], stock[name].bfloat16(), name)


@pytest.mark.parametrize("shape", [(20,), (0, 20), (2, 3, 4, 20)])
def test_leading_shapes(shape: tuple[int, ...], fused_calls: Calls) -> None:
    model = mlp()
    x = torch.randn(shape)
    reference, stock = as_fp64(model)(x.double()), model(x)
    lk.apply(model)
    fused = model(x)
    assert fused_calls.take() == 3
    assert_within_budget(fused, reference, stock, "y")


def test_scaling_is_read_at_call_time(fused_calls: Calls) -> None:
    model = mlp()
    lk.apply(model)
    module, x = layer(model, "up"), torch.randn(5, 20)
    module.set_scale("default", 3.0)
    fused = module(x)
    assert fused_calls.take() == 1
    lk.unapply(model)
    reference, stock = as_fp64(module)(x.double()), module(x)
    assert_within_budget(fused, reference, stock, "y")
    lk.apply(model)
    module.unscale_layer()
    with pytest.raises(BudgetExceededError):
        assert_within_budget(module(x), reference, stock, "y of another scale")


def test_trainable_base_weight_and_bias() -> None:
    model = mlp()
    model.requires_grad_(True)
    module = layer(model, "up")
    x, dy = torch.randn(9, 20), torch.randn(9, 37)
    reference = _layer_results(as_fp64(module), x.double(), dy.double())
    stock = _layer_results(module, x, dy)
    lk.apply(model)
    fused = _layer_results(module, x, dy)
    assert "base_layer.weight" in fused
    _assert_same(fused, stock, reference)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_frozen_adapter_half(frozen: str) -> None:
    model = mlp()
    module = layer(model, "up")
    getattr(module, frozen).requires_grad_(False)
    x, dy = torch.randn(9, 20), torch.randn(9, 37)
    reference = _layer_results(as_fp64(module), x.double(), dy.double())
    stock = _layer_results(module, x, dy)
    lk.apply(model)
    _assert_same(_layer_results(module, x, dy), stock, reference)


def test_dropout_follows_the_counter(fused_calls: Calls) -> None:
    model = mlp(lora_dropout=0.3).train()
    module, x = layer(model, "up"), torch.randn(65, 20)
    lk.apply(model)
    torch.manual_seed(5)
    fused = module(x)
    assert fused_calls.take() == 1
    torch.manual_seed(5)
    seed = torch.randint(0, 2**62, (), dtype=torch.int64)
    kept = _philox.keep_mask(seed, 65, 20, 0.3) * _philox.keep_scale(0.3)

    def expected(dtype: torch.dtype) -> torch.Tensor:
        w, b, a, lb = (
            t.to(dtype) for t in (
                module.base_layer.weight, module.base_layer.bias,
                module.lora_A["default"].weight, module.lora_B["default"].weight,
            )
        )  # fmt: skip
        rows = x.to(dtype)
        update = (rows * kept.to(dtype)) @ a.t() @ lb.t()
        return rows @ w.t() + b + module.scaling["default"] * update

    assert_within_budget(fused, expected(torch.float64), expected(torch.float32), "y")


def test_dropout_statistics() -> None:
    model = mlp(r=20, lora_alpha=20, lora_dropout=0.25, target_modules=["up"])
    module = layer(model, "up")
    with torch.no_grad():  # y shows the dropped input itself
        module.base_layer.weight.zero_()
        module.base_layer.bias.zero_()
        module.lora_A["default"].weight.copy_(torch.eye(20))
        module.lora_B["default"].weight.copy_(torch.eye(37, 20))
    lk.apply(model.train())
    trials = 2000 * 20
    dropped = int((module(torch.ones(2000, 20))[:, :20] == 0).sum())
    six_sigma = 6 * (trials * 0.25 * 0.75) ** 0.5
    assert abs(dropped - 0.25 * trials) < six_sigma
    model.eval()
    assert int((module(torch.ones(2000, 20))[:, :20] == 0).sum()) == 0


def test_dropout_is_replayed_by_the_seed() -> None:
    model = mlp(lora_dropout=0.3).train()
    lk.apply(model)
    x = torch.randn(7, 20)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_replays_dropout(use_reentrant: bool, fused_calls: Calls) -> None:
    case = CASES["llama"]
    model = case.peft_model(lora_dropout=0.2).train()
    lk.apply(model)
    model.enable_input_require_grads()
    torch.manual_seed(3)
    plain = run(model, case.inputs())
    assert fused_calls.take() == case.layers
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(3)
    checkpointed = run(model, case.inputs())
    assert fused_calls.take() == 2 * case.layers
    assert plain.keys() == checkpointed.keys()
    for name, value in plain.items():
        assert torch.equal(value, checkpointed[name]), name
    torch.manual_seed(4)
    other = run(model, case.inputs())
    assert not torch.equal(other["logits"], plain["logits"])


def test_tied_adapter_is_fused(fused_calls: Calls) -> None:
    """The adapter of a tied head shares its storage, transposed, with the embedding's adapter."""
    base = CASES["llama"].build()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    targets = ["embed_tokens", "lm_head"]
    model = get_peft_model(base, lora_config(target_modules=targets, ensure_weight_tying=True))
    head = layer(model, "lm_head")
    embedding = model.get_input_embeddings()
    assert head.lora_A["default"].weight.data_ptr() == (
        embedding.lora_embedding_B["default"].data_ptr()
    )
    assert not head.lora_A["default"].weight.is_contiguous()
    x, dy = torch.randn(5, 48), torch.randn(5, 97)
    stock = _layer_results(head, x, dy)
    report = lk.apply(model)
    assert [e.status for e in report.layers] == ["stock", "fused"]
    fused = _layer_results(head, x, dy)
    assert fused_calls.take() == 1
    lk.unapply(model)
    _assert_same(fused, stock, _layer_results(model.double() and head, x.double(), dy.double()))
