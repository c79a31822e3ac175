"""Small problems on one backend against the oracle: what a sanitizer watches.

python -m tools.gpu_check.small_shapes BACKEND
"""

from __future__ import annotations

import sys

import torch

from lora_kernels.errors import BackendUnavailableError
from lora_kernels.testing import check_lora_linear, lora_linear_inputs

# (M, K, N, rank, dropout): every edge once, groups, ranks off the tile.
PROBLEMS = (
    (65, 96, (80,), 8, 0.0),
    (130, 264, (136, 72), 16, 0.25),
    (33, 70, (45,), 5, 0.0),
    (1, 128, (256,), 64, 0.1),
)


def main(argv: list[str]) -> int:
    """0: right; 1: wrong; 4: the backend cannot run here."""
    (backend,) = argv
    for m, k, n, rank, dropout_p in PROBLEMS:
        for dtype in (torch.bfloat16, torch.float16):
            inputs = lora_linear_inputs(m, k, n, rank, dtype, dropout_p=dropout_p, device="cuda")
            try:
                check_lora_linear(inputs, backend, "xab")
            except BackendUnavailableError as error:
                print(error)
                return 4
            except AssertionError as error:
                print(error)
                return 1
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
