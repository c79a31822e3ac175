"""The `lora-kernels` command. Sub-commands are files here; each imports what it needs late."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lora_kernels._version import __version__
from lora_kernels.cli import (
    convert_command,
    env_command,
    eval_command,
    generate_command,
    inspect_command,
    merge_command,
    predict_command,
    train_command,
)
from lora_kernels.errors import LoraKernelsError, TrainingInterruptedError

# As EX_TEMPFAIL of sysexits.h: not done, worth another try. Schedulers can requeue on it.
INTERRUPTED = 75

_COMMANDS = (
    train_command,
    predict_command,
    eval_command,
    generate_command,
    merge_command,
    convert_command,
    inspect_command,
    env_command,
)


class _TerminatedError(BaseException):
    """SIGTERM, as an exception that no handler of errors stops."""


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Inside, SIGTERM ends the block as Ctrl-C does, so that half-written output is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: object) -> None:
        raise _TerminatedError

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: words after the program's name; None takes the process's own.

    Returns:
        0, 1 where `env` finds something broken, 2 after an error that the message explains, 75
        after SIGTERM or Ctrl-C stopped a training that left a checkpoint to resume, 130 and 143
        after any other Ctrl-C and SIGTERM.
    """
    arguments = _parse(argv)
    try:
        with _sigterm_unwinds():
            return int(arguments.run(arguments))
    except _TerminatedError:
        print("lora-kernels: terminated", file=sys.stderr)
        return 143
    except TrainingInterruptedError as e:
        print(f"lora-kernels: {e}", file=sys.stderr)
        return INTERRUPTED
    except LoraKernelsError as e:
        print(f"lora-kernels: error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as e:
        missing = (e.name or "").partition(".")[0]
        if missing in ("", "lora_kernels"):
            raise
        print(
            f"lora-kernels: error: {missing} is not installed; pip install 'lora-kernels[train]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("lora-kernels: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe (head, less) went away. Python flushes stdout once more at exit.
        sys.stdout = None
        return 141


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """argparse gives optional words away at the first option; here an option may stand before."""
    parser = _parser()
    arguments, left = parser.parse_known_args(argv)
    if left and not any(word.startswith("-") and word != "-" for word in left):
        if hasattr(arguments, "overrides"):
            arguments.overrides += left
            return arguments
        late = [n for n in ("prompt", "data") if getattr(arguments, n, "absent") is None]
        if late and len(left) == 1:
            setattr(arguments, late[0], left[0])
            return arguments
    if left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lora-kernels",
        description="Train and run low-rank adapters on fused kernels.",
        epilog="Each command explains itself: lora-kernels train --help",
    )
    parser.add_argument("--version", action="version", version=f"lora-kernels {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        sub = commands.add_parser(
            command.NAME,
            help=command.SUMMARY,
            description=command.DESCRIPTION,
            epilog=command.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser
