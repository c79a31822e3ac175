"""The README's GPU table and the benchmark's arguments, from synthetic records."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import readme_table, run
from benchmarks import record as records
from tests.test_gpu_check import DEVICE, record
from tools.gpu_check import parts


def filled(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    readme = tmp_path / "README.md"
    begin, end = readme_table.GPU_BEGIN, readme_table.GPU_END
    readme.write_text(f"# A\n{begin}\nold\n{end}\ntail\n")
    code = readme_table.main(["--device", "cuda", "--readme", str(readme), *arguments])
    return code, readme.read_text()


def test_the_readme_says_when_there_is_no_gpu_result(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path / "none")
    code, text = filled(tmp_path)
    assert code == 0
    assert "No GPU results are recorded yet" in text
    assert "|" not in text
    assert "old" not in text


def test_the_readme_shows_the_newest_record_of_each_device(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    h100, h200 = DEVICE["name"], "NVIDIA H200"
    for number, (name, date, commit) in enumerate(
        [(h100, "2026-11-22", "new"), (h100, "2026-11-01", "old"), (h200, "2026-10-01", "other")]
    ):
        made = record(date=date, commit=commit, device={**DEVICE, "name": name})
        made["kernels"] = parts.verdicts(made)
        made["kernels"]["lora_linear"]["cuda"]["verdict"] = "failed"
        records.save(tmp_path / "results" / f"{number}.json", made)
    code, text = filled(tmp_path)
    assert code == 0
    assert "Commit new." in text
    assert "Commit other." in text
    assert "Commit old." not in text
    assert "lora_kernels triton" in text
    assert "lora_kernels cuda" not in text, "it failed its checks"


def test_a_record_without_verdicts_is_refused(tmp_path, capsys):
    source = tmp_path / "r.json"
    source.write_text('{"rows": []}')
    code, text = filled(tmp_path, "--record", str(source))
    assert code == 2
    assert "old" in text
    assert "kernels is missing" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_benchmark_without_a_gpu(capsys):
    assert run.main(["--device", "cuda"]) == 3
    assert capsys.readouterr().err.startswith("benchmarks.run: no GPU here")


def test_arguments_of_the_other_device_are_refused(capsys):
    for arguments in (["--device", "cuda", "--png", "x"], ["--device", "cpu", "--modes", "bwd"]):
        with pytest.raises(SystemExit):
            run.parse(arguments)
    assert run.parse(["--device", "cuda"]).modes == ["fwd", "bwd", "fwdbwd"]
