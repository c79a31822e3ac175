"""SIGTERM and Ctrl-C end the command with a code of their own and leave nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_kernels.cli import main
from lora_kernels.errors import TrainingInterruptedError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("which", "code", "word"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
)
def test_signal_outside_of_a_training(monkeypatch, capsys, tmp_path, which, code, word):
    from lora_kernels.cli import env_command
    from lora_kernels.training.atomic import staged_folder

    def run(arguments):
        with staged_folder(tmp_path / "out") as stage:
            (stage / "half").write_text("x")
            os.kill(os.getpid(), which)
            time.sleep(5)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(env_command, "run", run)
    # A shell's background job starts with SIGINT ignored.
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["env"]) == code
    finally:
        signal.signal(signal.SIGINT, old)
    assert word in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_stopped_training_has_a_code_of_its_own(monkeypatch, capsys):
    from lora_kernels.cli import env_command

    def run(arguments):
        raise TrainingInterruptedError("stopped by SIGTERM after step 3 of 9; checkpoint c")

    monkeypatch.setattr(env_command, "run", run)
    assert main(["env"]) == 75
    assert capsys.readouterr().err == (
        "lora-kernels: stopped by SIGTERM after step 3 of 9; checkpoint c\n"
    )


def test_options_may_stand_among_the_overrides(monkeypatch, capsys):
    from lora_kernels.cli import train_command

    seen = []
    monkeypatch.setattr(train_command, "run", lambda arguments: seen.append(arguments) or 0)
    assert main(["train", "c.yaml", "lora.r=4", "--quiet", "resume=auto"]) == 0
    assert seen[0].overrides == ["lora.r=4", "resume=auto"] and seen[0].quiet
    with pytest.raises(SystemExit) as ended:
        main(["train", "c.yaml", "--quiet", "--fast", "resume=auto"])
    assert ended.value.code == 2 and "--fast" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["predict", "run", "text", "--json", "more", "--nothing"])


@pytest.fixture(scope="module")
def signalled(tmp_path_factory):
    yaml = pytest.importorskip("yaml")
    pytest.importorskip("peft")
    from tiny_bert import make_texts, tiny_config, write_csv, write_model

    folder = tmp_path_factory.mktemp("signalled")
    data = write_csv(folder / "texts.csv", make_texts(20))
    config = tiny_config(write_model(folder / "model"), data, folder / "run")
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    script = Path(__file__).with_name("signalled_runs.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(folder)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("which", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("moment", ["reading", "tokenizing", "evaluating before"])
def test_a_signal_before_the_first_step_leaves_nothing(signalled, moment, which):
    found = signalled[f"{moment} {which}"]
    assert found["code"] == {"SIGTERM": 143, "SIGINT": 130}[which], found["error"]
    assert found["entries"] == [] and "Traceback" not in found["error"]
    assert found["equal"]  # the same command then does it all


@pytest.mark.slow
@pytest.mark.parametrize("which", ["SIGTERM", "SIGINT"])
def test_a_signal_during_a_validation_stops_after_the_next_step(signalled, which):
    found = signalled[f"evaluating between {which}"]
    assert found["code"] == 75, found["error"]
    assert f"stopped by {which} after step 5 of 12" in found["error"]
    assert found["entries"] == ["run.checkpoints"] and "checkpoint-5" in found["left"]
    assert found["equal"]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["SIGTERM", "SIGINT"])
def test_a_signal_after_the_last_step_keeps_the_checkpoints(signalled, which):
    found = signalled[f"evaluating after {which}"]
    assert found["code"] == {"SIGTERM": 143, "SIGINT": 130}[which], found["error"]
    assert found["entries"] == ["run.checkpoints"] and "checkpoint-12" in found["left"]
    assert found["equal"]


@pytest.mark.slow
def test_train_command_stops_and_resumes(tmp_path):
    yaml = pytest.importorskip("yaml")
    pytest.importorskip("peft")
    from tiny_bert import make_texts, tiny_config, write_csv, write_model

    model = write_model(tmp_path / "model")
    data = write_csv(tmp_path / "texts.csv", make_texts(40))
    config = tiny_config(model, data, tmp_path / "run", max_steps=4000, save_steps=50)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    words = [sys.executable, "-m", "lora_kernels", "train", str(tmp_path / "c.yaml"), "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    home = tmp_path / "run.checkpoints"
    process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
    for _ in range(1200):
        if list(home.glob("checkpoint-*/complete.json")) or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 75, error
    assert "stopped by SIGTERM after step" in error and not (tmp_path / "run").exists()
    step = max(int(p.name.rpartition("-")[2]) for p in home.glob("checkpoint-*"))
    done = subprocess.run(
        [*words, "resume=auto", f"train.max_steps={step + 3}"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "of the run to resume" in done.stderr


@pytest.mark.slow
def test_killed_train_command_ends_like_one_that_was_not(tmp_path):
    yaml = pytest.importorskip("yaml")
    pytest.importorskip("peft")
    from tiny_bert import make_texts, tiny_config, write_csv, write_model

    model = write_model(tmp_path / "model")
    data = write_csv(tmp_path / "texts.csv", make_texts(40))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def words(name, *overrides):
        config = tiny_config(
            model, data, tmp_path / name, max_steps=120, save_steps=10, base_dropout=0.2
        )
        config["lora"]["dropout"] = 0.1
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        start = [sys.executable, "-m", "lora_kernels", "train", str(tmp_path / f"{name}.yaml")]
        return [*start, "--quiet", *overrides]

    assert subprocess.run(words("whole"), env=environment, capture_output=True).returncode == 0
    process = subprocess.Popen(words("cut"), env=environment, stderr=subprocess.DEVNULL)
    home = tmp_path / "cut.checkpoints"
    for _ in range(2400):
        if len(list(home.glob("checkpoint-*"))) > 1 or process.poll() is not None:
            break
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "cut").exists()
    done = subprocess.run(
        words("cut", "resume=auto"), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    whole, cut = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("whole", "cut")
    )
    assert whole == cut
