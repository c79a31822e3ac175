"""fused_shrink="auto" on a GPU: what the ledger says, and nothing without it. No GPU is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kernels.modules import handed_shrink
from lora_kernels.modules.handed_shrink import backend_for, reason_against
from lora_kernels.ops import _evidence, _ledger, _registry, _shrink_pairs

SHAPES: dict[str, dict[str, Any]] = {
    "norm_shrink": {"K": 4096, "N": (4096, 1024, 1024), "rank": (16, 16, 16)},
    "activation_shrink": {
        "K": 4096, "N": (14336, 14336, 4096), "rank": (16, 16, 16), "activation": "silu"
    },
}  # fmt: skip
BF16 = torch.bfloat16
HERE = _ledger.Device("NVIDIA H100 80GB HBM3", "sm_90")


class Far:
    """Stands for a tensor of 8192 rows on a GPU."""

    device, dtype, shape = torch.device("cuda", 0), BF16, (8192, 4096)

    def numel(self) -> int:
        return 8192 * 4096


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Write what was measured: (pair, direction) -> time over each op by itself."""
    monkeypatch.setattr(_ledger, "device", lambda index: HERE)
    monkeypatch.setattr(_ledger, "folder", lambda op: tmp_path / op)
    monkeypatch.setattr(_shrink_pairs, "supports", lambda backend, problem: (True, "kernels"))
    for op in (_shrink_pairs.rms_norm, _shrink_pairs.gated_activation, _shrink_pairs.lora_linear):
        monkeypatch.setattr(op, "supports", lambda backend, problem: (False, "not on this machine"))

    def forget() -> None:
        _evidence.forget()
        handed_shrink._measured.cache_clear()

    def write(
        pair: str, times: dict[str, float], digest: str = "", verdict: str = "passed"
    ) -> None:
        problem = _registry.find(pair).problem(
            M=8192, dtype=BF16, adapter_dtype=BF16, device="cuda", **SHAPES[pair]
        )
        key = _evidence.key_of(problem)
        own = {"verdict": verdict, "digest": digest or _ledger.source_digest(pair, "triton")}
        entries = [
            {"sizes": dict(key.sizes), "kind": dict(key.kind), "direction": d,
             "ms": {"aten": 1.0, "triton": t}}
            for d, t in times.items()
        ]  # fmt: skip
        (tmp_path / pair).mkdir(exist_ok=True)
        (tmp_path / pair / "h100.json").write_text(json.dumps({
            "schema": _ledger.SCHEMA, "op": pair, "date": "2026-11-22", "commit": "0",
            "device": {"type": "cuda", "name": HERE.name, "architecture": HERE.architecture},
            "backends": {"triton": own}, "entries": entries,
        }))  # fmt: skip
        forget()

    forget()
    yield write
    forget()


def chosen(pair: str, direction: str, switch: Any = "auto") -> str:
    x: Any = Far()
    return backend_for(switch, pair, direction, x, adapter_dtype=BF16, **SHAPES[pair])


def reason(pair: str) -> str:
    return reason_against(
        "auto", pair, torch.device("cuda", 0), BF16, adapter_dtype=BF16, **SHAPES[pair]
    )


@pytest.mark.parametrize("pair", SHAPES)
def test_without_evidence_the_layers_make_s(pair: str, table: Any) -> None:
    for direction in _ledger.DIRECTIONS:
        assert chosen(pair, direction) == ""
    assert "never run on hardware" in reason(pair)
    assert chosen(pair, "fwd", True) == "auto"  # asked for: what the op takes by itself
    assert chosen(pair, "fwd", False) == ""


@pytest.mark.parametrize("pair", SHAPES)
def test_evidence_switches_it_on_per_direction(pair: str, table: Any) -> None:
    first, second = _shrink_pairs.DIRECTIONS[pair]
    table(pair, {first: 0.95, second: 1.05})
    assert (chosen(pair, first), chosen(pair, second)) == ("triton", "")
    assert reason(pair) == ""
    table(pair, {first: 1.05, second: 0.95})
    assert (chosen(pair, first), chosen(pair, second)) == ("", "triton")


@pytest.mark.parametrize("pair", SHAPES)
def test_evidence_of_other_kernels_or_a_failed_check_is_none(pair: str, table: Any) -> None:
    table(pair, {"fwd": 0.5}, digest="another")
    assert chosen(pair, "fwd") == "" and "sources changed" in reason(pair)
    table(pair, {"fwd": 0.5}, verdict="failed")
    assert chosen(pair, "fwd") == "" and "failed its checks" in reason(pair)


def test_switches_of_the_environment(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table("norm_shrink", {"fwd": 0.5})
    assert chosen("norm_shrink", "fwd") == "triton"
    monkeypatch.setenv("LORA_KERNELS_DISABLE", "norm_shrink:triton")
    assert chosen("norm_shrink", "fwd") == ""
    monkeypatch.setenv("LORA_KERNELS_DISABLE", "norm_shrink")
    assert chosen("norm_shrink", "fwd", True) == ""
    monkeypatch.delenv("LORA_KERNELS_DISABLE")
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "aten")
    assert chosen("norm_shrink", "fwd") == "" and chosen("norm_shrink", "fwd", True) == "aten"
    assert "LORA_KERNELS_BACKEND=aten" in reason("norm_shrink")


def test_a_record_of_gpu_check_becomes_evidence_of_both_kinds() -> None:
    """The tuner keeps the directions that a pair is judged by."""
    from benchmarks import tune

    rows = [
        {
            "sizes": {"M": 1},
            "kind": {},
            "mode": mode,
            "provider": p,
            "skipped": None,
            "median_ms": t,
        }
        for mode in ("fwd", "bwd", "fwdbwd")
        for p, t in (("aten", 1.0), ("triton", 0.9))
    ]
    for pair, directions in _shrink_pairs.DIRECTIONS.items():
        made = tune.entries(rows, tune.directions(pair))
        assert tuple(e["direction"] for e in made) == directions
        for entry in made:
            _ledger._entry(entry)
