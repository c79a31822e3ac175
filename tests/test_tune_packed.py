"""The search of tiles for packed weights and what becomes of its file, on a made-up device."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

import lora_kernels as lk
from benchmarks import tile_search_packed as packed
from benchmarks import tune
from benchmarks.gpu_ops import ROWS
from benchmarks.gpu_ops.row import Work
from benchmarks.timing import DeviceClock
from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops import _evidence, _ledger, _registry
from lora_kernels.ops._tuned_tiles import entry_of
from lora_kernels.ops.quant_linear import configs, formats, problem
from lora_kernels.ops.quant_linear.formats import QuantSpec
from tests.test_gpu_bench import FakeEvent
from tests.test_gpu_check import record

OP = "quant_linear"
H100 = configs.Target("sm_90", 132, 232448)
SPEC = QuantSpec("nf4", formats.FLAT, (4096, 4096), torch.bfloat16, 64)
FILE = "nvidia-h100-80gb-hbm3.json"


@pytest.fixture
def h100(monkeypatch, tmp_path):
    """This machine claims to be an H100 with both backends; tables come from tmp_path."""
    digests = {"triton": "t", "cuda": "c"}
    monkeypatch.setattr(_ledger, "folder", lambda op: tmp_path)
    monkeypatch.setattr(_ledger, "source_digest", lambda op, backend: digests[backend])
    here = _ledger.Device("NVIDIA H100 80GB HBM3", "sm_90")
    monkeypatch.setattr(_ledger, "device", lambda index: here)
    monkeypatch.setattr(problem, "supports", lambda backend, p: (True, "kernels"))

    def forget() -> None:
        configs.TILES.forget()
        _evidence.forget()

    forget()
    yield forget
    forget()


def asked(kernel: str = "walk", rows: int = 1) -> tuple[Any, Any]:
    """(look-up, default) of the kernel for the forward of SPEC."""
    with configs.TILES.recorded() as noted:
        configs.walk(SPEC, 2, False, H100)
        configs.launch(SPEC, rows, 2, False, True, True, H100)
        configs.dequantize_flat(SPEC, 2, H100)
    return next((k, v) for k, v in noted.items() if k[0] == kernel)


def quick_record(backend: str, ms: float, digests: dict[str, str], M: int = 1) -> dict[str, Any]:
    """A record of gpu-check in which `backend` took `ms` and aten 1, on one problem."""
    key = _evidence.key_of(
        _registry.find(OP).problem(M=M, K=4096, N=4096, dtype=torch.bfloat16, device="cuda")
    )
    rows = [
        {
            "op": OP, "case": "one", "sizes": dict(key.sizes), "kind": dict(key.kind), "mode": mode,
            "provider": provider, "skipped": None, "median_ms": value,
        }
        for mode in ("fwd", "bwd") for provider, value in (("aten", 1.0), (backend, ms))
    ]  # fmt: skip
    verdicts = {OP: {b: {"verdict": "passed"} for b in ("triton", "cuda")}}
    return record(rows=rows, kernels=verdicts, digests={OP: digests})


def tune_from(made: dict[str, Any], tmp_path: Any) -> dict[str, Any]:
    source = tmp_path / "r" / "r.json"
    source.parent.mkdir(exist_ok=True)
    source.write_text(json.dumps(made))
    assert tune.main(["--op", OP, "--from", str(source), "--out", str(tmp_path)]) == 0
    return json.loads((tmp_path / FILE).read_text())


def test_a_record_is_picked_for_its_own_rows_alone(h100, tmp_path):
    tune_from(quick_record("cuda", 0.5, {"triton": "t", "cuda": "c"}, M=16), tmp_path)
    h100()
    shapes = {"K": 4096, "N": 4096, "dtype": "bfloat16", "device": "cuda"}
    assert lk.explain(OP, M=16, **shapes)["backend"] == "cuda"
    assert lk.explain(OP, M=8, **shapes)["backend"] == "cuda"
    for M in (0, 17, 33):
        assert lk.explain(OP, M=M, **shapes)["backend"] == "aten", M


def test_tiles_are_used_kept_and_part_of_the_digest(h100, tmp_path):
    look_up, default = asked()
    entry = entry_of(look_up, asdict(replace(default, splits=16)))
    own = {"triton": _ledger.digest(OP, "triton", (entry,)), "cuda": "c"}
    made = quick_record("triton", 0.5, own)
    (tmp_path / FILE).write_text(json.dumps(tune.table(made, OP, [entry])))
    h100()
    assert configs.walk(SPEC, 2, False, H100).splits == 16
    assert configs.walk(SPEC, 2, True, H100).splits != 16  # another direction
    assert configs.walk(replace(SPEC, shape=(4096, 4097)), 2, False, H100).splits != 16
    assert configs.walk(SPEC, 2, False, replace(H100, name="sm_80")).splits != 16
    assert tune_from(made, tmp_path)["configs"] == [entry]
    h100()
    shapes = {"M": 1, "K": 4096, "N": 4096, "dtype": "bfloat16", "device": "cuda"}
    assert lk.explain(OP, **shapes)["backend"] == "triton"
    # Measured without the tiles: no evidence for the kernels with them.
    bare = quick_record("triton", 0.5, {"triton": "t", "cuda": "c"})
    (tmp_path / FILE).write_text(json.dumps(tune.table(bare, OP, [entry])))
    h100()
    assert configs.walk(SPEC, 2, False, H100) == default
    assert lk.explain(OP, **shapes)["backend"] == "aten"


def test_launches_reach_twice_as_many_rows_and_walks_never_see_them(h100):
    look_up, default = asked("launch", 8)
    with configs.TILES.installed((entry_of(look_up, asdict(replace(default, ahead=1))),)):
        found = {m: configs.launch(SPEC, m, 2, False, True, True, H100).ahead for m in range(1, 40)}
    assert {m for m, ahead in found.items() if ahead == 1} == set(range(4, 17))
    assert asked("walk", 8) == asked("walk", 100)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"held": 64, "step": 48, "splits": 1}, "step=48; accepted: powers of two from 32 to 128"),
        ({"held": 64, "step": 64, "splits": True}, "splits=True"),
        ({"held": 64}, "missing"),
        ({"held": 64, "step": 64, "splits": 1, "stages": 3}, "stages"),
    ],
)
def test_a_file_with_another_kind_of_tile_is_refused(h100, config, why):
    look_up, _ = asked()
    with (
        configs.TILES.installed((entry_of(look_up, config),)),
        pytest.raises(InvalidArgumentError, match=why),
    ):
        configs.walk(SPEC, 2, False, H100)


@pytest.mark.parametrize("default", [
    configs.Walk(64, 64, 4), configs.Launch(16, 4, 4), configs.Dequantize(64, 64, 4),
    configs.Flat(256),
])  # fmt: skip
def test_candidates_are_valid_and_without_the_default(default):
    found = packed.candidates(default)
    assert len(found) >= 2 and default not in found
    assert not [c for c in found if configs.invalid(c)]


def test_the_search_finds_the_quickest_right_tile(h100, monkeypatch):
    """More splits cost less, thirty-two are wrong; the kernels are made up."""
    look_up, default = asked()
    wrong = 4 * default.splits

    def forward() -> dict[str, Any]:
        splits = configs.walk(SPEC, 2, False, H100).splits
        FakeEvent.now += 100.0 / splits
        return {"y": torch.tensor(float(splits))}

    def judge(inputs: Any) -> Any:
        def check(got: dict[str, Any], label: str) -> None:
            assert float(got["y"]) != wrong, "more than its budget"

        return check

    row = replace(
        ROWS[OP], cases={"made up": ROWS[OP].small[1]}, judge=judge,
        work=lambda inputs, provider: Work(forward),
    )  # fmt: skip
    monkeypatch.setattr(type(row), "able", lambda *a: (True, ""))
    said: list[str] = []
    clock = DeviceClock(FakeEvent)
    (made,) = packed.search(clock, time.monotonic() + 60, said.append, row, "cpu")
    assert made["config"]["splits"] == 2 * default.splits
    assert made["kernel"] == look_up[0] == "walk" and made["ratio_to_default"] < 1
    assert any("more than its budget" in line for line in said)
    with packed.installed([made]):
        assert configs.walk(SPEC, 2, False, H100).splits == 2 * default.splits
    assert configs.walk(SPEC, 2, False, H100) == default
    assert packed.search(clock, 0.0, said.append, row, "cpu") == []
    assert said[-1] == "no time left for made up"
