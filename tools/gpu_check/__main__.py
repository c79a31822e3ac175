"""Entry of ``python3 -m tools.gpu_check``; see check.py."""

from __future__ import annotations

import importlib.util
import sys


def run(argv: list[str] | None = None) -> int:
    if importlib.util.find_spec("torch") is None:
        print(
            f"gpu-check: no GPU here: Python {sys.version.split()[0]} has no torch; "
            "name one that has: make gpu-check PYTHON=...",
            file=sys.stderr,
        )
        return 3
    from tools.gpu_check import check

    return check.main(argv)


if __name__ == "__main__":
    sys.exit(run())
