"""How many bytes a fine-tuning needs on each GPU, by counting; nothing is loaded or run.

Counted: the weights, the gradients of what trains, AdamW's two moments, and the activations that a
decoder of the Llama kind keeps for the backward. Not counted: the allocator's fragmentation, the
framework (about 0.5 GiB per process on a GPU), buffers of collectives (up to two layers of weights
with FSDP), and workspaces of library products. Plan with a fifth on top.

Activations per layer and token, in elements of the compute dtype, H hidden, Q = heads x head_dim,
K = key heads x head_dim, F feed-forward, with a fused attention that keeps its output and one fp32
statistic per head:

    inputs of the two norms            2 H
    input of q/k/v, rotated q k, v     H + Q + 2 K
    attention output, input of o       Q
    input of gate/up                   H
    gate, up, product                  3 F
    S of each adapted layer            r each
    DoRA: output before its scaling    the outputs of the seven linear layers
    log-sum-exp                        2 heads (fp32)

With checkpointing only the input of each layer (H) stays, plus one layer's activations while it is
recomputed. The loss adds the logits of one micro-batch, in the compute dtype and in fp32 with their
gradient, unless the head is fused with the loss. The way of counting is that of Korthikanti et al.,
"Reducing Activation Recomputation in Large Transformer Models", 2022 (arXiv 2205.05198).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lora_kernels.errors import InvalidArgumentError

METHODS = ("lora", "qlora", "dora", "freeze", "full", "bitfit")
STRATEGIES = ("ddp", "zero2", "fsdp2")
# Bytes of a weight: 4 bits, and an absmax of 8 bits per 64 (double quantization; the second level's
# fp32 per 256 blocks is below a thousandth).
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class DecoderShape:
    """A decoder of the Llama kind; `head_dim` 0 means hidden / heads."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    feed_forward: int
    vocabulary: int
    head_dim: int = 0
    tied: bool = False

    @property
    def width(self) -> int:
        return self.head_dim or self.hidden // self.heads

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of q, k, v, o, gate, up, down."""
        h, f, q, k = self.hidden, self.feed_forward, self.heads * self.width, (
            self.key_heads * self.width
        )  # fmt: skip
        return ((h, q), (h, k), (h, k), (q, h), (h, f), (h, f), (f, h))

    @property
    def linear_parameters(self) -> int:
        """Of the seven linear layers of every block."""
        return self.layers * sum(i * o for i, o in self.linears)

    @property
    def parameters(self) -> int:
        norms = self.hidden * (2 * self.layers + 1)
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.linear_parameters + norms + embeddings

    def adapter_parameters(self, r: int) -> int:
        """A and B on all seven linear layers of every block."""
        return self.layers * r * sum(i + o for i, o in self.linears)

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | Any) -> DecoderShape:
        """From a transformers configuration (or its dictionary) of the Llama kind.

        Raises:
            InvalidArgumentError: a key is missing, so the model is of another kind.
        """

        def get(key: str) -> Any:
            return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)

        keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                "vocab_size")  # fmt: skip
        missing = [key for key in keys if not get(key)]
        if missing:
            raise InvalidArgumentError(
                f"the configuration has no {missing[0]}; accepted: decoders of the Llama kind"
            )
        hidden, layers, heads, feed_forward, vocabulary = (int(get(key) or 0) for key in keys)
        return cls(
            hidden, layers, heads, int(get("num_key_value_heads") or heads), feed_forward,
            vocabulary, int(get("head_dim") or 0), bool(get("tie_word_embeddings")),
        )  # fmt: skip


LLAMA_3_8B = DecoderShape(4096, 32, 32, 8, 14336, 128256)
LLAMA_3_70B = DecoderShape(8192, 80, 64, 8, 28672, 128256)


@dataclass(frozen=True)
class Estimate:
    """Bytes on one GPU."""

    weights: float
    adapter: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    def gib(self) -> dict[str, float]:
        found = {name: value / 2**30 for name, value in vars(self).items()}
        return found | {"total": self.total / 2**30}


def estimate_memory(
    shape: DecoderShape,
    method: str = "lora",
    *,
    batch: int = 1,
    length: int = 2048,
    r: int = 16,
    processes: int = 1,
    strategy: str = "ddp",
    checkpointing: bool = False,
    weight_bytes: int = 2,
    trained_bytes: int = 4,
    frozen_layers: int | None = None,
    fused_loss: bool = False,
) -> Estimate:
    """Bytes on each of `processes` GPUs.

    Args:
        method: ``lora`` and ``dora`` on all linear layers of the blocks, ``qlora`` the same with
            these weights in NF4 (double quantization), ``freeze`` (the last layers train),
            ``full``, ``bitfit`` (counted as one vector per linear layer).
        batch, length: rows and tokens per row of one micro-batch on one GPU.
        r: rank.
        strategy: ``ddp`` copies everything; ``zero2`` shards optimizer and gradients; ``fsdp2``
            (and ZeRO-3) shards weights, too.
        checkpointing: recompute activations in the backward.
        weight_bytes: of a frozen weight and an activation: 2 for bf16, 4 for fp32.
        trained_bytes: of a trained parameter, its gradient and each moment.
        frozen_layers: for ``freeze``, how many blocks stay frozen; all but two when None.
        fused_loss: head and loss in one op that keeps no logits.

    Raises:
        InvalidArgumentError: an unknown name, or a number below 1.
    """
    if method not in METHODS:
        raise InvalidArgumentError(f"method={method!r}; accepted: {', '.join(METHODS)}")
    if strategy not in STRATEGIES:
        raise InvalidArgumentError(f"strategy={strategy!r}; accepted: {', '.join(STRATEGIES)}")
    numbers = {"batch": batch, "length": length, "r": r, "processes": processes}
    for name, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise InvalidArgumentError(f"{name}={value!r}; accepted: an integer >= 1")
    adapters = method in ("lora", "qlora", "dora")
    outputs = shape.layers * sum(o for _, o in shape.linears)
    trained = {
        "full": shape.parameters,
        "bitfit": outputs,
        "freeze": _trained_by_freezing(shape, frozen_layers),
    }.get(method, shape.adapter_parameters(r) + (outputs if method == "dora" else 0))
    base = float(shape.parameters * weight_bytes)
    if method == "qlora":
        base -= shape.linear_parameters * (weight_bytes - _NF4)
    elif method in ("full", "freeze"):
        base += trained * (trained_bytes - weight_bytes)  # trained in place, in their own dtype
    own = trained * trained_bytes if adapters or method == "bitfit" else 0
    shards_weights = processes if strategy == "fsdp2" else 1
    shards_state = processes if strategy != "ddp" else 1
    tokens = batch * length
    logits = 0.0 if fused_loss else tokens * shape.vocabulary * (weight_bytes + 4.0 + 4.0)
    return Estimate(
        weights=base / shards_weights,
        adapter=own / shards_weights,
        gradients=trained * trained_bytes / shards_state,
        optimizer=2.0 * trained * trained_bytes / shards_state,
        activations=_activations(
            shape, tokens, r if adapters else 0, method == "dora", checkpointing, weight_bytes
        ),
        logits=logits,
    )


def _trained_by_freezing(shape: DecoderShape, frozen_layers: int | None) -> int:
    open_layers = 2 if frozen_layers is None else shape.layers - frozen_layers
    if not 0 <= open_layers <= shape.layers:
        raise InvalidArgumentError(
            f"frozen_layers={frozen_layers!r}; accepted: 0 to {shape.layers}"
        )
    one = replace(shape, layers=open_layers)
    return one.linear_parameters + 2 * open_layers * shape.hidden


def _activations(
    shape: DecoderShape, tokens: int, r: int, dora: bool, checkpointing: bool, bytes_: int
) -> float:
    h, f = shape.hidden, shape.feed_forward
    q, k = shape.heads * shape.width, shape.key_heads * shape.width
    kept = 4 * h + 2 * q + 2 * k + 3 * f + 7 * r + dora * sum(o for _, o in shape.linears)
    of_layer = tokens * (bytes_ * kept + 2 * 4 * shape.heads)
    if checkpointing:
        return float(shape.layers * tokens * h * bytes_ + of_layer)
    return float(shape.layers * of_layer)


def table(
    shape: DecoderShape, rows: list[tuple[str, dict[str, Any]]], processes: int, strategy: str
) -> str:
    """A markdown table in GiB per GPU; `rows` are (label, keywords of :func:`estimate_memory`)."""
    names = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "total")
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for label, options in rows:
        found = estimate_memory(shape, processes=processes, strategy=strategy, **options).gib()
        cells = " | ".join(f"{found[name]:.1f}" for name in names)
        lines.append(f"| {label} | {cells} |")
    return "\n".join(lines)
