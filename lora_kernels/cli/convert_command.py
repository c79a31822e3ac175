"""`lora-kernels convert ADAPTER OUTPUT --to FORMAT`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kernels.errors import AdapterFileError, ConfigError

if TYPE_CHECKING:
    from lora_kernels.modules.adapter_formats import Adapter, Heads

NAME = "convert"
SUMMARY = "between adapters of PEFT, loralib and torchtune"
DESCRIPTION = """\
Rewrites an adapter in another library's format; what ADAPTER holds is found out
by looking. PEFT's is a folder, the others are a file (torch's format, or
safetensors by the ending of the name) with NAME.adapter_config.json beside it,
from which the way back is exact. Pickled files are read without running code.

loralib's files do not hold alpha: give --alpha. Its MergedLinear layers need
--enable-lora, too. torchtune orders the rows of query and key by its rotary
embedding: name the base model (--base), or give --heads, or --heads none for
models whose converter leaves the rows alone (Qwen, Phi)."""
EXAMPLES = """\
examples:
  lora-kernels convert adapter lora.bin --to loralib
  lora-kernels convert roberta_lora.bin adapter --to peft --alpha 16
  lora-kernels convert gpt2.bin adapter --to peft --alpha 32 --enable-lora 1,0,1
  lora-kernels convert adapter t/adapter.pt --to torchtune --base ./llama"""

# Families whose torchtune models order the rows of query and key by pairs.
_PAIRS = ("llama", "mistral", "gemma2")
_HALVES = ("qwen2", "qwen3", "phi3")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or file to read")
    parser.add_argument("output", metavar="OUTPUT", help="new folder or file")
    parser.add_argument("--to", required=True, choices=("peft", "loralib", "torchtune"))
    parser.add_argument("--alpha", type=float, help="lora_alpha, where the file lacks it")
    parser.add_argument(
        "--enable-lora", metavar="1,0,1", help="adapted parts of loralib's merged layers"
    )
    parser.add_argument("--base", metavar="MODEL", help="folder of the base model")
    parser.add_argument(
        "--heads", metavar="Q,K,WIDTH", help="query heads, key heads, width of one; or none"
    )
    parser.add_argument("--force", action="store_true", help="replace OUTPUT")
    parser.add_argument("--json", action="store_true", help="what was done, as JSON")


def run(arguments: argparse.Namespace) -> int:
    from lora_kernels.modules.adapter_formats import read_adapter, write_adapter

    output = Path(arguments.output)
    if output.exists() and not arguments.force and (output.is_file() or any(output.iterdir())):
        raise ConfigError(f"OUTPUT={str(output)!r} exists; choose another name or add --force")
    if output.is_dir() and arguments.to != "peft":
        raise ConfigError(
            f"OUTPUT={str(output)!r} is a folder; accepted for {arguments.to}: a file"
        )
    if arguments.to == "peft" and output.is_file():
        raise ConfigError(f"OUTPUT={str(output)!r} is a file; accepted for peft: a folder")
    enabled = _enabled(arguments.enable_lora)
    path = Path(arguments.adapter)
    if (path / "adapter" / "adapter_config.json").is_file():
        path = path / "adapter"
    heads, known = _heads(arguments.heads, arguments.base)
    adapter, found = read_adapter(path, alpha=arguments.alpha, enabled=enabled, heads=heads)
    if "torchtune" in (found, arguments.to) and found != arguments.to and not known:
        heads = _heads_of_config(adapter)
        if found == "torchtune":
            adapter, _ = read_adapter(path, alpha=arguments.alpha, heads=heads)
    if arguments.base is not None and not adapter.config.get("base_model_name_or_path"):
        adapter.config["base_model_name_or_path"] = arguments.base
    written = write_adapter(adapter, output, arguments.to, enabled=enabled, heads=heads)
    layers = len(list(adapter.layers()))
    if arguments.json:
        done = {
            "from": found, "to": arguments.to, "layers": layers, "notes": adapter.notes,
            "written": [str(p) for p in written],
        }  # fmt: skip
        print(json.dumps(done, indent=2, ensure_ascii=False))
        return 0
    print(f"{found} to {arguments.to}: {layers} layers")
    for note in adapter.notes:
        print(note)
    print("written: " + ", ".join(str(p) for p in written))
    return 0


def _enabled(text: str | None) -> list[bool] | None:
    if text is None:
        return None
    parts = [p.strip().lower() for p in text.split(",")]
    if not all(p in ("0", "1", "true", "false") for p in parts) or not {"1", "true"} & set(parts):
        raise ConfigError(f"--enable-lora {text!r}; accepted: 1 and 0 by commas, such as 1,0,1")
    return [p in ("1", "true") for p in parts]


def _heads(text: str | None, base: str | None) -> tuple[Heads | None, bool]:
    """(heads, whether the user said so)."""
    from lora_kernels.modules.adapter_formats import Heads

    if text == "none":
        return None, True
    if text is not None:
        try:
            query, key, width = (int(p) for p in text.split(","))
        except ValueError:
            query = 0
        if query < 1 or key < 1 or width < 1:
            raise ConfigError(
                f"--heads {text!r}; accepted: three numbers such as 32,8,128, or none"
            )
        return Heads(query, key, width), True
    if base is not None:
        return _heads_of_model(base), True
    return None, False


def _heads_of_config(adapter: Adapter) -> Heads | None:
    base = adapter.config.get("base_model_name_or_path")
    if not base or not Path(str(base)).is_dir():
        raise AdapterFileError(
            "the rows of query and key cannot be put in order without the base model: give its "
            "folder with --base, or --heads"
        )
    return _heads_of_model(str(base))


def _heads_of_model(base: str) -> Heads | None:
    from lora_kernels.modules.adapter_formats import Heads
    from lora_kernels.training.references import model_path

    path = Path(model_path("base", base)) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"base={base!r}: {path} cannot be read: {e}") from None
    config: dict[str, Any] = raw.get("text_config") or raw
    family = config.get("model_type", raw.get("model_type"))
    if family in _HALVES:
        return None
    if family not in _PAIRS:
        raise ConfigError(
            f"base={base!r}: model_type={family!r} is not known to torchtune's converters; "
            f"accepted: {', '.join((*_PAIRS, *_HALVES))}, or give --heads"
        )
    query = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // query
    return Heads(query, config.get("num_key_value_heads") or query, width)
