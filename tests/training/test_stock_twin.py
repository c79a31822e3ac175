"""Two runs in two processes: strictly in turns, and no trace of the second one after a failure."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from tiny_bert import tiny_config

from lora_kernels.errors import LoraKernelsError
from lora_kernels.training.config_reader import read_config

pytest.importorskip("peft")
pytest.importorskip("transformers")

from lora_kernels.training import finetune, stock_twin
from lora_kernels.training.stock_twin import StockTwin
from lora_kernels.training.turns import Turns


def test_turns_alternate_and_nothing_overlaps() -> None:
    steps, to_second, to_first = 5, Queue[int](), Queue[int]()
    events: list[str] = []

    def side(name: str, turns: Turns) -> None:
        for _ in range(steps):
            turns.on_step_begin(None, None, None)
            events.append(f"{name} begins")
            time.sleep(0.002)
            events.append(f"{name} ends")

    second = Turns(lambda: to_first.put(0), lambda: void(to_second.get(timeout=60)), first=False)
    first = Turns(lambda: to_second.put(0), lambda: void(to_first.get(timeout=60)), first=True)
    thread = threading.Thread(target=side, args=("second", second))
    thread.start()
    side("first", first)
    to_second.put(0)
    thread.join(60)
    one_round = ["first begins", "first ends", "second begins", "second ends"]
    assert events == one_round * steps


def void(_: object) -> None:
    pass


def test_waiting_is_not_timed(tiny_model: Path, texts_csv: Path, tmp_path: Path) -> None:
    config = read_config(tiny_config(tiny_model, texts_csv, tmp_path / "run", max_steps=2))
    with StockTwin(config, "fp32", tmp_path / "twin") as twin:
        for _ in range(2):
            twin.turns.on_step_begin(None, None, None)
            time.sleep(1.0)
        run = twin.result()
    assert len(run.step_seconds) == len(run.losses) == 2
    assert run.seconds < 1.0 and run.layers == [] and run.before is None


def test_what_libraries_print_is_no_answer(
    tiny_model: Path, texts_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("print('[INFO] at your service')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    config = read_config(tiny_config(tiny_model, texts_csv, tmp_path / "run", max_steps=1))
    with StockTwin(config, "fp32", tmp_path / "twin") as twin:
        twin.turns.on_step_begin(None, None, None)
        assert twin.result().steps == 1
    assert "at your service" in (tmp_path / "twin" / "messages.txt").read_text()


def test_failure_of_the_second_process_is_told(
    tiny_model: Path, tmp_path: Path, texts_csv: Path
) -> None:
    source: dict[str, Any] = tiny_config(tiny_model, texts_csv, tmp_path / "run")
    source["data"] |= {"path": str(tmp_path / "gone.csv")}
    told = pytest.raises(LoraKernelsError, match=r"stock PEFT failed: DataError: .*gone\.csv")
    with StockTwin(read_config(source), "fp32", tmp_path / "twin") as twin, told:
        twin.turns.on_step_begin(None, None, None)


@pytest.mark.parametrize("step", [1, 2])
def test_death_of_the_second_process_leaves_nothing(
    tiny_model: Path, texts_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    class Mortal(StockTwin):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.taken = 0

        def _take(self) -> None:
            self.taken += 1
            if self.taken == step:
                self._process.kill()
            super()._take()

    monkeypatch.setattr(stock_twin, "StockTwin", Mortal)
    config = {**tiny_config(tiny_model, texts_csv, tmp_path / "run"), "compare_stock": True}
    with pytest.raises(LoraKernelsError, match="ended with code -9"):
        finetune(config, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_failure_of_the_first_run_ends_the_second(
    tiny_model: Path, texts_csv: Path, tmp_path: Path
) -> None:
    config = read_config(tiny_config(tiny_model, texts_csv, tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt), StockTwin(config, "fp32", tmp_path / "twin") as twin:
        raise KeyboardInterrupt
    assert twin._process.returncode is not None
