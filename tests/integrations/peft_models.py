"""Small random models with LoRA whose update is as large as the layer it adapts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)


class Mlp(nn.Module):
    """Odd sizes, one layer without bias, one activation in place on a layer's output."""

    def __init__(self, sizes: tuple[int, ...] = (20, 37, 24, 11)) -> None:
        super().__init__()
        self.up = nn.Linear(sizes[0], sizes[1])
        self.mid = nn.Linear(sizes[1], sizes[2], bias=False)
        self.act = nn.ReLU(inplace=True)
        self.down = nn.Linear(sizes[2], sizes[3])

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.mid(torch.tanh(self.up(x)))))


class QkvBlock(nn.Module):
    """Three layers with one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(48, 40, bias=False)
        self.k_proj, self.v_proj = nn.Linear(48, 40), nn.Linear(48, 40)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.q_proj(x)) * self.k_proj(x) + self.v_proj(x)


def lora_config(**overrides: object) -> LoraConfig:
    settings: dict[str, object] = {
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
        "init_lora_weights": False,
    }
    return LoraConfig(**(settings | overrides))


def mlp(**overrides: object) -> PeftModel:
    torch.manual_seed(0)
    settings = {"target_modules": ["up", "mid", "down"]} | overrides
    return get_peft_model(Mlp(), lora_config(**settings))


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and every gradient of a model that maps one tensor to one."""
    model.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    y = model(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    y.backward(dy)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad} | grads


def layer(model: nn.Module, name: str) -> nn.Module:
    """The LoRA layer whose path ends in `name`."""
    found = [m for n, m in model.named_modules() if n.endswith(name) and hasattr(m, "lora_A")]
    assert len(found) == 1, (name, len(found))
    return found[0]


class Calls:
    """Counts calls of the op by fused layers."""

    def __init__(self) -> None:
        self.count = 0

    def take(self) -> int:
        count, self.count = self.count, 0
        return count


@dataclass(frozen=True)
class Case:
    """A model family: how to build it, its inputs, and how many LoRA linears it has."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    layers: int
    fan_in_fan_out: bool = False

    def peft_model(self, **overrides: object) -> PeftModel:
        torch.manual_seed(0)
        config = lora_config(fan_in_fan_out=self.fan_in_fan_out, **overrides)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return get_peft_model(self.build(), config).eval()


def _ids() -> Tensor:
    return torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(1))


CASES = {
    "llama": Case(
        lambda: LlamaForCausalLM(
            LlamaConfig(
                hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=97, initializer_range=0.1,
            )
        ),
        lambda: {"input_ids": _ids(), "labels": _ids()},
        layers=14,
    ),
    "bert": Case(
        lambda: BertForSequenceClassification(
            BertConfig(
                hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
                vocab_size=97, initializer_range=0.1, num_labels=3,
            )
        ),
        lambda: {"input_ids": _ids(), "labels": torch.tensor([0, 2])},
        layers=14,
    ),
    "gpt2": Case(
        lambda: GPT2LMHeadModel(
            GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=97, initializer_range=0.1)
        ),
        lambda: {"input_ids": _ids(), "labels": _ids()},
        layers=8,
        fan_in_fan_out=True,
    ),
    "t5": Case(
        lambda: T5ForConditionalGeneration(
            T5Config(
                d_model=48, d_kv=12, d_ff=80, num_layers=2, num_heads=4, vocab_size=97,
                decoder_start_token_id=0,
            )
        ),
        lambda: {"input_ids": _ids(), "labels": _ids()},
        layers=32,
    ),
}  # fmt: skip


def run(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits and the gradient of every trainable parameter."""
    model.zero_grad(set_to_none=True)
    out = model(**inputs)
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach()} | grads


def as_fp64(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()
