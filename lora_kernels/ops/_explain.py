"""What would run here, and why."""

from __future__ import annotations

from typing import Any

from lora_kernels.ops import _registry


def explain(op: str, *, backend: str | None = None, **shapes: Any) -> dict[str, Any]:
    """The backend that would run `op` on this machine for `shapes`, with the reason.

    Args:
        op: registered name, e.g. ``"lora_linear"``.
        backend: as the op's own argument; None means ``auto`` (or ``LORA_KERNELS_BACKEND``).
        **shapes: the problem, e.g. ``M=2048, K=2048, N=2048, rank=16, dtype="bfloat16"``.

    Returns:
        ``{"op", "backend", "reason", "problem", "backends": {name: {"supported", "reason"}}}``

    Raises:
        InvalidArgumentError: unknown op or shape keyword.
        BackendUnavailableError: `backend` was given and cannot run the problem.
    """
    spec = _registry.find(op)
    problem = spec.problem(**shapes)
    chosen, reason = spec.choose(problem, backend)
    answers = {name: spec.supports(name, problem) for name in spec.backends}
    return {
        "op": op,
        "backend": chosen,
        "reason": reason,
        "problem": repr(problem),
        "backends": {n: {"supported": ok, "reason": why} for n, (ok, why) in answers.items()},
    }
