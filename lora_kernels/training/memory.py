"""How much memory a run took at most."""

from __future__ import annotations

import sys
from typing import Any

import torch


def peak_memory(device: str) -> dict[str, Any]:
    """``bytes`` and ``what`` they are: allocated on the GPU, or resident in the process so far.

    The second counts everything since the process began, loading the model and the evaluation too;
    where the system does not say, ``bytes`` is None.
    """
    if device == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated(), "what": "GPU memory allocated"}
    what = "resident memory of the process since its start"
    try:
        import resource
    except ImportError:
        return {"bytes": None, "what": what}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts KiB, macOS bytes.
    return {"bytes": peak if sys.platform == "darwin" else 1024 * peak, "what": what}
