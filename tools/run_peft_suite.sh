#!/usr/bin/env bash
# PEFT's own tests of LoRA on custom models, once stock and once with every LoRA linear fused.
# Fails when a test that passes stock does not pass fused, or when too few calls ran fused.
#   tools/run_peft_suite.sh            about 2700 tests twice, a few minutes
#   tools/run_peft_suite.sh --quick    a few hundred tests twice, under a minute
#   tools/run_peft_suite.sh --help     further options
# Needs peft, transformers, pytest and lora_kernels in the python3 of PATH. The tests are taken from
# the source distribution of peft on first use and kept in $LORA_KERNELS_CACHE_DIR; no test uses
# the network.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec python3 "$root/tools/peft_suite/run.py" "$@"
