"""A new token of a SmolLM2-135M-shaped Llama with an unmerged adapter, against the frozen model.

    python -m benchmarks.smollm2_generate [--dtype bf16] [--batch 1] [--prompt 64] [--new 32]
        [--rank 16] [--rounds 8] [--json OUT]

Greedy ``generate`` with a cache, models of one seed taking turns: the frozen base alone, stock PEFT
with all linears adapted, the same through ``lk.apply``, and that with
``attn_implementation="lora_kernels"``. A round generates ``--new`` tokens and the time is that of
the whole call, the prompt included, divided by them. The weights are random. Before any time is
taken, the logits of a prompt and of steps over its cache are held to an fp64 oracle.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_kernels as lk
from benchmarks import machine, record
from benchmarks.options import DTYPES, model_parser
from benchmarks.smollm2_step import LAYERS, SHAPE
from benchmarks.timing import measure
from lora_kernels.testing import BudgetExceededError, assert_within_budget
from lora_kernels.testing.attention import FACTOR

PROVIDERS = ("frozen", "peft", "lora_kernels", "lora_kernels, attention")


def build(provider: str, rank: int, layers: int, dtype: torch.dtype) -> Any:
    """The same random weights at every call; B is not zero, adapters in the dtype of the model."""
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=True, **SHAPE)
    model: nn.Module = LlamaForCausalLM(config)
    if provider != "frozen":
        lora = LoraConfig(
            r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights=False
        )
        model = get_peft_model(model, lora)
    model.requires_grad_(False).eval().to(dtype)
    if provider.startswith("lora_kernels"):
        lk.apply(model)
    if provider.endswith("attention"):
        model.set_attn_implementation(lk.register_attention())
    return model


def prompts(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(SHAPE["vocab_size"], (batch, length), generator=generator)


@torch.inference_mode()
def logits(model: Any, tokens: Tensor, steps: int = 4) -> Tensor:
    """Of the tokens: all but the last `steps` as a prompt, these one by one over its cache."""
    made = model(input_ids=tokens[:, :-steps], use_cache=True)
    parts, cache = [made.logits], made.past_key_values
    for column in range(tokens.shape[1] - steps, tokens.shape[1]):
        made = model(
            input_ids=tokens[:, column : column + 1], past_key_values=cache, use_cache=True
        )
        parts.append(made.logits)
    return torch.cat(parts, dim=1)


def check(options: argparse.Namespace) -> float:
    """Worst share of the error budget over the logits of two-layer models."""
    tokens, dtype = prompts(2, 24), DTYPES[options.dtype]
    oracle = logits(build("peft", options.rank, 2, torch.float64), tokens)
    plain = logits(build("peft", options.rank, 2, dtype), tokens)
    shares = []
    for provider in PROVIDERS[2:]:
        ours = logits(build(provider, options.rank, 2, dtype), tokens)
        margin = assert_within_budget(ours, oracle, plain, provider, FACTOR)
        shares.append(max(margin.max_norm, margin.rms))
    return max(shares)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = model_parser(
        "smollm2_generate", batch=1, prompt=64, new=32, rank=16, rounds=8, layers=LAYERS
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    try:
        share = check(options)
    except BudgetExceededError as error:
        print(f"WRONG, not timed: {error}", file=sys.stderr)
        return 1
    print(f"correct: logits use at most {share:.2f} of the error budget")
    tokens = prompts(options.batch, options.prompt)

    def generation(provider: str) -> Any:
        model = build(provider, options.rank, options.layers, DTYPES[options.dtype])

        @torch.inference_mode()
        def call() -> None:
            model.generate(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), do_sample=False,
                max_new_tokens=options.new, min_new_tokens=options.new, pad_token_id=0,
            )  # fmt: skip

        return call

    timings = measure(
        {provider: generation(provider) for provider in PROVIDERS},
        "frozen",
        rounds=options.rounds,
        round_seconds=0.0,
        warm_up=1,
    )
    result: dict[str, Any] = {
        "schema": record.SCHEMA, "op": "smollm2_generate",
        **machine.describe("benchmarks.smollm2_generate", argv),
        "rank": options.rank, "rounds": options.rounds, "dtype": options.dtype,
        "batch": options.batch, "prompt": options.prompt, "new": options.new,
        "layers": options.layers, "share_of_error_budget": share,
        "rows": [
            {
                "provider": provider,
                "seconds": t.seconds.median / options.new,
                "iqr_seconds": [t.seconds.q1 / options.new, t.seconds.q3 / options.new],
                "ratio": t.ratio.median,
                "ratio_iqr": [t.ratio.q1, t.ratio.q3],
            }
            for provider, t in timings.items()
        ],
    }  # fmt: skip
    print(f"{'provider':26} {'ms/token':>9} {'IQR':>15} {'of frozen':>10}")
    for row in result["rows"]:
        low, high = (1e3 * s for s in row["iqr_seconds"])
        print(
            f"{row['provider']:26} {1e3 * row['seconds']:9.2f} {low:7.2f}-{high:<7.2f} "
            f"{row['ratio']:10.2f}"
        )
    record.keep(result, options.json, f"smollm2_generate-{options.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
