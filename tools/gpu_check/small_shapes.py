"""Small problems of one op on one backend against the oracle: what a sanitizer watches.

python -m tools.gpu_check.small_shapes OP BACKEND
"""

from __future__ import annotations

import sys

import torch

from benchmarks.gpu_ops import ROWS
from benchmarks.peers import UnavailableError


def main(argv: list[str], device: str = "cuda") -> int:
    """0: right; 1: wrong; 4: the backend can run none of them here."""
    op, backend = argv
    ran, why = 0, ""
    for keywords in ROWS[op].small:
        try:
            ROWS[op].check(keywords, backend, device)
            ran += 1
        except UnavailableError as error:
            why = str(error)
        except AssertionError as error:
            print(f"{keywords}: {error}")
            return 1
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if not ran:
        print(why)
        return 4
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
