"""Which torch layer becomes which adapted layer, beside nn.Linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.modules import eligibility
from lora_kernels.modules.adapted_layer import AdaptedLayer
from lora_kernels.modules.lora_conv import LoRAConv1d, LoRAConv2d, LoRAConv3d, conv_obstacle
from lora_kernels.modules.lora_embedding import LoRAEmbedding, embedding_obstacle
from lora_kernels.modules.lora_linear import LoRALinear
from lora_kernels.modules.lora_lstm import LoRALSTM, lstm_obstacle
from lora_kernels.modules.lora_transposed_linear import LoRATransposedLinear, is_conv1d

ADAPTED = (LoRALinear, AdaptedLayer)
_OBSTACLES: dict[type, Callable[[nn.Module], str]] = {
    nn.Embedding: embedding_obstacle,
    nn.Conv1d: conv_obstacle,
    nn.Conv2d: conv_obstacle,
    nn.Conv3d: conv_obstacle,
    nn.LSTM: lstm_obstacle,
}
_CONVOLUTIONS: dict[type, Any] = {
    nn.Conv1d: LoRAConv1d,
    nn.Conv2d: LoRAConv2d,
    nn.Conv3d: LoRAConv3d,
}


def is_other_kind(module: nn.Module) -> bool:
    """A layer that is no nn.Linear and has an adapted form."""
    return type(module) in _OBSTACLES or is_conv1d(module)


def obstacle(module: nn.Module) -> str:
    """Why `module` cannot become an adapted layer; empty when it can."""
    if not is_other_kind(module):
        return eligibility.obstacle(module)
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if any(getattr(module, name, None) for name in eligibility._HOOKS):
        return "it has hooks, which the new layer would not run"
    for name, weight in module._parameters.items():
        if weight is None:
            continue
        if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
            return f"its {name} is a {type(weight).__name__}; accepted: a plain torch.nn.Parameter"
        if weight.dtype not in eligibility.DTYPES:
            return f"its {name} is {weight.dtype}"
    check = _OBSTACLES.get(type(module))
    return "" if check is None else check(module)


def adapt(module: Any, options: dict[str, Any]) -> AdaptedLayer:
    """The adapted form of a layer for which :func:`is_other_kind` holds, on the same weights.

    Args:
        options: keywords of LoRALinear; what the kind of layer has no use for (dropout of an index
            or of a recurrent weight) is left out. ``adapt`` is LoRALSTM's.

    Raises:
        InvalidArgumentError: DoRA, or an argument out of range.
    """
    if options.get("dora"):
        raise InvalidArgumentError(
            f"dora=True; a {type(module).__name__} layer takes plain adapters only"
        )
    plain = {k: options[k] for k in ("r", "alpha", "rslora", "adapter_dtype") if k in options}
    with_dropout = plain | {k: options[k] for k in ("dropout",) if k in options}
    if type(module) is nn.Embedding:
        return LoRAEmbedding.from_embedding(module, **plain)
    if type(module) is nn.LSTM:
        kinds = {"adapt": options["adapt"]} if "adapt" in options else {}
        return LoRALSTM.from_lstm(module, **plain, **kinds)
    if is_conv1d(module):
        return LoRATransposedLinear.from_conv1d(module, **with_dropout)
    layer: AdaptedLayer = _CONVOLUTIONS[type(module)].from_conv(module, **with_dropout)
    return layer


def factor_shapes(module: Any, r: int, names: list[str]) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape of the factors that an adapter of rank `r` needs for `module`.

    Args:
        module: of another kind than nn.Linear, adapted or not.
        names: of the factors in a file; an LSTM may have adapters on some of its weights.
    """
    if isinstance(module, (nn.Embedding)):
        n, d = module.weight.shape
        return {"lora_embedding_A": (r, n), "lora_embedding_B": (d, r)}
    if isinstance(module, nn.LSTM):
        if isinstance(module, LoRALSTM):
            wanted = module.adapted_names()
        else:
            kinds = lstm_kinds(names)
            wanted = [
                n
                for group in module._all_weights
                for n in group
                if n.startswith(tuple(f"weight_{k}_" for k in kinds))
            ]
        found: dict[str, tuple[int, ...]] = {}
        for name in wanted:
            rows, columns = getattr(module, name).shape
            short = name.removeprefix("weight_")
            found |= {f"lora_A_{short}": (r, columns), f"lora_B_{short}": (rows, r)}
        return found
    shape = tuple(module.weight.shape)
    if len(shape) == 2:  # [in, out]
        return {"lora_A": (r, shape[0]), "lora_B": (shape[1], r)}
    ones = (1,) * (len(shape) - 2)
    return {"lora_A": (r, *shape[1:]), "lora_B": (shape[0], r, *ones)}


def lstm_kinds(names: list[str]) -> tuple[str, ...]:
    """Which kinds of weight the factor names of an LSTM adapter speak of."""
    return tuple(k for k in ("ih", "hh") if any(n.startswith(f"lora_A_{k}_") for n in names))
