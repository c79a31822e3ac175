"""The benchmark of GPUs on the CPU: small cases, another clock, made-up events."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu, providers
from benchmarks.providers import Case
from benchmarks.timing import DeviceClock, measure, wall_clock
from lora_kernels.ops import lora_linear
from tests.test_gpu_check import TOP, lines, row
from tools.gpu_check import bench_part, parts


def test_a_child_that_dies_costs_one_provider():
    begun = {k: v for k, v in row("triton", skipped="x").items() if k != "skipped"}
    told = lines({"ceilings": TOP}, row("frozen"), {"timing": True}, {"begin": begun})
    rows, top = bench_part.collect([*told, '{"sha'], "the process ended with code -11")
    assert top == TOP
    assert [r["provider"] for r in rows] == ["frozen", "triton"]
    assert rows[1]["skipped"] == "FAILED: the process ended with code -11"
    made = bench_part.entry(rows, "the process ended with code -11", 1.0)
    assert made["status"] == "failed"
    assert made["why"].startswith("lora_linear, triton at 8192×4096×4096 r16 bfloat16: FAILED")
    rows, _ = bench_part.collect([*told, *lines({"timing": True})], "ended")
    assert [r["provider"] for r in rows] == ["frozen"]


def test_another_projects_failure_is_its_own():
    rows = [row("aten"), row("unsloth", skipped="FAILED: TypeError: x")]
    assert bench_part.entry(rows, "", 1.0)["status"] == "passed"
    assert bench_part.entry([row("cuda", skipped="no")], "", 1.0)["status"] == "not run"


SMALL = Case(33, 40, 50, 4, torch.bfloat16)
NAMES = ["frozen", "peft", "aten", "aten-fp32", "triton", "unsloth", "liger"]


def test_the_child_measures_and_streams(monkeypatch, tmp_path, capsys):
    """The benchmark's own path, on the CPU with a small case and another clock."""
    cases = (SMALL, Case(33, 40, 50, 4, torch.bfloat16, 0.2, others=(20,)))
    monkeypatch.setattr(gpu, "CASES", cases)
    monkeypatch.setattr(gpu, "DEFAULT", ("frozen", "aten", "triton"))
    monkeypatch.setattr(gpu, "device_clock", lambda: wall_clock)
    monkeypatch.setattr(gpu, "ceilings", lambda timed: TOP)
    monkeypatch.setattr(bench_part, "covered", lambda: {"lora_linear": parts.BACKENDS})
    out = tmp_path / "rows.jsonl"
    assert bench_part.child(out, 100.0, "cpu", count=()) == 0
    rows, top = bench_part.collect(out.read_text().splitlines(), "")
    assert top == TOP
    assert len(rows) == 2 * 3 * 3  # cases, modes, providers
    for made in rows:
        assert (made["skipped"] is None) == (made["provider"] != "triton")
    assert rows[-1]["members"] == [50, 20]
    assert capsys.readouterr().out.count("\n") == 1 + len(rows)


def test_a_case_that_comes_too_late_says_so():
    rows = list(gpu.run_all((SMALL,), ["frozen", "aten"], ("fwd",), TOP, wall_clock, 2, 0.0, ()))
    assert [r["skipped"] for r in rows] == ["no time left"] * 2


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    def without_the_update(x, w, a, b, scaling, **rest):
        return lora_linear(x, w, a, b, 0.0, **rest)

    monkeypatch.setattr(providers, "lora_linear", without_the_update)
    rows = gpu.run_case(SMALL, ["frozen", "aten"], ("fwd",), TOP, wall_clock, 2, ())
    assert rows[0]["skipped"] is None
    assert rows[1]["skipped"].startswith("WRONG: aten: ")
    assert "median_ms" not in rows[1]


def test_arithmetic_of_a_row():
    timing = measure({"frozen": lambda: None}, "frozen", rounds=3, timed=lambda work, calls: 1e-3)
    case = Case(8192, 4096, 4096, 16, torch.bfloat16)
    made = gpu.row(case, "fwd", "frozen", timing["frozen"], None, TOP, {"launches": 1})
    assert made["tflops"] == pytest.approx(2 * 8192 * 4096 * 4096 / 1e-3 / 1e12)
    assert made["gemm_share"] == pytest.approx(made["tflops"] / 790.0)
    assert made["copy_share"] == pytest.approx(made["gb_s"] / 3000.0)
    both = gpu.row(case, "fwdbwd", "aten", timing["frozen"], None, TOP, {})
    one = gpu.row(case, "fwd", "aten", timing["frozen"], None, TOP, {})
    two = gpu.row(case, "bwd", "aten", timing["frozen"], None, TOP, {})
    assert both["tflops"] == pytest.approx(one["tflops"] + two["tflops"])


class FakeEvent:
    now = 0.0

    def __init__(self) -> None:
        self.at: float | None = None
        self.waited = False

    def record(self) -> None:
        self.at = FakeEvent.now

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, end: FakeEvent) -> float:
        assert end.waited, "the clock was read before the device was done"
        assert self.at is not None
        assert end.at is not None
        return end.at - self.at


def test_the_device_clock_times_the_calls_and_not_the_cold_start():
    def spend(ms: float):
        def work() -> None:
            FakeEvent.now += ms

        return work

    clock = DeviceClock(FakeEvent, spend(1000.0))
    assert clock(spend(2.5), 4) == pytest.approx(2.5e-3)
    timings = measure(
        {"a": spend(2.0), "b": spend(3.0)}, "a", rounds=5, round_seconds=0.01, timed=clock
    )
    assert timings["b"].ratio.median == pytest.approx(1.5)
    assert timings["a"].calls_per_round == 5


def test_ceilings_are_measured():
    made = gpu.ceilings(wall_clock, "cpu", 128)
    assert set(made) == set(TOP)
    assert all(v > 0 for v in made.values())


@pytest.mark.parametrize("name", ["unsloth", "lorafusion", "liger"])
def test_peers_are_skipped_with_the_reason(name):
    with pytest.raises(providers.UnavailableError, match=name):
        providers.build(name, SMALL)


@pytest.mark.slow
def test_the_compiled_layer_is_timed_in_every_mode():
    """On the CPU and, where the backward alone is called again and again, as on a GPU."""
    pytest.importorskip("peft")
    for modes in (("fwd", "fwdbwd"), gpu.MODES):
        rows = gpu.run_case(SMALL, ["frozen", "peft-compile"], modes, TOP, wall_clock, 2, ())
        assert len(rows) == 2 * len(modes)
        if "bwd" not in modes:
            assert [r["skipped"] for r in rows] == [None] * len(rows)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("others", [(), (20,)])
def test_the_padded_buffer_is_timed(dropout_p, others):
    case = Case(33, 40, 50, 4, torch.bfloat16, dropout_p, others=others)
    rows = gpu.run_case(case, ["frozen", "aten-padded"], gpu.MODES, TOP, wall_clock, 2, ())
    assert [r["skipped"] for r in rows] == [None] * 6


def test_every_provider_can_be_built():
    pytest.importorskip("peft")
    for name in ("frozen", "peft", "peft-fp32", "peft-compile", "aten", "aten-fp32", "aten-padded"):
        assert providers.build(name, SMALL).name == name
