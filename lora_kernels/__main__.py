"""`python -m lora_kernels` reports the environment; with words it is the lora-kernels command."""

from __future__ import annotations

import sys

from lora_kernels.cli import main

sys.exit(main(sys.argv[1:] or ["env"]))
