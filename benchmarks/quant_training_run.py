"""One base format of `benchmarks.quant_training`, in a process of its own.

    python -m benchmarks.quant_training_run FOLDER FORMAT curve|memory OPTIONS

FOLDER holds a bf16 checkpoint and `tokens.pt` (`train` and `heldout`, `[n, length]` token ids),
OPTIONS are a JSON object. Prints one JSON object.

`memory` counts resident memory above what the process had when its libraries were loaded and
warm: of the loader at most, after it, and at most during two training steps. The loader maps the
file and leaves dense tensors as views of it; its peak counts the pages that were read. Before
the other two figures every tensor is copied, so that no page of the file remains.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lora_kernels as lk
from benchmarks.memory import reset_high_water_mark, resident_bytes

# Row -> arguments of QuantConfig; None leaves the base in bf16.
FORMATS: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "nf4": {"format": "nf4", "double_quant": True},
    "int8": {"format": "int8"},
    "fp8": {"format": "fp8_row"},
}


def load(folder: Path, name: str) -> nn.Module:
    """The checkpoint in bf16, its linear layers but the output head quantized on the way."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    arguments = FORMATS[name]
    more = {} if arguments is None else {"quantization_config": lk.QuantConfig(**arguments)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **more)
    model.config.use_cache = False
    return model


def sizes(model: nn.Module) -> dict[str, int]:
    """Bytes of the frozen model, computed from its tensors; tied ones count once."""
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    weights = sum(m.in_features * m.out_features for m in linears)
    dense = {id(p): p for m in model.modules() for p in m._parameters.values() if p is not None}
    for m in linears:
        dense.pop(id(m.weight), None)
    others = sum(p.numel() for p in dense.values() if p.is_floating_point())
    linear_bytes = sum(
        m.quant_weight.nbytes if isinstance(m, lk.QuantLinear) else m.weight.nbytes for m in linears
    )
    return {
        "linear_weights": weights, "linear_bytes": linear_bytes,
        "parameters": weights + others, "model_bytes": sum(held.values()),
    }  # fmt: skip


def adapt(model: nn.Module, options: dict[str, Any]) -> list[nn.Parameter]:
    """The same A for every format: the seed is set where the adapters are made. B is zero."""
    torch.manual_seed(options["seed"])
    lk.replace_modules(
        model, options["rank"], 2 * options["rank"], adapter_dtype=torch.float32
    )  # fmt: skip
    model.train()
    return [p for p in model.parameters() if p.requires_grad]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean next-token loss, in fp32, as transformers has it."""
    return model(input_ids=ids, labels=ids).loss


@torch.inference_mode()
def perplexity(model: nn.Module, ids: Tensor, batch: int) -> float:
    model.eval()
    total = 0.0
    for part in ids.split(batch):
        logits = model(input_ids=part).logits[:, :-1].float()
        total += cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    model.train()
    return math.exp(total / (ids.shape[0] * (ids.shape[1] - 1)))


def curve(folder: Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Held-out perplexity before, every few steps and after; the loss of every step."""
    tokens = torch.load(folder / "tokens.pt")
    train, heldout = tokens["train"], tokens["heldout"]
    model = load(folder, name)
    trained = adapt(model, options)
    optimizer = torch.optim.AdamW(trained, lr=options["learning_rate"], weight_decay=0.0)
    warm_up = max(1, options["steps"] // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / warm_up))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(options["seed"]))
    losses: list[float] = []
    points = [{"step": 0, "perplexity": perplexity(model, heldout, options["batch"])}]
    for step in range(options["steps"]):
        rows = order[torch.arange(options["batch"]) + step * options["batch"]]
        loss = loss_of(model, train[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % options["every"] == 0 or step + 1 == options["steps"]:
            value = perplexity(model, heldout, options["batch"])
            points.append({"step": step + 1, "perplexity": value})
            print(f"{name}: step {step + 1}, perplexity {value:.3f}", file=sys.stderr, flush=True)
    return {"curve": points, "losses": losses, "trained": sum(p.numel() for p in trained)}


def _settle() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _warm_libraries(folder: Path, options: dict[str, Any]) -> None:
    """A model of the same kind, two layers and small: code pages and scratch are not the step's."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers, config.vocab_size = 1, 64
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, key, None)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    trained = adapt(model, options)
    loss_of(model, torch.zeros(options["batch"], 8, dtype=torch.long)).backward()
    torch.optim.AdamW(trained).step()


def _leave_the_file(model: nn.Module) -> None:
    copies: dict[int, Tensor] = {}
    for t in (*model.parameters(), *model.buffers()):
        key = t.data_ptr()
        copies.setdefault(key, t.detach().clone())
        t.data = copies[key].view_as(t)


def memory(folder: Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Computed sizes, and resident memory of loading and of training steps."""
    ids = torch.load(folder / "tokens.pt")["train"][: options["batch"]]
    _warm_libraries(folder, options)
    _settle()
    reset_high_water_mark()
    before = resident_bytes("VmRSS")
    model = load(folder, name)
    loader = resident_bytes("VmHWM") - before
    computed = sizes(model)
    _leave_the_file(model)
    trained = adapt(model, options)
    optimizer = torch.optim.AdamW(trained, lr=options["learning_rate"])
    _settle()
    loaded = resident_bytes("VmRSS") - before
    reset_high_water_mark()
    for _ in range(2):
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        **computed,
        # A and B, their gradients and two moments, fp32
        "adapter_bytes": 4 * sum(p.nbytes for p in trained),
        "loader_peak_bytes": loader, "loaded_bytes": loaded,
        "step_peak_bytes": resident_bytes("VmHWM") - before,
    }  # fmt: skip


def main(argv: list[str]) -> int:
    folder, name, what, options = argv
    measure = {"curve": curve, "memory": memory}[what]
    print(json.dumps(measure(Path(folder), name, json.loads(options))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
