"""Give the linear layers of any model an adapter; torch only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.modules.eligibility import check_dtype, check_hyperparameters, obstacle
from lora_kernels.modules.encoder_fast_path import disable_where_adapted
from lora_kernels.modules.lora_linear import LoRALinear
from lora_kernels.modules.report import FUSED, STOCK, LayerReport, Report
from lora_kernels.modules.targets import (
    ALL_LINEAR,
    check_names,
    is_all_linear,
    matcher,
    output_head,
)
from lora_kernels.modules.traversal import (
    adapter_parameters,
    named_modules,
    refuse_peft,
    tied_outside,
    unwrap,
)
from lora_kernels.ops import explain

# The backend column of the report is asked for a batch of this many rows.
_NOMINAL_ROWS = 512
_SHOWN = 6


def replace_modules(
    model: nn.Module,
    r: int = 16,
    alpha: float = 32,
    targets: str | Sequence[str] = ALL_LINEAR,
    dropout: float = 0.0,
    quant: None = None,
    *,
    rslora: bool = False,
    dora: bool = False,
    adapter_dtype: torch.dtype | None = None,
    exclude: str | Sequence[str] = (),
    modules_to_save: Sequence[str] = (),
) -> Report:
    """Replace linear layers of `model` by :class:`LoRALinear`, in place, and freeze the rest.

    Args:
        model: any module. Its weights are shared with the new layers, not copied.
        r, alpha, dropout, rslora, dora, adapter_dtype: as in :class:`LoRALinear`.
        targets: ``"all-linear"``: every linear layer except the output head of a model that has
            one (output embeddings, or the classification head ``score`` or ``classifier``); a list
            of module names or their endings; or a regular expression for the whole name.
        quant: None; quantized weights are not supported.
        exclude: names or a regular expression of layers to leave alone, as `targets`.
        modules_to_save: names or endings of modules that stay trainable as they are (a new
            classification head, say). :func:`save_adapter` writes them with the adapter.

    Returns:
        A report with every linear layer: ``fused``, or ``stock`` with the reason. Only layers
        whose type is exactly torch.nn.Linear are replaced.

    A layer that is reached under several names is replaced under all of them. On an error the
    model is as it was.

    Raises:
        InvalidArgumentError: an argument that cannot be used, a PEFT model, or no layer to replace.
        BackendUnavailableError: ``LORA_KERNELS_BACKEND`` names a backend that cannot run here.
    """
    if quant is not None:
        raise InvalidArgumentError(f"quant={quant!r}; accepted: None (no quantized weights)")
    check_hyperparameters(r, alpha, dropout)
    check_dtype(adapter_dtype, "adapter_dtype")
    model = unwrap(model)
    refuse_peft(model, "lora_kernels.apply(model)")
    saved = find_saved_modules(model, modules_to_save)
    plan = _plan(model, targets, exclude, saved)
    report = Report([_entry(name, choice, r) for name, choice in plan.items()])
    options = {
        "r": r, "alpha": alpha, "dropout": dropout, "rslora": rslora, "dora": dora,
        "adapter_dtype": adapter_dtype,
    }  # fmt: skip
    chosen = [c.module for c in plan.values() if not c.reason]
    install(
        model, {m: options for m in chosen if type(m) is nn.Linear}, trainable=list(saved.values())
    )
    return report


@dataclass(frozen=True)
class _Choice:
    module: nn.Module
    reason: str


def find_saved_modules(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that `names` stand for; each name must stand for one at least."""
    names = check_names(names, "modules_to_save")
    found: dict[str, nn.Module] = {}
    for wanted in names:
        matches = matcher([wanted], "modules_to_save")
        hits = {name: m for name, m in named_modules(model, duplicates=False) if matches(name)}
        if not hits:
            raise InvalidArgumentError(f"modules_to_save: the model has no module {wanted!r}")
        if any(isinstance(inner, LoRALinear) for m in hits.values() for inner in m.modules()):
            raise InvalidArgumentError(f"modules_to_save: {wanted!r} already has an adapter")
        found |= hits
    tied = tied_outside(model, list(found.values()))
    if tied:
        raise InvalidArgumentError(
            f"modules_to_save: {tied[0]!r} is tied to {tied[1]!r}; untie them first"
        )
    return found


def _plan(
    model: nn.Module,
    targets: str | Sequence[str],
    exclude: str | Sequence[str],
    saved: dict[str, nn.Module],
) -> dict[str, _Choice]:
    """First name -> what to do with it, for every linear layer and every match."""
    everything = is_all_linear(targets)
    targeted = (lambda name: True) if everything else matcher(targets, "targets")
    excluded = matcher(exclude, "exclude")
    kept = {id(inner): "in modules_to_save" for m in saved.values() for inner in m.modules()}
    head = output_head(model) if everything else None
    if head is not None:
        for inner in head[0].modules():
            kept.setdefault(id(inner), f"{head[1]}, frozen; modules_to_save would train it")
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in named_modules(model):
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    plan, usable = {}, 0
    for key, module in modules.items():
        hit = any(targeted(name) for name in names[key])
        linear = isinstance(module, nn.Linear)
        if not linear and (everything or not hit or not module._parameters):
            continue
        if key in kept:
            reason = kept[key]
        elif not hit:
            reason = "not in targets"
        elif any(excluded(name) for name in names[key]):
            reason = "in exclude"
        elif isinstance(module, LoRALinear):
            reason, usable = "", usable + 1
        else:
            reason = obstacle(module)
            if not reason and "" in names[key]:
                reason = "it is the model itself; use LoRALinear.from_linear(model)"
            usable += not reason
        plan[names[key][0]] = _Choice(module, reason)
    if not usable:
        _raise_nothing_to_replace(targets, plan)
    return plan


def _raise_nothing_to_replace(targets: object, plan: dict[str, _Choice]) -> None:
    for name, choice in plan.items():
        if choice.reason and choice.reason not in ("not in targets", "in exclude"):
            raise InvalidArgumentError(
                f"targets={targets!r} match no layer that can be replaced; "
                f"{name or 'the model'}: {choice.reason}"
            )
    linears = list(plan)
    shown = ", ".join(linears[:_SHOWN]) + (", ..." if len(linears) > _SHOWN else "")
    raise InvalidArgumentError(
        f"targets={targets!r} match no linear layer of the model; it has "
        + (f"{len(linears)}: {shown}" if linears else "none")
    )


def _entry(name: str, choice: _Choice, r: int) -> LayerReport:
    if choice.reason:
        return LayerReport(name, STOCK, choice.reason)
    assert isinstance(choice.module, nn.Linear)
    present = isinstance(choice.module, LoRALinear)
    reason = "already a LoRALinear, left as it was" if present else ""
    return LayerReport(name, FUSED, reason, backend_for(choice.module, r))


def backend_for(linear: nn.Linear, r: int) -> str:
    """The backend that would run this layer on a batch of usual size."""
    weight = linear.weight
    n, k = weight.shape
    return explain(
        "lora_linear", M=_NOMINAL_ROWS, K=k, N=n, rank=r, dtype=weight.dtype,
        device=weight.device.type,
    )["backend"]  # fmt: skip


def install(
    model: nn.Module, adapters: dict[nn.Linear, dict[str, Any]], trainable: list[nn.Module]
) -> dict[nn.Linear, LoRALinear]:
    """Put a LoRALinear in the place of each key, built with its keywords; freeze the rest.

    The `trainable` modules get requires_grad, as do those of earlier calls. Nothing has changed
    when this raises.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        made = {
            linear: LoRALinear.from_linear(linear, **options)
            for linear, options in adapters.items()
        }
    except BaseException:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if child in made:
                setattr(parent, child_name, made[child])
    disable_where_adapted(model)
    for module in trainable:
        module.saved_with_adapter = True  # type: ignore[assignment]
    _freeze_all_but_adapters(model)
    return made


def _freeze_all_but_adapters(model: nn.Module) -> None:
    wanted: set[int] = set()
    for module in model.modules():
        if getattr(module, "saved_with_adapter", False):
            wanted |= {id(p) for p in module.parameters()}
        else:
            wanted |= {id(p) for p in adapter_parameters(module)}
    for parameter in model.parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(id(parameter) in wanted)
