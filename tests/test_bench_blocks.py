"""The benchmarks of blocks run, check before they time, and count what a layer keeps."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

from benchmarks import activation_memory, blocks


def test_blocks_are_checked_and_timed(tmp_path, capsys):
    path = tmp_path / "record.json"
    options = ["--dtype", "fp32", "--rows", "8", "--rounds", "1", "--rank", "2", "--no-compile"]
    assert blocks.main([*options, "--json", str(path)]) == 0
    assert "correct, at most" in capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert {r["block"] for r in rows} == {"qkv", "mlp"} and all(r["seconds"] > 0 for r in rows)


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
    assert saved == 2 * 8 * 1536 * 2  # act(gate) and its product with up, in bf16
    assert kept["lora_kernels, checkpointing"] == kept["PEFT, checkpointing"] == 2 * 8 * 576
