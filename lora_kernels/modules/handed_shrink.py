"""S = x A^T made by what makes x, a norm or an activation, and taken by the layers behind.

Here: what is handed over, when it is still good, and who decides (the switch `fused_shrink`).
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops import _dispatch, explain
from lora_kernels.ops._shrink_pairs import DIRECTIONS

Switch = bool | Literal["auto"]
_ROWS = tuple(4**n for n in range(9))  # problems that say whether a call may ever hand on
_REPORTED = 4**6  # whose reason is the one to tell
_PLAIN = (Tensor, torch.nn.Parameter)


class Wanted(NamedTuple):
    """What a producer is asked for: S of these A, by this backend of its own op."""

    lora_as: tuple[Tensor, ...]
    backend: str


class _Offer(NamedTuple):
    y: weakref.ref[Tensor]
    address: int
    modes: tuple[Any, ...]
    s: Tensor
    lora_as: tuple[Tensor, ...]
    versions: tuple[int, ...]


class Offers:
    """At most one S per thread, which lives no longer than the tensor it belongs to."""

    def __init__(self) -> None:
        self._held: dict[int, _Offer] = {}

    def __bool__(self) -> bool:
        return bool(self._held)

    def put(
        self, y: Tensor, s: Tensor, lora_as: tuple[Tensor, ...], modes: tuple[Any, ...]
    ) -> None:
        key, held = threading.get_ident(), self._held

        def forget(gone: weakref.ref[Tensor]) -> None:
            if key in held and held[key].y is gone:
                del held[key]

        held[key] = _Offer(
            weakref.ref(y, forget), y.data_ptr(), modes, s, lora_as,
            tuple(a._version for a in lora_as),
        )  # fmt: skip

    def take(self, x: Tensor, lora_as: Sequence[Tensor], modes: tuple[Any, ...]) -> Tensor | None:
        """S of x and these A; None where it was made of another tensor, of one that has changed, in
        another mode, or of other adapters. Either way nothing is left."""
        offer = self._held.pop(threading.get_ident(), None)
        if offer is None or offer.y() is not x or offer.modes != modes:
            return None
        same = (
            offer.address == x.data_ptr()
            and len(offer.lora_as) == len(lora_as)
            and all(a is b for a, b in zip(offer.lora_as, lora_as, strict=True))
            and offer.versions == tuple(a._version for a in lora_as)
        )
        return offer.s if same else None

    def discard(self) -> None:
        """Drop what this thread was offered."""
        self._held.pop(threading.get_ident(), None)

    def clear(self) -> None:
        self._held.clear()


def check_switch(value: Any) -> None:
    """InvalidArgumentError for anything but True, False and ``"auto"``."""
    if not (isinstance(value, bool) or value == "auto"):
        raise InvalidArgumentError(f"fused_shrink={value!r}; accepted: True, False, 'auto'")


def usable(x: Tensor, lora_as: Sequence[Tensor]) -> bool:
    """May a producer of x read these A: plain tensors beside x, which tell of changes. S has to be
    in the dtype in which the layers multiply."""
    device = x.device.type
    return (
        device in ("cpu", "cuda")
        and not x.is_inference()
        and not torch.is_inference_mode_enabled()
        and (not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) == x.dtype)
        and all(
            type(a) in _PLAIN and a.device == x.device and a.dim() == 2 and not a.is_inference()
            for a in lora_as
        )
    )


def backend_for(switch: Switch, pair: str, direction: str, x: Tensor, **shapes: Any) -> str:
    """The backend of the producer's op that makes S with x ``[..., features]``; "" where the layers
    make it themselves.

    True: wherever it can be made, by what the op takes. ``"auto"``: on a GPU where both together
    were measured to be quicker so; never on a CPU, where they are slower (docs/measured_facts.md).

    Args:
        pair: ``norm_shrink`` or ``activation_shrink``, direction: ``fwd``, ``bwd`` or ``fwdbwd``:
            see lora_kernels/ops/_shrink_pairs.py.
        shapes: of the pair's problem, M, dtype and device apart.
    """
    if switch is False or _dispatch.disabled(pair, "apply"):
        return ""
    requested = _dispatch.requested_backend(None)
    if switch is True:
        return requested
    if x.device.type == "cpu" or requested != "auto":
        return ""
    rows = x.numel() // max(1, x.shape[-1])
    return _measured(
        pair, direction, 1 << (rows - 1).bit_length() if rows else 1, x.dtype,
        x.device.index or 0, tuple(sorted(shapes.items())), _disabled(),
    )[0]  # fmt: skip


@lru_cache(maxsize=1024)
def _measured(
    pair: str, direction: str, rows: int, dtype: torch.dtype, index: int,
    shapes: tuple[tuple[str, Any], ...], disabled: str,
) -> tuple[str, str]:  # fmt: skip
    """(backend or "", reason) on the GPU of that index. `disabled` serves the key alone."""
    told = explain(
        pair, M=rows, dtype=dtype, device="cuda", device_index=index, direction=direction,
        **dict(shapes),
    )  # fmt: skip
    chosen = str(told["backend"])
    return "" if chosen == "aten" else chosen, str(told["reason"])


def _disabled() -> str:
    return os.environ.get("LORA_KERNELS_DISABLE", "")


def reason_against(
    switch: Switch, pair: str, device: torch.device, dtype: torch.dtype, **shapes: Any
) -> str:
    """Why no call would ever hand S on; "" where one may. For reports."""
    if switch is False:
        return "fused_shrink is False"
    if _dispatch.disabled(pair, "apply"):
        return "disabled by LORA_KERNELS_DISABLE"
    if switch is True:
        return ""
    if device.type == "cpu":
        return "measured to be slower on a CPU"
    if device.type != "cuda":
        return f"it is on {device.type}"
    requested = _dispatch.requested_backend(None)
    if requested != "auto":
        return f"LORA_KERNELS_BACKEND={requested} and fused_shrink is 'auto'"
    key = tuple(sorted(shapes.items()))
    answers = [
        _measured(pair, direction, rows, dtype, device.index or 0, key, _disabled())
        for direction in DIRECTIONS[pair]
        for rows in _ROWS
    ]
    return "" if any(chosen for chosen, _ in answers) else answers[_ROWS.index(_REPORTED)][1]
