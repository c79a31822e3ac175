"""The same training with stock PEFT in a second process; the protocol is a line of JSON each way.

Answers have a pipe of their own: libraries print on stdout, some as soon as they are imported.

to the twin      {"config", "precision", "threads", "folder"}, then {} for each turn
from the twin    {} for each turn, then {"run"} or {"error"}
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch

import lora_kernels
from lora_kernels.errors import LoraKernelsError
from lora_kernels.training.config import Config
from lora_kernels.training.one_run import Run, train_once
from lora_kernels.training.turns import Turns


class StockTwin:
    """Starts the second process; a context that ends it.

    Args:
        config: of the run that it is compared with.
        precision: ``fp32`` or ``bf16``, already resolved.
        folder: empty folder for its scratch files.
    """

    def __init__(self, config: Config, precision: str, folder: Path) -> None:
        folder.mkdir()
        self._messages = folder / "messages.txt"
        search_path = [str(Path(lora_kernels.__file__).parents[1]), os.environ.get("PYTHONPATH")]
        reading, writing = os.pipe()
        self._answers = os.fdopen(reading)
        try:
            with self._messages.open("wb") as messages:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "lora_kernels.training.stock_twin", str(writing)],
                    stdin=subprocess.PIPE, stdout=messages, stderr=messages, text=True,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in search_path if p)},
                    pass_fds=(writing,),
                    start_new_session=True,  # an interrupt reaches the first process, which ends it
                )  # fmt: skip
        except BaseException:
            self._answers.close()
            raise
        finally:
            os.close(writing)
        request = {
            "config": {**config.to_dict(), "trackers": []},  # its numbers are in the report
            "precision": precision,
            "threads": torch.get_num_threads(),
            "folder": str(folder),
        }
        self._send(request)
        self.turns = Turns(give=lambda: self._send({}), take=self._take, first=True)

    def __enter__(self) -> StockTwin:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._answers.close()

    def result(self) -> Run:
        """Gives the last turn away and waits for the end.

        Raises:
            LoraKernelsError: the second process failed; the message has its last line.
        """
        self._send({})
        return Run(**self._receive()["run"])

    def _take(self) -> None:
        self._receive()

    def _send(self, message: dict[str, Any]) -> None:
        try:
            _write(self._process.stdin, message)
        except BrokenPipeError:
            raise self._failure() from None

    def _receive(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            raise self._failure()
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise LoraKernelsError(f"the run with stock PEFT failed: {message['error']}")
        return message

    def _failure(self) -> LoraKernelsError:
        self._process.wait()
        lines = self._messages.read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no message")
        code = self._process.returncode
        return LoraKernelsError(f"the run with stock PEFT ended with code {code}: {last.strip()}")


def _write(stream: IO[str] | None, message: dict[str, Any]) -> None:
    assert stream is not None
    stream.write(json.dumps(message) + "\n")
    stream.flush()


def _serve() -> None:
    """The second process."""
    from lora_kernels.training.config_reader import read_config
    from lora_kernels.training.quiet import cpu_threads, quiet_libraries
    from lora_kernels.training.tasks import task_class

    answers = os.fdopen(int(sys.argv[1]), "w")

    def take() -> None:
        if not sys.stdin.readline():
            sys.exit("the first process is gone")

    request = json.loads(sys.stdin.readline())
    config = read_config(request["config"])
    try:
        task = task_class(config.task).from_config(config)
        task.use_metric(config.metric)
        with cpu_threads(request["threads"]), quiet_libraries():
            run = train_once(
                config, task, request["precision"],
                kernels=False, folder=Path(request["folder"]), save_to=None, quiet=True,
                turns=Turns(give=lambda: _write(answers, {}), take=take, first=False),
            )  # fmt: skip
    except Exception as e:
        _write(answers, {"error": " ".join(f"{type(e).__name__}: {e}".split())})
        raise
    _write(answers, {"run": asdict(run)})


if __name__ == "__main__":
    _serve()
