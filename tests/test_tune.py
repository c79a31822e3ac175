"""The tuner without a GPU: tables from synthetic records, the search against a made-up device."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch

import lora_kernels as lk
from benchmarks import gpu, machine, tile_search, tune
from benchmarks.providers import Case
from benchmarks.timing import DeviceClock, Quartiles, Timing
from lora_kernels.ops import _evidence, _ledger
from lora_kernels.ops.lora_linear import configs, problem, tuned_tiles
from tests.test_gpu_bench import FakeEvent
from tests.test_gpu_check import record, row
from tools.gpu_check import parts


def gpu_record(**changes: Any) -> dict[str, Any]:
    both = {"aten": 1.2, "triton": 1.1, "cuda": 1.05, "aten-fp32": 1.3, "triton-fp32": 1.4}
    rows = [row(p, r, mode=m) for m in ("fwd", "bwd", "fwdbwd") for p, r in both.items()]
    made = record(**{"rows": [row("frozen"), row("peft", 1.5), *rows], **changes})
    return {**made, "kernels": parts.verdicts(made)}


def test_entries_hold_aten_and_the_kernels_per_adapter_dtype():
    made = tune.entries(gpu_record()["rows"])
    assert len(made) == 4  # two directions, two dtypes of the adapter; fwdbwd is no direction
    assert {(e["direction"], e["kind"]["adapter_dtype"]) for e in made} == {
        ("fwd", "bfloat16"), ("bwd", "bfloat16"), ("fwd", "float32"), ("bwd", "float32"),
    }  # fmt: skip
    for adapter, names in (
        ("bfloat16", {"aten", "triton", "cuda"}),
        ("float32", {"aten", "triton"}),
    ):
        here = next(e for e in made if e["kind"]["adapter_dtype"] == adapter)
        assert set(here["ms"]) == names


def test_what_was_not_timed_is_no_entry():
    rows = [row("aten"), row("triton", skipped="WRONG: y"), row("cuda", skipped="absent")]
    assert tune.entries(rows) == []
    assert tune.entries([row("triton")]) == []


def test_other_problems_are_other_entries():
    pair = {"members": 2, "dtype": "bfloat16", "adapter_dtype": "bfloat16", "dropout": False}
    rows = [row(p, kind=k) for p in ("aten", "cuda") for k in (pair, row("aten")["kind"])]
    assert [e["kind"]["members"] for e in tune.entries(rows)] == [2, 1]


@pytest.fixture
def h100(monkeypatch, tmp_path):
    """This machine claims to be an H100 with every backend; tables come from tmp_path."""
    from types import SimpleNamespace

    digests = {"triton": "t", "cuda": "c"}
    monkeypatch.setattr(_ledger, "folder", lambda op: tmp_path)
    monkeypatch.setattr(_ledger, "source_digest", lambda op, backend: digests[backend])
    here = _ledger.Device("NVIDIA H100 80GB HBM3", "sm_90")
    monkeypatch.setattr(_ledger, "device", lambda index: here)
    able = SimpleNamespace(supports=lambda p: (True, "kernels"))
    monkeypatch.setattr(problem, "backend_module", lambda name: (able, ""))

    def forget() -> None:
        tuned_tiles.forget()
        _evidence.forget()

    forget()
    yield forget
    forget()


def test_a_record_becomes_evidence(h100, tmp_path, capsys):
    source = tmp_path / "record" / "20261122-0123456789ab.json"
    source.parent.mkdir()
    source.write_text(json.dumps(gpu_record()))
    assert tune.main(["--op", "lora_linear", "--from", str(source), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "nvidia-h100-80gb-hbm3.json").exists()
    h100()
    shapes = {"M": 8192, "K": 4096, "N": 4096, "dtype": "bfloat16", "device": "cuda"}
    assert lk.explain("lora_linear", **shapes)["backend"] == "cuda"
    fp32 = lk.explain("lora_linear", adapter_dtype="float32", **shapes)
    assert fp32["backend"] == "aten"  # triton was slower there, cuda not measured
    assert "1.08 of the time of aten" in fp32["reason"]


def test_a_failed_check_is_no_evidence(h100, tmp_path):
    bad = gpu_record()
    bad["kernels"]["lora_linear"]["cuda"]["verdict"] = "failed"
    source = tmp_path / "r" / "r.json"
    source.parent.mkdir()
    source.write_text(json.dumps(bad))
    assert tune.main(["--op", "lora_linear", "--from", str(source), "--out", str(tmp_path)]) == 0
    h100()
    shapes = {"M": 8192, "K": 4096, "N": 4096, "dtype": "bfloat16", "device": "cuda"}
    assert lk.explain("lora_linear", **shapes)["backend"] == "triton"


TILE = {
    "backend": "triton", "kernel": "dy_pass", "architecture": "sm_90", "rows": 8192,
    "key": {"N": 4096, "rank": 16, "itemsize": 2},
    "config": {"held": 64, "step": 32, "splits": 7, "num_warps": 4, "num_stages": 2},
    "ratio_to_default": 0.9,
}  # fmt: skip


def test_tuned_tiles_are_used_and_kept_and_part_of_the_digest(h100, tmp_path):
    path = tmp_path / "nvidia-h100-80gb-hbm3.json"
    measured_without = tune.table(gpu_record(), "lora_linear", [TILE])
    path.write_text(json.dumps(measured_without))
    h100()
    where = configs.target("sm_90", 132)
    default = configs.dy_pass(8192, 4096, 16, 2, where)
    assert default.splits != 7, "these tiles were tuned for other kernels"
    own = {"triton": _ledger.digest("lora_linear", "triton", (TILE,)), "cuda": "c"}
    path.write_text(
        json.dumps(tune.table(gpu_record(digests={"lora_linear": own}), "lora_linear", [TILE]))
    )
    h100()
    assert configs.dy_pass(8192, 4096, 16, 2, where) == configs.Rows(64, 32, 7, 4, 2)
    assert configs.dy_pass(5000, 4096, 16, 2, where).splits == 7
    for m, n, rank, arch in ((2048, 4096, 16, "sm_90"), (8192, 4095, 16, "sm_90"),
                             (8192, 4096, 64, "sm_90"), (8192, 4096, 16, "sm_80")):  # fmt: skip
        assert configs.dy_pass(m, n, rank, 2, configs.target(arch, 132)).splits != 7
    shapes = {"M": 8192, "K": 4096, "N": 4096, "dtype": "bfloat16", "device": "cuda"}
    assert _ledger.digests_here("lora_linear") == own
    assert own["triton"].startswith("t-")
    source = tmp_path / "r" / "r.json"
    source.parent.mkdir()
    again = gpu_record(digests={"lora_linear": own})
    source.write_text(json.dumps(again))
    assert tune.main(["--op", "lora_linear", "--from", str(source), "--out", str(tmp_path)]) == 0
    assert json.loads(path.read_text())["configs"] == [TILE]
    h100()
    assert lk.explain("lora_linear", **shapes)["backend"] == "cuda"
    # Measured without the tiles: that is no evidence for the kernels with them.
    measured_without["backends"]["cuda"]["verdict"] = "failed"
    path.write_text(json.dumps(measured_without))
    h100()
    answer = lk.explain("lora_linear", **shapes)
    assert answer["backend"] == "aten"
    assert "triton: its sources changed" in answer["reason"]


@pytest.mark.parametrize(
    "content", [None, "", "[]", '{"op": "lora_linear"}', '{"op": "gpu_check"}'], ids=str
)
def test_a_record_that_cannot_be_used_is_refused_and_nothing_is_written(content, tmp_path, capsys):
    source, out = tmp_path / "r.json", tmp_path / "out"
    if content is not None:
        source.write_text(content)
    assert tune.main(["--op", "lora_linear", "--from", str(source), "--out", str(out)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_one_line_and_exit_code_3(tmp_path, capsys):
    assert tune.main(["--op", "lora_linear", "--out", str(tmp_path / "x")]) == tune.NO_GPU == 3
    assert capsys.readouterr().err.startswith("tune: no GPU here: torch ")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("arguments", [[], ["--op", "softmax"], ["--op", "lora_linear", "-x"]])
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        tune.parse(arguments)
    assert caught.value.code == 2


def test_an_earlier_failure_of_the_same_sources_stands(tmp_path):
    bad = gpu_record()
    bad["kernels"]["lora_linear"]["triton"]["verdict"] = "failed"
    folder = tmp_path / "nvidia-h100-80gb-hbm3"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps(bad))
    (folder / "broken.json").write_text("{")
    for digests, want in (({"triton": "t"}, "failed"), ({"triton": "new"}, "passed")):
        fresh = {"device": bad["device"], "digests": {"lora_linear": {"cuda": "c", **digests}}}
        made = tune.verdicts([row("triton"), row("cuda")], "lora_linear")
        tune.overrule(made, fresh, "lora_linear", tmp_path)
        assert made["triton"]["verdict"] == want
        assert made["cuda"]["verdict"] == "passed"


def timing(ratio: float) -> Timing:
    q = Quartiles(ratio, ratio, ratio)
    return Timing(q, q, ratio, 1, 1)


def test_a_tile_has_to_win_by_more_than_noise():
    base = timing(1.0)
    assert tile_search.best({"default": base, "a": timing(0.995)}, "default") is None
    assert tile_search.best({"default": base, "a": timing(1.2)}, "default") is None
    assert tile_search.best({"default": base, "a": timing(0.9), "b": timing(0.8)}, "default") == (
        "b", 0.8,
    )  # fmt: skip


class MadeUp:
    """A provider that asks for a dY tile; more splits cost less, five are wrong."""

    def __init__(self) -> None:
        self.where = configs.target("sm_90", 132)

    def fwdbwd(self) -> None:
        self.bwd()

    def fwd(self) -> None:
        FakeEvent.now += 1.0

    def bwd(self) -> None:
        FakeEvent.now += 100.0 / configs.dy_pass(8192, 4096, 16, 2, self.where).splits


def test_the_search_finds_the_quickest_right_tile(h100, monkeypatch):
    default = configs.dy_pass(8192, 4096, 16, 2, configs.target("sm_90", 132))
    wrong = 4 * default.splits

    class Strict:
        def check(self, provider: MadeUp, case: Case) -> None:
            if configs.dy_pass(8192, 4096, 16, 2, provider.where).splits == wrong:
                raise AssertionError("more than its budget")

    monkeypatch.setattr(tile_search.providers, "build", lambda name, case: MadeUp())
    monkeypatch.setattr(tile_search, "Gate", Strict)
    said: list[str] = []
    found = tile_search.search(
        DeviceClock(FakeEvent), time.monotonic() + 60, said.append, gpu.CASES[:1], 132
    )
    (made,) = found
    assert made["config"]["splits"] == 2 * default.splits
    assert made["kernel"] == "dy_pass"
    assert any("more than its budget" in line for line in said)
    with tile_search.installed(found):
        assert configs.dy_pass(8192, 4096, 16, 2, configs.target("sm_90", 132)).splits == (
            2 * default.splits
        )
    assert configs.dy_pass(8192, 4096, 16, 2, configs.target("sm_90", 132)) == default


def test_no_time_for_a_search_is_said():
    said: list[str] = []
    assert tile_search.search(DeviceClock(FakeEvent), 0.0, said.append, gpu.CASES[:1], 132) == []
    assert said[0].startswith("no time left for Case(")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "gfx942"])
def test_candidates_are_valid_and_without_the_default(architecture):
    where = configs.target(architecture, 132)
    key = {
        "P": 4096, "rank": 16, "itemsize": 2, "dropout": False, "exact": False,
        "descriptor": where.descriptors, "members": 1,
    }  # fmt: skip
    asked = ("gemm", architecture, 8192, tuple(sorted(key.items())))
    default = configs.gemm(8192, 4096, 16, 2, where, descriptor=where.descriptors)
    found = tile_search.candidates(asked, default, 132)
    assert len(found) > 3
    assert default not in found
    assert not [c for c in found if configs.invalid(c, where, 2, 16)]


def test_describing_a_machine_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert machine._git("rev-parse", "HEAD") == ""
