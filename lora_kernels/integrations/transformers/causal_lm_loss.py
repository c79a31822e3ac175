"""The loss of transformers' causal language models by linear_cross_entropy: no logits are made.

While a call with labels runs, the head returns `DeferredLogits` and the loss function computes the
loss from hidden states and head. Calls without labels, compiled calls and whatever reads the
returned logits get them from the head as always.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.integrations.transformers.deferred_logits import DeferredLogits
from lora_kernels.modules.report import FUSED, STOCK, LayerReport
from lora_kernels.ops import explain, linear_cross_entropy

_DEFER = "_lora_kernels_defer"  # on a head: a call with labels is running
_HOOKS = "_lora_kernels_loss_hooks"  # on a model: what fuse_loss registered
_TOKENS = 1024  # of the problem for which the report names a backend


def fuse_loss(model: nn.Module) -> list[LayerReport]:
    """Let every causal language model in `model` compute its loss without logits.

    Only the loss changes its route: ``outputs.logits`` are exact when read, made at that moment.
    Nothing in the state dict changes. Calling it again looks anew.

    Returns:
        One entry per causal language model found, named by its head, ``fused`` or ``stock`` with
        the reason.
    """
    entries = []
    for name, causal in _causal_models(model):
        head_name = ".".join(p for p in (name, _name_of_head(causal)) if p)
        reason = _obstacle(causal)
        if reason:
            _restore(causal)
            entries.append(LayerReport(head_name, STOCK, reason))
            continue
        _convert(causal)
        weight = _plain_linear(causal.get_output_embeddings()).weight
        chosen = explain(
            "linear_cross_entropy", M=_TOKENS, K=weight.shape[1], V=weight.shape[0],
            dtype=weight.dtype, device=weight.device.type,
        )["backend"]  # fmt: skip
        entries.append(LayerReport(head_name, FUSED, backend=chosen))
    return entries


def unfuse_loss(model: nn.Module) -> int:
    """Give every causal language model in `model` its own loss back; how many changed."""
    return sum(_restore(causal) for _, causal in _causal_models(model))


def loss_is_fused(model: nn.Module) -> bool:
    """Does any causal language model in `model` compute its loss without logits."""
    return any(hasattr(causal, _HOOKS) for _, causal in _causal_models(model))


def _causal_models(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from transformers import PreTrainedModel

    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            yield name, module


def _name_of_head(causal: Any) -> str:
    head = causal.get_output_embeddings()
    return next((n for n, m in causal.named_modules() if m is head), "lm_head")


def _stock_loss() -> Callable[..., Tensor]:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss


def _obstacle(causal: Any) -> str:
    """Why the loss stays as it is; empty where it can be fused."""
    head = causal.get_output_embeddings()
    loss = causal.loss_function
    if getattr(loss, "func", None) is not _loss and loss is not _stock_loss():
        return "the model has a loss function of its own"
    if getattr(causal, "loss_type", None) not in (None, "ForCausalLM"):
        return f"loss_type is {causal.loss_type}, not ForCausalLM"
    plain = _plain_linear(head)
    if plain is None:
        return (
            f"the head is a {type(head).__name__}; accepted: nn.Linear, PEFT's lora.Linear on one"
        )
    if any((head._forward_hooks, head._forward_pre_hooks, plain._forward_hooks)):
        return "the head has hooks, which would not see its call"
    return ""


def _plain_linear(head: Any) -> Any:
    """The nn.Linear of a head, itself or below PEFT's LoRA layer; None for anything else."""
    if type(head) is nn.Linear:
        return head
    base = getattr(head, "base_layer", None)
    if type(base) is nn.Linear and hasattr(head, "lora_A") and hasattr(head, "active_adapters"):
        return base
    return None


def _convert(causal: Any) -> None:
    if hasattr(causal, _HOOKS):
        return
    head = causal.get_output_embeddings()
    setattr(head, _DEFER, False)
    head.forward = functools.partial(_head_forward, head)
    causal.loss_function = functools.partial(_loss, causal.loss_function)
    hooks = (
        causal.register_forward_pre_hook(_before, with_kwargs=True),
        causal.register_forward_hook(_after, always_call=True),
    )
    setattr(causal, _HOOKS, hooks)


def _restore(causal: Any) -> bool:
    hooks = causal.__dict__.pop(_HOOKS, None)
    if hooks is None:
        return False
    for hook in hooks:
        hook.remove()
    head = causal.get_output_embeddings()
    head.__dict__.pop("forward", None)
    head.__dict__.pop(_DEFER, None)
    causal.__dict__.pop("_loss_function", None)
    return True


def _before(causal: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    head = causal.get_output_embeddings()
    setattr(head, _DEFER, kwargs.get("labels") is not None and not torch.compiler.is_compiling())


def _after(causal: Any, args: tuple[Any, ...], output: Any) -> None:
    setattr(causal.get_output_embeddings(), _DEFER, False)


def _head_forward(head: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or not getattr(head, _DEFER, False) or not _whole(head, hidden):
        return type(head).forward(head, hidden, *args, **kwargs)
    weight = _plain_linear(head).weight
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return DeferredLogits(head, hidden, torch.Size((*hidden.shape[:-1], weight.shape[0])), dtype)


def _whole(head: Any, hidden: Tensor) -> bool:
    """Is what the op would read all there: no shard, no dtype mix that the head would refuse."""
    plain = _plain_linear(head)
    if plain is None or type(plain.weight) is not nn.Parameter or plain.weight.dim() != 2:
        return False
    same = plain.weight.dtype == hidden.dtype or torch.is_autocast_enabled(hidden.device.type)
    return same and type(hidden) is Tensor and _adapter(head) is not None


def _adapter(head: Any) -> dict[str, Any] | None:
    """The adapter arguments of the op: none for a plain head, None where a call needs more than
    one plain adapter (several, variants, dropout, bias)."""
    if type(head) is nn.Linear or head.disable_adapters or head.merged:
        return {}
    active = [name for name in head.active_adapters if name in head.lora_A]
    if not active:
        return {}
    if len(active) > 1 or getattr(head, "fan_in_fan_out", False):
        return None
    (name,) = active
    dropout = head.lora_dropout[name]
    drops = head.training and not isinstance(dropout, nn.Identity) and dropout.p > 0.0
    variant = getattr(head, "lora_variant", {}).get(name) or getattr(head, "use_dora", {}).get(name)
    if drops or variant or head.lora_B[name].bias is not None:
        return None
    return {
        "lora_a": head.lora_A[name].weight,
        "lora_b": head.lora_B[name].weight,
        "scaling": float(head.scaling[name]),
    }


def _options(steps: tuple[tuple[str, float], ...]) -> dict[str, float] | None:
    """What was done to the logits, as a factor of the hidden states and a softcap."""
    kinds = [kind for kind, _ in steps]
    factors = [factor for _, factor in steps]
    if "tanh" not in kinds:
        return {"factor": math.prod(factors)}
    at = kinds.index("tanh")
    cap = math.prod(factors[at + 1 :])
    if "tanh" in kinds[at + 1 :] or cap <= 0.0:
        return None
    # cap tanh(f z) = cap tanh((f cap z) / cap)
    return {"factor": math.prod(factors[:at]) * cap, "softcap": cap}


def _loss(
    stock: Callable[..., Tensor], logits: Tensor, labels: Tensor, vocab_size: int,
    num_items_in_batch: Tensor | int | None = None, ignore_index: int = -100,
    shift_labels: Tensor | None = None, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """As transformers' ForCausalLMLoss."""
    options = _options(logits.steps) if isinstance(logits, DeferredLogits) else None
    adapter = _adapter(logits.head) if isinstance(logits, DeferredLogits) else None
    if options is None or adapter is None or logits.shape[-1] != vocab_size:
        return stock(
            logits=logits, labels=labels, vocab_size=vocab_size,
            num_items_in_batch=num_items_in_batch, ignore_index=ignore_index,
            shift_labels=shift_labels, **kwargs,
        )  # fmt: skip
    assert isinstance(logits, DeferredLogits)
    plain = _plain_linear(logits.head)
    hidden = logits.hidden
    factor = options.pop("factor")
    if abs(factor - 1.0) > 1e-12:
        hidden = hidden * factor
    shifted = labels if shift_labels is None else shift_labels
    loss = linear_cross_entropy(
        hidden, plain.weight, shifted.to(hidden.device).view(hidden.shape[:-1]),
        bias=plain.bias, ignore_index=ignore_index, shift=shift_labels is None,
        reduction="mean" if num_items_in_batch is None else "sum",
        softcap=options.get("softcap"), **adapter,
    )  # fmt: skip
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch
