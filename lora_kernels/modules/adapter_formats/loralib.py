"""State dicts of loralib: ``<layer>.lora_A`` [r, K] and ``<layer>.lora_B`` [N, r].

Its MergedLinear adapts some of the equal parts of a fused projection (query and value of a fused
q/k/v, say): g parts of n parts, lora_A [g r, K], lora_B [g N/n, r], each part with rows of its own.
Which parts those are, and alpha, stands in the code that built the model and not in the file.
Source: the layers and ``lora_state_dict`` of https://github.com/microsoft/LoRA (loralib).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.modules.adapter_formats.adapter import (
    MAGNITUDE,
    A,
    Adapter,
    B,
    check_pairs,
    make_config,
    reject,
    saved_modules,
)
from lora_kernels.modules.adapter_tensors import PREFIX

# Key of the configuration beside a file that :func:`to_loralib` made.
ENABLED = "enable_lora"
_SUFFIXES = {".lora_A": A, ".lora_B": B}


def recognised(names: Sequence[str]) -> bool:
    return any(name.endswith(tuple(_SUFFIXES)) for name in names)


def from_loralib(
    state: dict[str, Tensor],
    path: object,
    alpha: float | None,
    enabled: Sequence[bool] | None,
    config: dict | None,
) -> Adapter:
    """To PEFT's names.

    Args:
        alpha: loralib's ``lora_alpha``; needed without `config`.
        enabled: loralib's ``enable_lora``, for files with MergedLinear layers.
        config: PEFT's configuration, where the file was written by :func:`to_loralib`.

    Raises:
        AdapterFileError: a tensor outside the format, or a missing argument.
    """
    if alpha is None and config is None:
        reject(
            path, "loralib files do not hold alpha; give the lora_alpha of the training (--alpha)"
        )
    if config is not None:
        config = dict(config)
        kept = config.pop(ENABLED, None)
        enabled = kept if enabled is None else enabled
    raw: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in state.items():
        suffix = next((s for s in _SUFFIXES if key.endswith(s)), None)
        if suffix is not None:
            raw.setdefault(key.removesuffix(suffix), {})[_SUFFIXES[suffix]] = tensor
        elif "lora_" in key:
            reject(path, f"tensor {key!r} is not supported; accepted: lora_A, lora_B")
        else:
            others[key] = tensor
    biases = [f"{layer}.bias" for layer in raw if f"{layer}.bias" in others]
    if biases:
        reject(path, f"{biases[0]!r} is a bias of the base model, which PEFT keeps elsewhere")
    tensors: dict[str, Tensor] = {}
    rules: dict[str, tuple[int, float]] = {}
    groups: list[int] = []
    for layer, factors in raw.items():
        group = 1
        if len(factors) == 2 and factors[A].dim() == 2 == factors[B].dim():
            group = _groups(layer, factors[A], factors[B], path)
            if group > 1:
                factors[B] = _spread(layer, factors[B], group, enabled, path)
                groups.append(group)
        for suffix in (A, B):
            if suffix in factors:
                tensors[f"{PREFIX}{layer}{suffix}"] = factors[suffix]
        rules[layer] = (factors[A].shape[0] if A in factors else 1, group * (alpha or 1.0))
    if not rules:
        reject(path, "it has no pair of lora_A and lora_B")
    saved = saved_modules(others, rules)
    tensors |= {PREFIX + key: tensor for key, tensor in others.items()}
    if config is None or alpha is not None:
        config = make_config(rules, saved, dora=False, base=None)
    adapter = Adapter(tensors, config)
    if groups:
        adapter.notes.append(
            f"{len(groups)} merged layers became block-diagonal: rank {groups[0]} times as large"
        )
    check_pairs(adapter, path)
    return adapter


def _groups(layer: str, a: Tensor, b: Tensor, path: object) -> int:
    if a.shape[0] == b.shape[1]:
        return 1
    if b.shape[1] < 1 or a.shape[0] % b.shape[1]:
        reject(path, f"layer {layer!r} has lora_A {list(a.shape)} and lora_B {list(b.shape)}")
    return a.shape[0] // b.shape[1]


def _spread(
    layer: str, b: Tensor, group: int, enabled: Sequence[bool] | None, path: object
) -> Tensor:
    """B of a MergedLinear as the block-diagonal [N, g r] that it stands for."""
    if enabled is None:
        reject(
            path,
            f"layer {layer!r} is a MergedLinear with {group} adapted parts; say which parts of the "
            "layer they are (--enable-lora, as in the training: 1,0,1 for query and value)",
        )
    if sum(enabled) != group or b.shape[0] % group:
        reject(
            path,
            f"layer {layer!r} has {group} adapted parts, --enable-lora names {sum(enabled)}",
        )
    part, r = b.shape[0] // group, b.shape[1]
    whole = b.new_zeros(part * len(enabled), r * group)
    blocks = iter(range(group))
    for position, on in enumerate(enabled):
        if on:
            g = next(blocks)
            whole[position * part : (position + 1) * part, g * r : (g + 1) * r] = b[
                g * part : (g + 1) * part
            ]
    return whole


def _gather(layer: str, b: Tensor, enabled: Sequence[bool], path: object) -> Tensor:
    """The reverse of :func:`_spread`; nothing outside of the blocks may be lost."""
    group = sum(enabled)
    if b.shape[0] % len(enabled) or b.shape[1] % group:
        reject(path, f"layer {layer!r}: lora_B {list(b.shape)} has no {len(enabled)} equal parts")
    part, r = b.shape[0] // len(enabled), b.shape[1] // group
    rows = [p for p, on in enumerate(enabled) if on]
    blocks = [b[p * part : (p + 1) * part, g * r : (g + 1) * r] for g, p in enumerate(rows)]
    compact = torch.cat(blocks)
    if not torch.equal(_spread(layer, compact, group, enabled, path), b):
        reject(path, f"layer {layer!r}: lora_B is not block-diagonal; leave out --enable-lora")
    return compact


def to_loralib(adapter: Adapter, path: object, enabled: Sequence[bool] | None) -> dict[str, Tensor]:
    """From PEFT's names; `enabled` folds block-diagonal layers into MergedLinear's.

    Raises:
        AdapterFileError: something that loralib has no layer for.
    """
    state: dict[str, Tensor] = {}
    rules: dict[tuple[int, float], int] = {}
    for layer, factors in adapter.layers():
        if MAGNITUDE in factors:
            reject(path, f"layer {layer!r} uses DoRA, which loralib does not have")
        a, b = factors[A], factors[B]
        if a.dim() != 2:
            reject(path, f"layer {layer!r} is a convolution; only linear layers are converted")
        scaling, r = adapter.scaling_of(layer, a.shape[0]), a.shape[0]
        if enabled is not None:
            b = _gather(layer, b, enabled, path)
            r = b.shape[1]
        state[f"{layer}.lora_A"], state[f"{layer}.lora_B"] = a, b
        rule = (r, scaling * r)
        rules[rule] = rules.get(rule, 0) + 1
    for key, tensor in adapter.others().items():
        if any(part.startswith("lora_") for part in key.split(".")):
            reject(path, f"tensor {key!r} has no counterpart in loralib; only linear layers do")
        state[key] = tensor
    for (r, alpha), count in sorted(rules.items()):
        adapter.notes.append(f"build {count} loralib layers with r={r}, lora_alpha={alpha:g}")
    return state
