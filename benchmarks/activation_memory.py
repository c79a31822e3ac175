"""Bytes that one forward keeps for its backward, counted: PEFT against lora_kernels.

    python -m benchmarks.activation_memory [--dtype bf16] [--batch 4] [--sequence 256]
        [--rank 16] [--dropout 0.1] [--layers 2] [--json OUT]

A SmolLM2-shaped Llama of some layers, all linears adapted. After the forward the graph is walked
and every distinct storage that a node saved is counted once, parameters aside; nothing is timed and
nothing is sampled, so the figures are exact and the same on every machine. Tensors that a recipe
stands for (recomputed activations, checkpoints) do not exist then and do not count. The figure
per layer is the difference of two models, so embedding and head are left out; peaks inside a
backward are not counted: with checkpointing, one layer at a time has the bytes of the row without.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_kernels as lk
from benchmarks import machine, record
from benchmarks.options import DTYPES, model_parser
from benchmarks.smollm2_step import SHAPE
from lora_kernels.modules.layer_group import group_of

PROVIDERS: dict[str, dict[str, Any]] = {
    "PEFT": {},
    "lora_kernels": {"apply": {}},
    "lora_kernels, each layer by itself": {"apply": {}, "apart": True},
    "lora_kernels, recompute_activations": {"apply": {"recompute_activations": True}},
    "PEFT, checkpointing": {"checkpoint": True},
    "lora_kernels, checkpointing": {"apply": {}, "checkpoint": True},
}


def build(options: argparse.Namespace, layers: int, provider: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=layers, use_cache=False, **SHAPE)
    model = LlamaForCausalLM(config).to(DTYPES[options.dtype])
    lora = LoraConfig(r=options.rank, lora_dropout=options.dropout, target_modules="all-linear")
    made = get_peft_model(model, lora).train()
    made.enable_input_require_grads()
    if "apply" in provider:
        lk.apply(made, **provider["apply"])
    if provider.get("apart"):
        for module in made.modules():
            group = group_of(module)
            if group is not None:
                group.detach()
    if provider.get("checkpoint"):
        made.activation_checkpointing_enable({"use_reentrant": True})
    return made


def _nodes(root: Any) -> Iterator[Any]:
    seen, todo = set(), [root]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
        yield node


def _saved(node: Any) -> Iterator[Tensor]:
    """The tensors behind a node, recipes of any hook passed over."""
    for name in dir(node):
        if not name.startswith("_raw_saved_"):
            continue
        found = getattr(node, name)
        for saved in found if isinstance(found, (list, tuple)) else [found]:
            tensor = None if saved is None else saved.data
            if isinstance(tensor, Tensor):
                yield tensor


def saved_bytes(output: Tensor, model: nn.Module) -> int:
    """Of distinct storages in the graph of `output`, without parameters and buffers."""
    own = [*model.parameters(), *model.buffers()]
    storages = {t.untyped_storage().data_ptr() for t in own}
    total = 0
    for node in _nodes(output.grad_fn):
        for t in _saved(node):
            storage = t.untyped_storage()
            if storage.data_ptr() not in storages:
                storages.add(storage.data_ptr())
                total += storage.nbytes()
    return total


def per_layer(options: argparse.Namespace, provider: dict[str, Any]) -> float:
    """Bytes that a layer more costs."""
    found = []
    for layers in (1, 1 + options.layers):
        model = build(options, layers, provider)
        g = torch.Generator().manual_seed(1)
        shape = (options.batch, options.sequence)
        tokens = torch.randint(SHAPE["vocab_size"], shape, generator=g)
        hidden = model.get_base_model().model(input_ids=tokens).last_hidden_state
        found.append(saved_bytes(hidden, model))
    return (found[1] - found[0]) / options.layers


def parse(argv: list[str]) -> argparse.Namespace:
    parser = model_parser("activation_memory", batch=4, sequence=256, rank=16, layers=1)
    parser.add_argument("--dropout", type=float, default=0.1)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    rows = []
    for name, provider in PROVIDERS.items():
        n = per_layer(options, provider)
        rows.append({"provider": name, "bytes_per_layer": n})
        share = n / rows[0]["bytes_per_layer"]
        print(f"{name:38} {n / 2**20:8.2f} MiB per layer  {share:5.2f} of PEFT")
    result: dict[str, Any] = {
        "schema": record.SCHEMA, "op": "activation_memory",
        **machine.describe("benchmarks.activation_memory", argv),
        "dtype": options.dtype, "batch": options.batch, "sequence": options.sequence,
        "rank": options.rank, "dropout": options.dropout, "rows": rows,
    }  # fmt: skip
    record.keep(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
