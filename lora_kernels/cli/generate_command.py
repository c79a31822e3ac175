"""`lora-kernels generate MODEL [PROMPT]`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lora_kernels.errors import DataError

if TYPE_CHECKING:
    from lora_kernels.training.text_generation import Generator, Sampling

NAME = "generate"
SUMMARY = "let a language model write, with or without an adapter"
DESCRIPTION = """\
Continues a prompt and prints the text as it is made. MODEL is the folder of a
run, an adapter in PEFT's format, or a model without an adapter. Without PROMPT
the text of --file or of standard input is taken, as one prompt.

--with gives the prompt to further adapters of the same base, which is in memory
once: each answers below a line with its name, or with --json on a line."""
EXAMPLES = """\
examples:
  lora-kernels generate runs/bible "In the beginning"
  lora-kernels generate adapter --base ./SmolLM2-135M --chat "What is iron?"
  lora-kernels generate runs/bible --with runs/news "The king said"
  lora-kernels generate runs/bible --temperature 0.8 --seed 3 < prompt.txt
  lora-kernels generate ./SmolLM2-135M --json "The cat" --max-new-tokens 9"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="run, adapter or plain model")
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="text to continue; - for stdin")
    parser.add_argument("--file", metavar="FILE", help="read the prompt from a UTF-8 file")
    parser.add_argument("--base", metavar="MODEL", help="base model of the adapters")
    parser.add_argument(
        "--with", action="append", default=[], dest="others", metavar="ADAPTER",
        help="one more adapter of the same base; may be given several times",
    )  # fmt: skip
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's chat message")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="tokens of the answer; 128"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T",
        help="0, the default, takes the most likely token; 1 samples as the model says",
    )  # fmt: skip
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="sample among this share"
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="sample among K tokens; 0: all"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X",
        help="above 1, tokens that were there already become less likely; 1",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the base's weights"
    )
    parser.add_argument("--no-kernels", action="store_true", help="leave the adapter to PEFT")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the text")


def run(arguments: argparse.Namespace) -> int:
    prompt = _prompt(arguments)

    from lora_kernels.training.text_generation import Generator, Sampling

    sampling = Sampling(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
    )
    generator = Generator(
        arguments.model,
        base=arguments.base,
        kernels=not arguments.no_kernels,
        dtype=arguments.dtype,
    )
    if not arguments.others:
        _answer(generator, prompt, sampling, arguments, {})
        return 0
    choice = generator.load_more(arguments.model, arguments.others, arguments.base)
    for number, folder in enumerate((arguments.model, *arguments.others)):
        choice.use(folder)
        if not arguments.json:
            print(f"{'' if number == 0 else chr(10)}== {folder}", flush=True)
        _answer(generator, prompt, sampling, arguments, {"adapter": folder})
    return 0


def _answer(
    generator: Generator, prompt: str, sampling: Sampling, arguments: argparse.Namespace,
    extra: dict[str, str],
) -> None:  # fmt: skip
    """Prints one answer, as it grows or as an object that begins with `extra`."""
    if arguments.json:
        answer = extra | generator(prompt, sampling, arguments.chat)
        print(json.dumps(answer, ensure_ascii=False))
        return
    for piece in generator.stream(prompt, sampling, arguments.chat):
        print(piece, end="", flush=True)
    print()


def _prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt is not None and arguments.file is not None:
        raise DataError("PROMPT and --file are given; accepted: one of them")
    if arguments.file is not None:
        try:
            text = Path(arguments.file).read_text(encoding="utf-8")
        except OSError as e:
            raise DataError(f"{arguments.file} cannot be read: {e.strerror or e}") from None
        except UnicodeDecodeError:
            raise DataError(f"{arguments.file} is not UTF-8 text") from None
    elif arguments.prompt in (None, "-"):
        if sys.stdin.isatty():
            raise DataError("no prompt; accepted: PROMPT, --file, or text on standard input")
        text = sys.stdin.read()
    else:
        text = arguments.prompt
    text = text.rstrip("\r\n")
    if not text.strip():
        raise DataError("the prompt is empty; accepted: a text")
    return text
