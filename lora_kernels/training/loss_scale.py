"""Whether a model divides its loss by the number of labels of the whole step.

transformers.Trainer hands every model whose forward takes ``**kwargs`` the number of labels in all
micro-batches and processes of a step (``num_items_in_batch``), and then leaves the averaging to it:
the loss is not divided by the number of micro-batches, and is multiplied by that of the processes.
Models that take the keywords but do not pass them on to their loss (most classifiers) would train
on gradients that are too large by these factors. Only the source of a forward tells them apart.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

# The loss is called with the keywords that the forward was given.
_PASSED_ON = re.compile(r"loss_function\((?:[^()]|\([^()]*\))*\*\*\w+", re.DOTALL)


def divides_by_items(model: Any) -> bool:
    """Whether the loss of `model` (PEFT's wrapper is looked through) uses ``num_items_in_batch``.

    True where the source cannot be read: what transformers assumes.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    declared = getattr(model, "accepts_loss_kwargs", None)
    if declared is not None:
        return bool(declared)
    try:
        source = inspect.getsource(inspect.unwrap(type(model).forward))
    except (OSError, TypeError):
        return True
    return "num_items_in_batch" in source or _PASSED_ON.search(source) is not None
