"""A whole model with dropout: the same bits with checkpointing and without, however it is fused."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lora_kernels as lk


def model_of(targets: object, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    base = FAMILIES["llama"].build().to(dtype)
    base.config.use_cache = False
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.3, target_modules=targets, init_lora_weights=False
    )
    model = get_peft_model(base, config).train()
    model.enable_input_require_grads()
    return model


def gradients(model: nn.Module, tokens: Tensor, seed: int = 7) -> list[Tensor]:
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute_activations"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpoint", "reentrant"])
@pytest.mark.parametrize(
    ("targets", "dtype"),
    [("all-linear", torch.float32), (["q_proj", "v_proj"], torch.bfloat16)],
    ids=["all", "q-v"],
)
def test_masks_are_replayed(targets, dtype, reentrant, recompute):
    tokens = torch.randint(32, (2, 11), generator=torch.Generator().manual_seed(1))
    model = model_of(targets, dtype)
    lk.apply(model, recompute_activations=recompute)
    want = gradients(model, tokens)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    got = gradients(model, tokens)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    other = gradients(model, tokens, seed=8)
    assert not any(torch.equal(a, b) for a, b in zip(got[1:], other[1:], strict=True))
