"""The benchmarks of blocks run, check before they time, and count what a layer keeps."""

from __future__ import annotations

import json
import os

import pytest
import torch

from lora_kernels.modules import layer_group
from lora_kernels.testing import assert_within_budget

pytest.importorskip("peft")
pytest.importorskip("transformers")

from benchmarks import (
    activation_memory,
    blocks,
    blocks_table,
    family_steps,
    grouping,
    peak_memory,
)


def test_blocks_are_checked_and_timed(tmp_path, capsys):
    path = tmp_path / "record.json"
    options = ["--dtype", "fp32", "--rows", "8", "--rounds", "1", "--rank", "2", "--no-compile"]
    assert blocks.main([*options, "--json", str(path)]) == 0
    assert "correct, at most" in capsys.readouterr().out
    found = [json.loads((tmp_path / f"record-{b}.json").read_text()) for b in ("qkv", "mlp")]
    assert [r["block"] for r in found] == ["qkv", "mlp"]
    assert all(row["seconds"] > 0 for r in found for row in r["rows"])
    page = blocks_table.blocks(found)
    assert "| LoRAMLP, fp32 |" in page and "| LoRAQKV, fp32 |" in page


def test_wrong_results_are_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(blocks.lk.LoRALinear, "scaling", property(lambda self: 2.0))
    options = ["--dtype", "fp32", "--rows", "8", "--rounds", "1", "--rank", "2", "--no-compile"]
    assert blocks.main(options) == 1
    assert "WRONG, not timed: qkv" in capsys.readouterr().err


def test_what_a_layer_keeps(tmp_path, monkeypatch):
    """Less than PEFT, less again without the activation, the input alone in a checkpoint."""
    monkeypatch.setitem(activation_memory.SHAPE, "vocab_size", 64)
    path = tmp_path / "record.json"
    options = ["--batch", "1", "--sequence", "8", "--rank", "2", "--json", str(path)]
    assert activation_memory.main(options) == 0
    kept = {r["provider"]: r["bytes_per_layer"] for r in json.loads(path.read_text())["rows"]}
    fused, stock = kept["lora_kernels"], kept["PEFT"]
    assert kept["lora_kernels, recompute_activations"] < fused < stock
    saved = fused - kept["lora_kernels, recompute_activations"]
    assert saved == 8 * 1536 * 2  # act(gate) * up in bf16, and no part of it
    assert kept["lora_kernels, checkpointing"] == kept["PEFT, checkpointing"] == 2 * 8 * 576


def test_grouping_is_checked_and_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(grouping, "TRAINING", (8,))
    monkeypatch.setattr(grouping, "DECODE", (2,))
    path = tmp_path / "record.json"
    assert grouping.main(["--dtype", "bf16", "--rounds", "1", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert {(r["M"], r["mode"]) for r in result["rows"]} == {(8, "fwdbwd"), (2, "fwd")}
    assert len(result["rows"]) == 2 * len(grouping.CASES) and "LORA_KERNELS" not in str(os.environ)
    assert "q, k, v" in blocks_table.grouping([result])


def test_wrong_grouping_is_not_timed(monkeypatch, capsys):
    op = layer_group.grouped_lora_linear
    monkeypatch.setattr(
        layer_group, "grouped_lora_linear", lambda *a, **k: [y * 1.5 for y in op(*a, **k)]
    )
    assert grouping.main(["--rounds", "1"]) == 1
    assert "WRONG, not timed: qkv: together" in capsys.readouterr().err


def test_steps_of_families(tmp_path):
    path = tmp_path / "record.json"
    options = ["--size", "tiny", "--batch", "1", "--sequence", "8", "--rank", "2", "--rounds", "1"]
    assert family_steps.main([*options, "--family", "bert", "t5", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [r["family"] for r in rows] == ["bert", "t5"]
    assert all(r["peft_seconds"] > 0 and r["lora_kernels_seconds"] > 0 for r in rows)


@pytest.mark.slow
def test_peak_memory_in_processes_of_their_own(tmp_path, monkeypatch):
    names = ("PEFT", "lora_kernels, fused loss")
    monkeypatch.setattr(peak_memory, "PROVIDERS", {n: peak_memory.PROVIDERS[n] for n in names})
    path = tmp_path / "record.json"
    options = ["--layers", "1", "--batch", "1", "--sequence", "256", "--rank", "2"]
    assert peak_memory.main([*options, "--dropout", "0", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    stock, fused = result["rows"]
    logits = 255 * 49152 * 4  # of which PEFT's step holds at least one copy in fp32
    assert stock["above_libraries_bytes"] - fused["above_libraries_bytes"] > logits
    for a, b in zip(stock["losses"], fused["losses"], strict=True):
        assert_within_budget(torch.tensor(b), torch.tensor(a).double(), torch.tensor(a).bfloat16())
    assert "| lora_kernels, fused loss |" in blocks_table.memory([result])
