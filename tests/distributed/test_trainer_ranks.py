"""The Trainer on two processes against one: DDP, FSDP2, the whole job, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lora_kernels.testing import assert_within_budget
from lora_kernels.training.checkpoints import flaw

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
    ),
]

ROOT = Path(__file__).resolve().parents[2]
CASES = (
    "one", "one-fp32", "ddp", "ddp-resumed", "fsdp2", "fsdp2-resumed", "fsdp2-sharded",
    "fsdp2-sharded-resumed", "fsdp-dropped", "finetune-one", "finetune-ddp",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("trainer_ranks")
    script = Path(__file__).with_name("trainer_ranks.py")
    done = subprocess.run(
        [sys.executable, str(script), str(place), *CASES],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return place


def result(folder: Path, case: str) -> dict:
    failure = folder / f"{case}.txt"
    assert not failure.exists(), failure.read_text()[-2000:]
    return torch.load(folder / f"{case}.pt", weights_only=False)


@pytest.mark.parametrize(
    ("case", "wrapped", "kind"),
    [("ddp", "DistributedDataParallel", "Parameter"), ("fsdp2", "FSDPPeftModel", "DTensor")],
)
def test_two_processes_equal_one(folder, case, wrapped, kind):
    got, want, low = result(folder, case), result(folder, "one"), result(folder, "one-fp32")
    assert got["wrapped"].startswith(wrapped) and got["kinds"] == {kind}
    assert set(got["fused"]) == {"fused"}
    assert got["adapter"].keys() == want["adapter"].keys() and len(got["adapter"]) == 28
    for name, t in got["adapter"].items():
        # fp64 throughout: closer to the one process than fp32 is.
        assert_within_budget(t, want["adapter"][name], low["adapter"][name], name)
    # The Trainer logs losses in fp32.
    losses = [torch.tensor(r["losses"], dtype=torch.float64) for r in (got, want, low)]
    assert len(losses[0]) == 3
    assert_within_budget(losses[0], losses[1], losses[2].float())


def test_one_half_of_the_batch_would_be_noticed(folder):
    want, low = result(folder, "one"), result(folder, "one-fp32")
    first, second = (torch.tensor(want["losses"][i : i + 1], dtype=torch.float64) for i in (0, 1))
    with pytest.raises(AssertionError, match="budget"):
        assert_within_budget(first, second, torch.tensor(low["losses"][1:2]))


@pytest.mark.parametrize("case", ["ddp", "fsdp2"])
def test_checkpoints_are_whole(folder, case):
    from safetensors.torch import load_file

    got = result(folder, case)
    place = folder / case / "checkpoint-3"
    assert flaw(place) == ""
    saved = load_file(place / "adapter_model.safetensors")
    for name, t in got["adapter"].items():
        key = name.replace("module.", "").replace(".default", "")
        assert torch.equal(saved[key], t), name


def test_sharded_checkpoint_holds_a_part_of_each_process(folder):
    place = folder / "fsdp2-sharded" / "checkpoint-2"
    assert flaw(place) == ""
    assert len(list((place / "pytorch_model_fsdp_0").glob("*.distcp"))) == 2


@pytest.mark.parametrize("case", ["ddp", "fsdp2", "fsdp2-sharded"])
def test_resumed_run_ends_with_the_same_bits(folder, case):
    whole, resumed = result(folder, case), result(folder, f"{case}-resumed")
    assert whole["losses"] == resumed["losses"]
    for name, t in whole["adapter"].items():
        assert torch.equal(t, resumed["adapter"][name]), name


def test_sharding_that_would_be_dropped_is_refused(folder):
    assert not (folder / "fsdp-dropped.pt").exists()
    message = (folder / "fsdp-dropped.txt").read_text()
    assert "FSDP was asked for, but accelerate would run DDP on the CPU" in message


def test_the_whole_job_writes_once(folder):
    one, two = result(folder, "finetune-one"), result(folder, "finetune-ddp")
    runs = [folder / f"run-finetune-{case}" for case in ("one", "ddp")]
    assert {p.name for p in runs[0].iterdir()} == {p.name for p in runs[1].iterdir()}
    report = json.loads((runs[1] / "report.json").read_text())
    assert report["after"] == two["after"] and report["examples"]["train"] > 0
    assert not [p for p in folder.iterdir() if p.name.startswith(".run")]
    # Up to the first update; later AdamW blows rounding of tiny gradients up in fp32.
    losses = [torch.tensor(r["losses"][:2], dtype=torch.float64) for r in (two, one)]
    assert len(two["losses"]) == len(one["losses"]) == 6
    assert_within_budget(losses[0], losses[1], losses[1].float())
