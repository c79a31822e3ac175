"""Run PEFT's tests stock and fused, print both counts, exit 1 when fused is worse."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from compare import Run, problems, table
from sources import VERSION, SuiteError, suite_folder

# Methods whose names contain "lora" and whose layers are not peft.tuners.lora.layer.Linear.
_OTHERS = "adalora or delora or glora or gralora or randlora or tinylora or unilora or vblora"
FULL = f"lora and not ({_OTHERS})"
QUICK = f"{FULL} and (" + " or ".join(
    (
        "test_training_custom_models", "test_merge_layers", "test_disable_adapters",
        "test_save_load_roundtrip", "TestMultipleActiveAdapters", "TestMixedAdapterBatches",
        "TestLayerRepr",
    )
) + ") and not fsdp"  # fmt: skip
_SHOWN = 20
# Least number of fused calls: 822 and 356 were made when this was written.
FLOORS = {FULL: 750, QUICK: 320}


def run_suite(folder: Path, selection: str, *, fused: bool, backend: str, file: str) -> Run:
    """One pytest process over `file` in `folder`; its result, whatever passed or failed.

    Raises:
        SuiteError: pytest ended without a result, or selected nothing.
    """
    tools = Path(__file__).resolve().parent
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTEST_ADDOPTS": "",
            "PYTHONPATH": os.pathsep.join(
                [str(tools), str(tools.parents[1]), os.environ.get("PYTHONPATH", "")]
            ),
            "LORA_KERNELS_SUITE_RESULT": str(result),
            "LORA_KERNELS_SUITE_FUSED": str(int(fused)),
            "LORA_KERNELS_BACKEND": backend,
            "LORA_KERNELS_STRICT": "",
            "LORA_KERNELS_DISABLE": "",
        }
        command = [
            sys.executable, "-m", "pytest", file, "-p", "plugin", "-p", "no:cacheprovider",
            "-c", os.devnull, "--rootdir", str(folder), "-k", selection, "-q", "--tb=line",
            "--no-header", "--disable-warnings", "--basetemp", f"{scratch}/tmp",
        ]  # fmt: skip
        log = Path(scratch) / "log"
        with log.open("w") as stream:
            subprocess.run(
                command, cwd=folder, env=environment, stdout=stream, stderr=stream, check=False
            )
        lines = log.read_text().splitlines()
        if not result.is_file():
            tail = "\n".join(lines[-20:])
            raise SuiteError(f"pytest ended without a result:\n{tail}")
        run = Run.from_json(json.loads(result.read_text()))
        if not run.outcomes:
            raise SuiteError("no test was selected:\n" + "\n".join(lines[-20:]))
        errors = [line for line in lines if line.startswith(("/", "E  "))]
        if run.count("failed"):
            print("\n".join(["errors, the first three:", *errors[:3]]))
        return run


def default_backend() -> str:
    """The compiled library where it runs, else library GEMMs; never ``auto``.

    Several tests compare outputs of two models to the last bit. ``auto`` may give one of them
    another backend (FSDP makes its flat parameter, frozen parts included, require gradients), and
    backends differ in the order of their sums.
    """
    from lora_kernels.ops import explain

    return (
        "cpu" if explain("lora_linear", M=9, K=10, N=20)["backends"]["cpu"]["supported"] else "aten"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run_peft_suite.sh", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few hundred tests, for CI")
    parser.add_argument("-k", metavar="EXPRESSION", help="another selection, as pytest -k")
    parser.add_argument("--floor", type=int, help="least number of fused calls")
    parser.add_argument("--backend", help="of the fused run (default: cpu if built, else aten)")
    options = parser.parse_args(arguments)
    selection = options.k or (QUICK if options.quick else FULL)
    floor = FLOORS.get(selection, 1) if options.floor is None else options.floor
    try:
        installed = importlib.metadata.version("peft")
        if installed != VERSION:
            raise SuiteError(f"peft {installed} is installed; these are the tests of {VERSION}")
        backend = options.backend or default_backend()
        folder = suite_folder()
        print(f"tests/test_custom_models.py of peft {VERSION}, -k {selection!r}")
        print(f"fused layers run on the backend {backend}", flush=True)
        runs = []
        for fused in (False, True):
            start = time.perf_counter()
            runs.append(
                run_suite(
                    folder, selection, fused=fused, backend=backend,
                    file="tests/test_custom_models.py",
                )
            )  # fmt: skip
            seconds = time.perf_counter() - start
            print(f"{'fused' if fused else 'stock'} run: {seconds:.0f} s", flush=True)
    except importlib.metadata.PackageNotFoundError:
        print("peft is not installed; pip install 'lora-kernels[test]'", file=sys.stderr)
        return 2
    except SuiteError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(*runs))
    found = problems(*runs, floor)
    for line in found[:_SHOWN]:
        print(line)
    if len(found) > _SHOWN:
        print(f"and {len(found) - _SHOWN} more")
    print(f"{'FAILED' if found else 'passed'} (floor: {floor} fused calls)")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
