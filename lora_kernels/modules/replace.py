"""Give the linear layers of any model an adapter; torch only."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.modules.eligibility import check_dtype, check_hyperparameters, weight_shape
from lora_kernels.modules.encoder_fast_path import disable_where_adapted
from lora_kernels.modules.layer_types import ADAPTED, adapt, is_other_kind, obstacle
from lora_kernels.modules.lora_linear import LoRALinear
from lora_kernels.modules.lora_transposed_linear import is_conv1d
from lora_kernels.modules.quant_linear import QuantLinear
from lora_kernels.modules.quant_lora_linear import QuantLoRALinear
from lora_kernels.modules.quant_options import QuantOptions, quant_options
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
    quant: str | QuantOptions | None = None,
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
        targets: ``"all-linear"``: every linear layer (transformers' Conv1D too) except the output
            head of a model that has one (output embeddings, or the classification head ``score``
            or ``classifier``); a list of module names or their endings; or a regular expression
            for the whole name. Embeddings, convolutions and LSTMs that are named become
            :class:`LoRAEmbedding`, :class:`LoRAConv1d` (2d, 3d) and :class:`LoRALSTM`.
        quant: quantize the weights of the layers on the way (QLoRA): a format name of
            :func:`lora_kernels.ops.quantize` (``"nf4"``, ``"int8"``, ...) or an object with its
            options (:class:`lora_kernels.QuantConfig`). The layers become
            :class:`QuantLoRALinear`, on the device where they are; the dense weights are freed as
            nothing else holds them. Layers that are quantized already keep their format.
            Layers that the model asks to keep in fp32 are left alone.
        exclude: names or a regular expression of layers to leave alone, as `targets`.
        modules_to_save: names or endings of modules that stay trainable as they are (a new
            classification head, say). :func:`save_adapter` writes them with the adapter.

    Returns:
        A report with every linear layer and every named one: ``fused``, or ``stock`` with the
        reason. Only layers whose type is exactly the torch class or QuantLinear are replaced.

    A layer that is reached under several names is replaced under all of them. On an error the
    model is as it was.

    Raises:
        InvalidArgumentError: an argument that cannot be used, a PEFT model, or no layer to replace.
        BackendUnavailableError: ``LORA_KERNELS_BACKEND`` names a backend that cannot run here.
    """
    options_of_quant = quant_options(quant)
    if quant is not None and dora:
        raise InvalidArgumentError("dora=True; a quantized layer takes plain adapters only")
    check_hyperparameters(r, alpha, dropout)
    check_dtype(adapter_dtype, "adapter_dtype")
    model = unwrap(model)
    refuse_peft(model, "lora_kernels.apply(model)")
    saved = find_saved_modules(model, modules_to_save)
    kept = getattr(model, "_keep_in_fp32_modules", None) or () if quant is not None else ()
    plan = _plan(model, targets, exclude, saved, kept, quant is not None)
    options = {
        "r": r, "alpha": alpha, "dropout": dropout, "rslora": rslora, "dora": dora,
        "adapter_dtype": adapter_dtype,
    }  # fmt: skip
    chosen = {n: c.module for n, c in plan.items() if not c.reason}
    if dora and any(isinstance(m, QuantLinear) for m in chosen.values()):
        raise InvalidArgumentError("dora=True; a quantized layer takes plain adapters only")
    check_backends(m for m in chosen.values() if isinstance(m, nn.Linear))
    names = {id(m): name for name, m in chosen.items()}
    made = install(
        model,
        {m: options for m in chosen.values() if not isinstance(m, ADAPTED)},
        trainable=list(saved.values()),
        quant=options_of_quant,
        names=names,
    )
    return Report([_entry(name, c, made.get(c.module), r) for name, c in plan.items()])


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
        if any(isinstance(inner, ADAPTED) for m in hits.values() for inner in m.modules()):
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
    in_fp32: Collection[str] = (),
    quantizes: bool = False,
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
        linear = isinstance(module, nn.Linear) or is_conv1d(module)
        if not linear and (everything or not hit or not module._parameters):
            continue
        if key in kept:
            reason = kept[key]
        elif not hit:
            reason = "not in targets"
        elif any(excluded(name) for name in names[key]):
            reason = "in exclude"
        elif any(part in in_fp32 for name in names[key] for part in name.split(".")):
            reason = "the model keeps it in fp32, so it is not quantized"
        elif isinstance(module, ADAPTED):
            reason, usable = "", usable + 1
        elif quantizes and is_other_kind(module):
            reason = f"a {type(module).__name__} layer cannot be quantized"
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


def _entry(name: str, choice: _Choice, made: nn.Module | None, r: int) -> LayerReport:
    if choice.reason:
        return LayerReport(name, STOCK, choice.reason)
    present = isinstance(choice.module, ADAPTED)
    kind = type(choice.module).__name__
    reason = f"already a {kind}, left as it was" if present else ""
    return LayerReport(name, FUSED, reason, backend_for(made or choice.module, r))


def check_backends(linears: Iterable[nn.Linear]) -> None:
    """Raise BackendUnavailableError while the model still is as it was."""
    for linear in linears:
        backend_for(linear, 1)


def backend_for(linear: nn.Module, r: int) -> str:
    """The backend that would run this layer on a batch of usual size."""
    if not isinstance(linear, nn.Linear):
        return "aten"  # torch's own kernels around two thin products
    n, k = weight_shape(linear)
    shapes: dict[str, Any] = {"M": _NOMINAL_ROWS, "K": k, "N": n, "rank": r}
    shapes["device"] = linear.weight.device.type
    if isinstance(linear, QuantLinear):
        s = linear.spec
        shapes |= {
            "format": s.format, "layout": s.layout, "block_size": s.block_size,
            "nested": s.nested_block_size > 0, "act_order": s.act_order, "dtype": s.dtype,
        }  # fmt: skip
        return explain("quant_linear", **shapes)["backend"]
    return explain("lora_linear", dtype=linear.weight.dtype, **shapes)["backend"]


def install(
    model: nn.Module,
    adapters: dict[nn.Module, dict[str, Any]],
    trainable: list[nn.Module],
    quant: dict[str, Any] | None = None,
    names: dict[int, str] | None = None,
) -> dict[nn.Module, nn.Module]:
    """Put an adapted layer in the place of each key, built with its keywords; freeze the rest.

    `quant` are the keywords of :meth:`QuantLinear.from_linear`; None leaves weights as they are.
    The `trainable` modules get requires_grad, as do those of earlier calls. Nothing has changed
    when this raises.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        made = {
            linear: adapted(linear, options, quant, (names or {}).get(id(linear)))
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


def adapted(
    linear: nn.Module, options: dict[str, Any], quant: dict[str, Any] | None, name: str | None
) -> nn.Module:
    """`linear` with a new adapter, its weight quantized if it is to be or already is."""
    if not isinstance(linear, nn.Linear):
        return adapt(linear, options)
    if quant is not None and not isinstance(linear, QuantLinear):
        linear = QuantLinear.from_linear(linear, name=f"{name}.weight" if name else None, **quant)
    if isinstance(linear, QuantLinear):
        plain = {key: value for key, value in options.items() if key != "dora"}
        if options.get("dora"):
            raise InvalidArgumentError("dora=True; a quantized layer takes plain adapters only")
        return QuantLoRALinear.from_quant_linear(linear, **plain)
    return LoRALinear.from_linear(linear, **options)


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
