"""make gpu-check, as far as it goes without a GPU: records, verdicts, tables, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_report, machine
from benchmarks import record as records
from tools.gpu_check import __main__ as entry
from tools.gpu_check import bench_part, parts, sanitize_part, test_part
from tools.gpu_check import check as gpu_check

ROOT = Path(__file__).resolve().parents[1]
DEVICE = {
    "type": "cuda", "name": "NVIDIA H100 80GB HBM3", "architecture": "sm_90", "processors": 132,
    "memory_bytes": 85_000_000_000, "l2_bytes": 52_428_800, "runtime": "13.0",
}  # fmt: skip
TOP = {"copy_gb_s": 3000.0, "gemm_tflops": 790.0}
PASSED = {"status": "passed", "why": "", "seconds": 1.0}


def row(provider: str, ratio: float = 1.0, skipped: str | None = None, **changes: Any) -> dict:
    adapter = "float32" if provider.endswith("-fp32") else "bfloat16"
    made = {
        "op": "lora_linear", "case": "8192×4096×4096 r16 bfloat16",
        "sizes": {"M": 8192, "K": 4096, "N": 4096, "rank": 16},
        "kind": {"members": 1, "dtype": "bfloat16", "adapter_dtype": adapter, "dropout": False},
        "shape": [8192, 4096, 4096], "members": [4096], "rank": 16, "dropout": 0.0,
        "dtype": "bfloat16", "mode": "fwd", "provider": provider, "skipped": skipped,
    }  # fmt: skip
    if skipped is None:
        made |= {
            "median_ms": 0.35 * ratio, "iqr_ms": [0.34 * ratio, 0.36 * ratio], "ratio": ratio,
            "ratio_iqr": [ratio * 0.99, ratio * 1.01], "tflops": 785.0 / ratio,
            "gb_s": 480.0 / ratio, "gemm_share": 0.99 / ratio, "copy_share": 0.16 / ratio,
            "first_call_ms": 5.0, "calls_per_round": 20, "launches": 3, "peak_bytes": 67_000_000,
        }  # fmt: skip
    return made | changes


def every_op(status: str, why: str = "") -> dict[str, Any]:
    """Per op and backend the same."""
    return {
        op: {b: {"status": status, "why": why} for b in own} for op, own in parts.covered().items()
    }


def record(**changes: Any) -> dict[str, Any]:
    ok = every_op("passed")
    rows = [row("frozen"), row("peft", 1.5), row("aten", 1.2), row("triton", 1.1)]
    return {
        "schema": 1, "op": "gpu_check", "device": DEVICE, "torch": "2.11.0", "triton": "3.6.0",
        "lora_kernels": "0.1.0", "commit": "0123456789ab", "dirty": False, "load": 0.1,
        "date": "2026-11-22T10:00:00+00:00", "command": "python -m tools.gpu_check",
        "digests": {op: {"triton": "t", "cuda": "c"} for op in parts.covered()},
        "parts": {
            "tests": {**PASSED, "ops": ok},
            "sanitize": {**PASSED, "ops": ok},
            "bench": {**PASSED, "ops": {}},
        },
        "kernels": {}, "ceilings": TOP, "rows": [*rows, row("cuda", 1.05)],
        **changes,
    }  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("arguments", [[], ["--part", "tests"], ["--part", "bench"]])
def test_without_a_gpu_one_line_and_exit_code_3(arguments, tmp_path, capsys):
    assert gpu_check.main([*arguments, "--results", str(tmp_path)]) == gpu_check.NO_GPU == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("gpu-check: no GPU here: torch ")
    assert len(said.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_python_without_torch_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr(entry.importlib.util, "find_spec", lambda name: None)
    assert entry.run([]) == 3
    said = capsys.readouterr().err
    assert "has no torch" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--part", "all"], "--part"), (["--commit", "../x"], "--commit"), (["--turbo"], "--turbo")],
)
def test_bad_arguments_are_refused(arguments, named, capsys):
    with pytest.raises(SystemExit) as caught:
        gpu_check.parse(arguments)
    assert caught.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_the_parts_fit_into_ten_minutes():
    assert set(gpu_check.BUDGETS) == set(parts.PARTS)
    assert sum(gpu_check.BUDGETS.values()) <= 580


@pytest.fixture
def faked(monkeypatch):
    """Every part answers at once; `answers` may be changed."""
    ok = every_op("passed")
    answers = {
        "tests": {**PASSED, "ops": ok},
        "sanitize": {**PASSED, "ops": ok},
        "bench": ({**PASSED, "ops": {}}, record()["rows"], TOP),
    }
    monkeypatch.setattr(machine, "gpu", lambda index=0: dict(DEVICE))
    monkeypatch.setattr(test_part, "run", lambda seconds: answers["tests"])
    monkeypatch.setattr(sanitize_part, "run", lambda seconds: answers["sanitize"])
    monkeypatch.setattr(bench_part, "run", lambda seconds: answers["bench"])
    return answers


def only_file(folder: Path) -> dict[str, Any]:
    (path,) = folder.rglob("*.json")
    assert path.parent.name == "nvidia-h100-80gb-hbm3"
    assert path.name.endswith("-abc123.json")
    assert not list(folder.rglob(".*")), "a temporary file was left"
    return json.loads(path.read_text())


def test_whole_run(faked, tmp_path, capsys):
    assert gpu_check.main(["--results", str(tmp_path), "--commit", "abc123"]) == 0
    made = only_file(tmp_path)
    assert set(made["kernels"]) == set(parts.covered())
    own = {k: v["verdict"] for k, v in made["kernels"]["lora_linear"].items()}
    assert own == dict.fromkeys(parts.BACKENDS, "passed")
    shown = capsys.readouterr().out
    assert "ceilings in this run: copy 3000 GB/s, bf16 product 790 TFLOP/s" in shown
    assert "lora_linear, cuda: passed" in shown
    # Device and versions, no folders of this machine.
    assert str(tmp_path) not in json.dumps(made)
    assert str(ROOT) not in json.dumps(made)


def test_parts_are_merged(faked, tmp_path):
    common = ["--results", str(tmp_path), "--commit", "abc123"]
    assert gpu_check.main(["--part", "bench", *common]) == 0
    made = only_file(tmp_path)
    assert set(made["parts"]) == {"bench"}
    assert made["kernels"]["lora_linear"]["cuda"]["verdict"] == "not run"
    assert gpu_check.main(["--part", "tests", *common]) == 0
    made = only_file(tmp_path)
    assert set(made["parts"]) == {"bench", "tests"}
    assert len(made["rows"]) == 5
    assert made["ceilings"] == TOP
    assert made["kernels"]["lora_linear"]["cuda"] == {
        "verdict": "passed", "why": ["sanitize: not asked for"],
    }  # fmt: skip


def test_a_failure_is_an_exit_code_and_stays_when_another_part_runs(faked, tmp_path):
    faked["tests"] = {
        "status": "failed", "why": "1 of 9 tests failed", "seconds": 1.0,
        "ops": {"lora_linear": {"triton": {"status": "failed", "why": "test_x[triton]"}}},
    }  # fmt: skip
    common = ["--results", str(tmp_path), "--commit", "abc123"]
    assert gpu_check.main(["--part", "tests", *common]) == 1
    assert gpu_check.main(["--part", "bench", *common]) == 1
    kernels = only_file(tmp_path)["kernels"]["lora_linear"]
    assert kernels["triton"]["verdict"] == "failed"
    assert "test_x[triton]" in kernels["triton"]["why"][0]


@pytest.mark.parametrize(
    "changes",
    [
        {"digests": {"lora_linear": {"triton": "other", "cuda": "c"}}},
        {"torch": "2.13.0"},
        {"schema": 9},
    ],
)
def test_parts_of_other_sources_are_not_merged(tmp_path, changes):
    path = tmp_path / "r.json"
    records.save(path, record(**changes))
    fresh = record(parts={"tests": {**PASSED, "ops": {}}}, rows=[], ceilings=None)
    assert parts.merge(fresh, path) == fresh


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 1}', '{"parts": 3}'])
def test_a_broken_earlier_file_is_no_part(tmp_path, content):
    path = tmp_path / "r.json"
    path.write_text(content)
    fresh = record(parts={}, rows=[], ceilings=None)
    assert parts.merge(fresh, path) == fresh


def test_a_part_that_did_not_run_keeps_the_earlier_one(tmp_path):
    path = tmp_path / "r.json"
    records.save(path, record())
    fresh = record(parts={"sanitize": parts.not_run("no tool")}, rows=[], ceilings=None)
    assert parts.merge(fresh, path)["parts"]["sanitize"]["status"] == "passed"


def test_verdicts():
    def of(backend: str = "triton", **changes: Any) -> tuple[str, str]:
        made = parts.verdicts(record(**changes))["lora_linear"][backend]
        return made["verdict"], " ".join(made["why"])

    whole = record()["parts"]
    assert of() == ("passed", "")
    assert of(rows=[row("triton", skipped="WRONG: da[0]: error")])[0] == "failed"
    assert of(rows=[row("triton", skipped="triton is not installed")])[0] == "not run"
    assert of(rows=[])[0] == "not run"
    assert of(parts={**whole, "sanitize": parts.not_run("no tool")}) == (
        "passed", "sanitize: no tool",
    )  # fmt: skip
    assert of(parts={**whole, "tests": parts.not_run("no pytest")}) == (
        "not run", "tests: no pytest",
    )  # fmt: skip
    found = {"lora_linear": {"triton": {"status": "failed", "why": "racecheck: hazard"}}}
    assert of(parts={**whole, "sanitize": {**PASSED, "status": "failed", "ops": found}}) == (
        "failed", "sanitize: racecheck: hazard",
    )  # fmt: skip
    nobodys = {"lora_linear": {"any": {"status": "failed", "why": "test_import"}}}
    broken = {**PASSED, "status": "failed", "ops": nobodys}
    assert of("cuda", parts={**whole, "tests": broken})[0] == "failed"


def lines(*entries: dict[str, Any]) -> list[str]:
    return [json.dumps(e) for e in entries]


def heard(test: str, outcome: str = "passed", why: str = "") -> dict[str, Any]:
    return {"test": test, "outcome": outcome, "why": why}


def group(*entries: dict[str, Any], finished: bool = True) -> test_part.Group:
    return test_part.Group(lines(*entries), finished)


def test_tests_are_counted_per_backend():
    file = "tests/ops/test_lora_linear_gpu.py"
    made = test_part.summarise(
        {
            "aten": group({"collected": 1}, heard(f"{file}::test_ranks[aten-16]")),
            "triton": group(heard(f"{file}::test_ranks[triton-16]")),
            "cuda": group(
                heard(f"{file}::test_ranks[cuda-16]", "failed", "too large"),
                heard("tests/ops/test_x_cuda.py::test_stream", "skipped"),
            ),
        },
        2.0,
    )
    assert made["status"] == "failed"
    assert {b: e["status"] for b, e in made["ops"]["lora_linear"].items()} == {
        "triton": "passed", "cuda": "failed", "aten": "passed",
    }  # fmt: skip
    assert (made["passed"], made["failed"], made["skipped"]) == (2, 1, 1)
    assert "too large" in made["ops"]["lora_linear"]["cuda"]["why"]


def test_a_pair_of_ops_has_tests_of_its_own():
    """It passes by them, and what fails for it alone is no failure of its ops."""
    test = "tests/test_gpu_ops.py::test_small_problems_on_the_device[{}-triton-0]"
    both = heard(test.format("norm_shrink"), "failed"), heard(test.format("rms_norm"))
    made = test_part.summarise({"triton": group(*both)}, 1.0)["ops"]
    assert made["norm_shrink"]["triton"]["status"] == "failed"
    assert made["rms_norm"]["triton"]["status"] == "passed"
    assert made["activation_shrink"]["triton"]["status"] == "not run"


def test_a_failure_of_nobody_counts_against_all():
    made = test_part.summarise({"others": group(heard("tests/test_x.py::test_x", "failed"))}, 1.0)
    assert all(own["any"]["status"] == "failed" for own in made["ops"].values())
    assert made["ops"].keys() == parts.covered().keys()


def test_another_op_fails_the_part_and_none_of_these_kernels():
    made = test_part.summarise(
        {
            "triton": group(
                heard("tests/ops/test_quant_linear_gpu.py::test_x[triton]", "failed"),
                heard("tests/ops/test_lora_linear_gpu.py::test_x[triton]"),
            ),
            "others": group(heard("tests/ops/test_quant_linear_gpu.py::test_x", "failed")),
        },
        1.0,
    )
    assert made["status"] == "failed"
    own = made["ops"]["lora_linear"]
    assert own["triton"]["status"] == "passed"
    assert "any" not in own


def test_the_op_of_a_test_is_the_one_it_names():
    file = "tests/ops/test_quant_linear_gpu.py::test_x[lora_linear]"
    assert test_part.ops_of(file) == {"quant_linear"}
    assert test_part.ops_of("tests/test_gpu_ops.py::test_x[rope-triton-0]") == {"rope"}
    assert len(test_part.ops_of("tests/test_philox_jit.py::test_x[triton]")) > 2


def test_a_test_that_never_returns_has_failed_and_the_others_stand():
    hung = group({"begin": "t.py::test_b[triton]"}, finished=False)
    hung.lines.append('{"test": "t.py::te')
    made = test_part.summarise({"aten": group(heard("t.py::test_a[aten]")), "triton": hung}, 9.0)
    assert made["status"] == "failed"
    assert "never returned" in made["ops"]["lora_linear"]["triton"]["why"]
    assert made["ops"]["lora_linear"]["aten"]["status"] == "passed"


def test_a_group_that_does_not_finish_is_no_proof():
    late = group(heard("t.py::test_a[triton]"), finished=False)
    made = test_part.summarise({"triton": late}, 9.0)
    assert made["status"] == made["ops"]["lora_linear"]["triton"]["status"] == "not run"


def test_tests_that_only_skip_prove_nothing():
    made = test_part.summarise({"triton": group(heard("t.py::test_a[triton]", "skipped"))}, 1.0)
    assert made["status"] == made["ops"]["lora_linear"]["triton"]["status"] == "not run"


def test_the_plugin_writes_what_happened_and_stops_in_time(tmp_path):
    code = """
        import time, pytest
        def test_good(): pass
        def test_bad(): assert 1 == 2
        @pytest.mark.skip(reason="no")
        def test_skipped(): pass
        def test_slow(): time.sleep(0.6)
        def test_too_late(): pass
    """
    (tmp_path / "test_it.py").write_text("\n".join(x[8:] for x in code.splitlines()))
    out = tmp_path / "out.jsonl"
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "tools.gpu_check.outcomes",
        "-p", "no:cacheprovider", "-c", str(tmp_path / "none.ini"), "--rootdir", str(tmp_path),
        "--outcomes", str(out), "--seconds", "0.5", str(tmp_path),
    ]  # fmt: skip
    (tmp_path / "none.ini").write_text("[pytest]\n")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout
    told = [json.loads(line) for line in out.read_text().splitlines()]
    assert told[0] == {"collected": 5}
    outcomes = {e["test"].split("::")[1]: e for e in told if "test" in e}
    assert {k: e["outcome"] for k, e in outcomes.items()} == {
        "test_good": "passed", "test_bad": "failed", "test_skipped": "skipped",
        "test_slow": "passed",
    }  # fmt: skip
    assert "assert 1 == 2" in outcomes["test_bad"]["why"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_marked_tests_prove_nothing_without_a_gpu():
    made = test_part.run(240.0)
    assert made["status"] == "not run", made
    assert made["skipped"] > 100
    assert made["passed"] == 0
    assert made["failures"] == []


def test_marked_files_are_found():
    files = test_part.marked_files()
    assert "tests/test_philox_jit.py" in files
    assert "tests/test_structure.py" not in files


@pytest.mark.parametrize(
    ("code", "output", "status", "says"),
    [
        (0, "fine", "passed", ""),
        (9, "x\n========= Invalid __global__ read of size 2\n", "failed", "Invalid __global__"),
        (1, "aten: da[0]: error", "failed", "wrong results"),
        (4, "triton is not installed", "not run", "triton is not installed"),
        (None, "", "not run", "ran out of time"),
        (255, "Device not supported", "not run", "Device not supported"),
    ],
)
def test_sanitizer_exit_codes(code, output, status, says):
    got, why = sanitize_part.judge(code, "memcheck", output)
    assert got == status
    assert says in why


def test_no_sanitizer_is_not_a_pass(monkeypatch):
    monkeypatch.setenv("PATH", "")
    made = sanitize_part.run(10.0)
    assert made["status"] == "not run"
    assert "compute-sanitizer is not on PATH" in made["why"]


def test_the_sanitizer_is_called_for_every_tool_and_backend(monkeypatch, tmp_path):
    """With a program in its place: racecheck finds something in triton, cuda is absent."""
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(
        "#!/bin/sh\n"
        f'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" >> {tmp_path}/calls\n'
        'case "$*" in\n'
        '*racecheck*lora_linear*triton) echo "========= Race reported between Write"; exit 9;;\n'
        '*cuda) echo "_cuda.so is not built"; exit 4;;\n'
        "esac\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    made = sanitize_part.run(60.0)
    assert made["status"] == "failed"
    assert made["ops"]["lora_linear"]["triton"]["why"].startswith(
        "racecheck: ========= Race reported"
    )
    assert made["ops"]["lora_linear"]["cuda"] == {
        "status": "not run", "why": "memcheck: _cuda.so is not built",
    }  # fmt: skip
    assert set(made["ops"]) == set(parts.covered())
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 3 * sum(len(own) - 1 for own in parts.covered().values())
    assert all(call.startswith("1 --tool ") for call in calls)


def test_the_worst_run_of_a_sanitizer_counts():
    runs = [("passed", ""), ("not run", "late"), ("failed", "hazard")]
    assert sanitize_part.worst(runs) == {"status": "failed", "why": "hazard"}
    assert sanitize_part.worst(runs[:2])["status"] == "not run"
    assert sanitize_part.worst(runs[:1])["status"] == "passed"


def test_table_and_readme_of_a_record():
    made = record(rows=[*record()["rows"], row("liger", skipped="has no LoRA linear")])
    made["kernels"] = parts.verdicts(made)
    shown = gpu_report.table(made).splitlines()
    assert shown[0] == "NVIDIA H100 80GB HBM3 (sm_90), torch 2.11.0, triton 3.6.0"
    cuda = next(line for line in shown if " cuda " in line and "8192×4096×4096" in line)
    for text in ("1.050", "747.6", "0.94", " 3 ", "67.0"):
        assert text in cuda
    assert any("liger" in line and "not timed: has no LoRA linear" in line for line in shown)
    text = gpu_report.readme(made)
    assert "| 8192×4096×4096 r16 bfloat16 | 0.350 | 1.50 | 1.20 | 1.10 | **1.05** |" in text
    assert "Liger" not in text
    assert "790 TFLOP/s" in text


def test_every_field_of_a_record_is_documented():
    text = (records.RESULTS / "README.md").read_text()
    made = record()
    made["kernels"] = parts.verdicts(made)
    names = {*made, *made["device"], *(k for r in made["rows"] for k in r), *made["ceilings"]}
    for name in names:
        assert f"`{name}`" in text, f"results/README.md does not describe {name}"
