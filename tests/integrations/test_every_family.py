"""Every architecture of transformers that a tiny configuration builds: stock PEFT against ours.

A sweep over some 400 models, of which what the library or PEFT cannot run is skipped. In fp32: in
bf16 the best experts of a random router change with the last bit of its input.
"""

from __future__ import annotations

import copy
import gc
import warnings
from typing import Any

import pytest
import tiny_architectures
import torch
from families import NothingInFloat32
from peft import LoraConfig, get_peft_model
from tiny_architectures import ALTERNATIVES, ARCHITECTURES, NotBuiltError
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.testing import assert_within_budget

pytestmark = pytest.mark.slow
FACTOR = 3.0  # FlashAttention's own rule for gradients through attention
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
# PEFT refuses these layers of Mamba; a router's result is no tensor.
WITHOUT = r".*(out_proj|conv1d|router|router\.layer)$"


def run(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Result at what is there, and all gradients, those of the input embedding among them."""
    model.zero_grad(set_to_none=True)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    floats = {k: t.to(dtype) if t.is_floating_point() else t for k, t in inputs.items()}
    torch.manual_seed(7)
    out = model(**floats)
    y = out.logits if getattr(out, "logits", None) is not None else out[0]
    y = y[0] if isinstance(y, (tuple, list)) else y
    mask = inputs.get("attention_mask")
    if mask is not None and y.dim() == 3 and y.shape[:2] == mask.shape:
        y = y * mask.unsqueeze(-1)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    total = (y * weights).sum() / y.numel() ** 0.5
    loss = out.get("loss") if hasattr(out, "get") else None
    if loss is not None and loss.dim() == 0 and bool(loss.isfinite()):
        total = total + loss
    total.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"result": y.detach().clone()} | grads


def stock_model(architecture: str, padded: str) -> tuple[Any, dict[str, Tensor]]:
    """PEFT's model and inputs with which it runs; skips where there is none."""
    reason = ""
    tries = [(o, {}) for o in ALTERNATIVES] + [({}, {"exclude_modules": WITHOUT})]
    for others, lora in tries:
        try:
            base: Any = tiny_architectures.build(architecture, **others)
            inputs = tiny_architectures.inputs(architecture, base, padded)
            torch.manual_seed(1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = get_peft_model(base, LoraConfig(**LORA, **lora)).eval()
            for p in base.get_input_embeddings().parameters():
                p.requires_grad_(True)
            run(model, inputs)
            copy.deepcopy(model)
            return model, inputs
        except NotBuiltError as error:
            reason = reason or f"not built: {error}"
        except Exception as error:  # stock code alone has run so far
            reason = reason or f"stock PEFT fails: {type(error).__name__}: {error}"
    pytest.skip(reason.splitlines()[0][:200])


def scaled(values: dict[str, Tensor], exact: dict[str, Tensor]) -> Tensor:
    """All gradients as one vector, each by the size of its tensor: the rounding of a whole model
    falls on one or the other of them."""
    names = sorted(n for n, t in exact.items() if n != "result" and t.abs().max() > 0)
    return torch.cat([(values[n] / exact[n].abs().max().to(values[n])).flatten() for n in names])


@pytest.fixture(autouse=True)
def _collect() -> Any:
    yield
    gc.collect()


@pytest.mark.parametrize("padded", ["right", "left", "none"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_eager_against_ours(architecture: str, padded: str) -> None:
    if padded == "left" and not architecture.startswith("causal"):
        pytest.skip("padded on the left are prompts")
    stock, inputs = stock_model(architecture, padded)
    low = run(stock, inputs)
    if any(not torch.equal(low[n], t) for n, t in run(stock, inputs).items()):
        pytest.skip("two stock runs differ")
    try:
        with NothingInFloat32():
            exact = run(copy.deepcopy(stock).double(), inputs)
    except Exception as error:
        pytest.skip(f"no fp64: {type(error).__name__}: {error}"[:200])
    if not all(bool(t.isfinite().all()) for t in (*exact.values(), *low.values())):
        pytest.skip("stock results are not finite")
    for attention in ("eager", "lora_kernels"):
        ours = copy.deepcopy(stock)
        if attention != "eager":
            lk.register_attention()
            ours.get_base_model().set_attn_implementation(attention)
        report = lk.apply(ours, fused_loss=True, recompute_activations=attention != "eager")
        assert str(report) and len(report.layers) == sum(_is_lora(m) for m in ours.modules())
        assert list(ours.state_dict()) == list(stock.state_dict())
        try:
            got = run(ours, inputs)
        except lk.errors.InvalidArgumentError as error:
            assert attention != "eager" and "does not honour" in str(error)
            continue
        assert got.keys() == low.keys()
        assert_within_budget(got["result"], exact["result"], low["result"], attention, FACTOR)
        assert_within_budget(
            scaled(got, exact), scaled(exact, exact), scaled(low, exact), attention, FACTOR
        )
        lk.unapply(ours)
        if attention == "eager":
            back = run(ours, inputs)
            assert all(torch.equal(back[n], t) for n, t in low.items())
        assert [type(m) for m in ours.modules()] == [type(m) for m in stock.modules()]


def _is_lora(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a.startswith("causal")])
def test_greedy_tokens(architecture: str) -> None:
    stock, inputs = stock_model(architecture, "left")
    prompt = {k: t for k, t in inputs.items() if k in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    try:
        want = stock.generate(**prompt, **options)
    except Exception as error:
        pytest.skip(f"stock PEFT fails: {type(error).__name__}: {error}"[:200])
    lk.register_attention()
    stock.get_base_model().set_attn_implementation("lora_kernels")
    lk.apply(stock, fused_loss=True)
    try:
        assert torch.equal(stock.generate(**prompt, **options), want)
    except lk.errors.InvalidArgumentError as error:
        assert "does not honour" in str(error)
