"""Two trainings that take turns, step by step, so that both see the same machine.

A comparison of two runs one after the other measures whatever else the machine did meanwhile. Here
the second run lives in a process of its own and exactly one of the two computes at any time. A turn
begins at the start of an optimizer step and ends at the start of the next one: loading data and
evaluating fall into the turn of whoever does it. The process that waits sleeps.

Each side calls `give` and `take` through :class:`Turns`; the two meet as follows.

    first side        waits ─ step 1 ─ gives, waits ─ step 2 ─ ... step n, last evaluation ─ gives
    second side       gives, waits ─────── step 1 ─ gives, waits ─ ...                    step n ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class Turns(TrainerCallback):
    """Gives the turn away and waits for it at every step; the first side only waits at its first.

    Args:
        give: lets the other side run.
        take: returns when it is this side's turn.
        first: this side has the first turn.
    """

    def __init__(self, give: Callable[[], None], take: Callable[[], None], first: bool) -> None:
        self._give = give
        self._take = take
        self._holds = not first

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._holds:
            self._give()
        self._take()
        self._holds = True
