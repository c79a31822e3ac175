"""nn.Embedding with a low-rank adapter, as PEFT has it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.modules.adapted_layer import (
    AdaptedLayer,
    adapter_dtype_for,
    check_adapter,
    product,
)


class LoRAEmbedding(AdaptedLayer, nn.Embedding):
    """``E[i] + scaling * B A[:, i]`` with E frozen.

    A drop-in for :class:`torch.nn.Embedding`; the adapter adds the parameters

        lora_embedding_A    [r, num_embeddings]    zeros, so a new adapter changes nothing
        lora_embedding_B    [embedding_dim, r]     normal

    Args:
        num_embeddings, embedding_dim, padding_idx, scale_grad_by_freq, device, dtype: as in
            torch.nn.Embedding. The row of padding_idx gets no gradient, in A too.
        r, alpha, rslora, adapter_dtype: as in :class:`lora_kernels.LoRALinear`. There is no dropout
            on the adapter's path, as the input is an index (PEFT ignores it likewise).

    Shapes: integers ``[...]`` to ``[..., embedding_dim]`` in the dtype of weight.

    Raises:
        InvalidArgumentError: an argument that cannot be used.

    Source: the Embedding layer of PEFT's LoRA; Hu et al. 2021, arXiv 2106.09685.
    """

    lora_embedding_A: nn.Parameter
    lora_embedding_B: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        r: int = 16,
        alpha: float = 32,
        rslora: bool = False,
        scale_grad_by_freq: bool = False,
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_adapter(r, alpha, 0.0, adapter_dtype)
        nn.Embedding.__init__(
            self, num_embeddings, embedding_dim, padding_idx,
            scale_grad_by_freq=scale_grad_by_freq, device=device, dtype=dtype,
        )  # fmt: skip
        self._create_adapter(r, alpha, rslora, adapter_dtype)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        r: int = 16,
        alpha: float = 32,
        rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> LoRAEmbedding:
        """On the very weight of `embedding`, which is frozen, not copied.

        Raises:
            InvalidArgumentError: `embedding` renormalises its rows (max_norm) or has sparse
                gradients, or an argument is out of range.
        """
        reason = embedding_obstacle(embedding)
        if reason:
            raise InvalidArgumentError(f"embedding cannot become a LoRAEmbedding: {reason}")
        check_adapter(r, alpha, 0.0, adapter_dtype)
        weight = embedding.weight
        layer = cls.__new__(cls)
        nn.Embedding.__init__(
            layer, embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx,
            scale_grad_by_freq=embedding.scale_grad_by_freq, device="meta", dtype=weight.dtype,
        )  # fmt: skip
        layer.weight = weight
        layer._create_adapter(r, alpha, rslora, adapter_dtype)
        return layer.train(embedding.training)

    def _create_adapter(
        self, r: int, alpha: float, rslora: bool, adapter_dtype: torch.dtype | None
    ) -> None:
        self._begin_adapter(r, alpha, 0.0, rslora)
        weight = self.weight
        dtype = adapter_dtype_for(weight, adapter_dtype)
        n, d = weight.shape
        self.lora_embedding_A = nn.Parameter(weight.new_empty(r, n, dtype=dtype))
        self.lora_embedding_B = nn.Parameter(weight.new_empty(d, r, dtype=dtype))
        self.reset_adapter()

    @torch.no_grad()
    def reset_adapter(self) -> None:
        nn.init.zeros_(self.lora_embedding_A)
        nn.init.normal_(self.lora_embedding_B)

    def factors(self) -> dict[str, nn.Parameter]:
        return {
            "lora_embedding_A": self.lora_embedding_A,
            "lora_embedding_B": self.lora_embedding_B,
        }

    def updates(self) -> dict[str, Tensor]:
        update = product(self.lora_embedding_B, self.lora_embedding_A, self.scaling).t()
        return {"weight": update}

    def forward(self, input: Tensor) -> Tensor:
        plain = nn.Embedding.forward(self, input)
        if self._runs_plain():
            return plain
        chosen = F.embedding(
            input, self.lora_embedding_A.t(), self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
        )  # fmt: skip
        update = chosen @ self.lora_embedding_B.t() * self.scaling
        return (plain + update).to(plain.dtype)

    def extra_repr(self) -> str:
        return f"{nn.Embedding.extra_repr(self)}, {self._adapter_repr()}"


def embedding_obstacle(embedding: nn.Module) -> str:
    """Why `embedding` cannot carry an adapter; empty when it can."""
    if type(embedding) is not nn.Embedding:
        kind = f"{type(embedding).__module__}.{type(embedding).__qualname__}"
        return f"its type is {kind}; accepted: exactly torch.nn.Embedding"
    if embedding.max_norm is not None:
        return "max_norm changes its weight in the forward"
    if embedding.sparse:
        return "its gradients are sparse"
    return ""
