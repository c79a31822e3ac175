"""One library product for frozen layer and adapter: W, A and B in one padded buffer.

For modules that own the producer of X. One or more layers of one input share a buffer

    G = [[ W_1   B_1   0   ]      [N_1 + N_2 + P, K + P],  P >= r_1 + r_2, so that a row of
         [ W_2   0     B_2 ]      G and of X is a whole number of 16 bytes
         [ A_1             ]
         [ A_2        0    ]
         [ 0               ]]

and X is written by its producer into rows of K + P elements whose last P are free:

    forward    tail(X) = s X A^T            one product of X with the rows of A
               Y       = [X | S] G_top^T    one product over K + P: Y is written once
    backward   [dX | dS] = dY G_top         one product: dS costs no pass over dY
               dX     += s dS A             dX is read and written once more
               dA      = s dS^T X,  dB = dY^T S

Launches for a group of G layers: forward 2, backward 4 + G (a group one more, to copy dA apart),
against 1 + 2 G and 2 + 3 G of the library path without the buffer. Passes saved against that path:
two over Y in the forward, one over every dY in the backward.

When it pays: the producer (a norm, an activation, attention) writes X into these rows itself, K
and N are small enough that a pass counts (a pass over [M, d] is 263 / N of the forward product on
a device of 790 TFLOP/s and 3 TB/s), and the copy of W is affordable or W can move into the buffer
(:meth:`PaddedBlock.adopt`). It does not pay when X has to be copied into the rows first: that is
the two passes it saves. It is no layout for sharded, tied or quantized weights.

Memory: (sum N + P) (K + P) elements beside W, or only P (K + P + sum N) once W is adopted.
Rounding: Y once, from one accumulator; dX twice. S and dS are rounded to the dtype of X.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.errors import InvalidArgumentError

_ROW_BYTES = 16


def padding(in_features: int, total_rank: int, dtype: torch.dtype) -> int:
    """Columns beside X: the ranks, and what makes a row a whole number of 16 bytes."""
    step = max(1, _ROW_BYTES // dtype.itemsize)
    return -(-(in_features + total_rank) // step) * step - in_features


class PaddedBlock:
    """The buffer G of one layer or of a group that shares X.

    Args:
        weights: per layer ``[N_g, K]``, frozen, one dtype and device.
        lora_as, lora_bs: ``[r_g, K]`` and ``[N_g, r_g]``, any floating dtype.

    Attributes:
        buffer: G. `weights`, `lora_as`, `lora_bs`: strided views of it.
        padding: columns that X needs beside its own; `ranks`, `in_features`, `out_features`; `top`:
            rows of G above A, the sum of out_features.

    The sources are copied in when the block is made, and again by :meth:`refresh` (which every
    call of :func:`padded_lora_linear` does) when storage, address or version counter of one of
    them has changed. A write around the version counter (``.data``) is not noticed: call
    :meth:`invalidate` after one.

    Raises:
        InvalidArgumentError: shapes, dtypes or devices that do not fit each other.
    """

    def __init__(
        self, weights: Sequence[Tensor], lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor]
    ) -> None:
        _check_sources(weights, lora_as, lora_bs)
        first = weights[0]
        self.in_features = first.shape[1]
        self.out_features = tuple(w.shape[0] for w in weights)
        self.ranks = tuple(a.shape[0] for a in lora_as)
        total = sum(self.ranks)
        self.padding = padding(self.in_features, total, first.dtype)
        self.top = sum(self.out_features)
        width = self.in_features + self.padding
        self.buffer = torch.zeros(
            self.top + self.padding, width, dtype=first.dtype, device=first.device
        )
        k = self.in_features
        rows = self.buffer[: self.top].split(self.out_features)
        self.weights = [part[:, :k] for part in rows]
        starts = [sum(self.ranks[:g]) for g in range(len(self.ranks))]
        self.lora_as = [
            self.buffer[self.top + c : self.top + c + r, :k]
            for c, r in zip(starts, self.ranks, strict=True)
        ]
        self.lora_bs = [
            part[:, k + c : k + c + r] for part, c, r in zip(rows, starts, self.ranks, strict=True)
        ]
        self._seen: dict[int, tuple[object, ...]] = {}
        self.refresh(weights, lora_as, lora_bs)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer: what the block costs while the plain weights are kept too."""
        return self.buffer.numel() * self.buffer.element_size()

    def empty_rows(self, *lead: int) -> Tensor:
        """Uninitialised ``[*lead, K + padding]`` for a producer to write X into ``[..., :K]``."""
        return self.buffer.new_empty(*lead, self.in_features + self.padding)

    def pad(self, x: Tensor) -> Tensor:
        """X ``[..., K]`` copied into such rows, differentiably: a pass that the buffer was meant
        to save, for producers that cannot write into it."""
        return F.pad(x, (0, self.padding))

    def invalidate(self) -> None:
        """Copy every source again at the next :meth:`refresh`."""
        self._seen.clear()

    def adopt(self, weights: Sequence[torch.nn.Parameter]) -> None:
        """Let these parameters live in the buffer: their plain copies are freed.

        They become strided views, ``[N, K]`` with rows of K + padding; whoever saves or shards
        them has to take that.
        """
        if len(weights) != len(self.weights) or any(
            w.shape != v.shape or w.dtype != v.dtype or w.device != v.device
            for w, v in zip(weights, self.weights, strict=True)
        ):
            raise InvalidArgumentError("weights are not those of the block; accepted: the same")
        for parameter, view in zip(weights, self.weights, strict=True):
            view.copy_(parameter.detach())
            parameter.data = view

    @torch.no_grad()
    def refresh(
        self, weights: Sequence[Tensor], lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor]
    ) -> int:
        """Copy in what has changed; the number of copies made.

        While a CUDA graph is captured A and B are copied always: a replay cannot look.
        """
        capturing = self.buffer.is_cuda and torch.cuda.is_current_stream_capturing()
        pairs = [
            *zip(weights, self.weights, strict=True),
            *zip([*lora_as, *lora_bs], [*self.lora_as, *self.lora_bs], strict=True),
        ]
        copies = 0
        for number, (source, view) in enumerate(pairs):
            if source.shape != view.shape or source.device != view.device:
                raise InvalidArgumentError(
                    f"a source is {list(source.shape)} on {source.device}; "
                    f"accepted: {list(view.shape)} on {view.device}, as the block was made"
                )
            if source.data_ptr() == view.data_ptr() and source.stride() == view.stride():
                continue
            state = (source.data_ptr(), source.stride(), source.dtype, source._version)
            replayed = capturing and number >= len(self.weights)
            if self._seen.get(number) != state or replayed:
                view.copy_(source.detach())
                self._seen[number] = state
                copies += 1
        return copies


def _check_sources(
    weights: Sequence[Tensor], lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor]
) -> None:
    if not len(weights) == len(lora_as) == len(lora_bs) > 0:
        raise InvalidArgumentError(
            f"weights={len(weights)}, lora_as={len(lora_as)}, lora_bs={len(lora_bs)}; accepted: "
            "one of each per layer, at least one"
        )
    first = weights[0]
    for g, (w, a, b) in enumerate(zip(weights, lora_as, lora_bs, strict=True)):
        if w.dtype != first.dtype or {w.device, a.device, b.device} != {first.device}:
            raise InvalidArgumentError(
                f"weight[{g}] is {w.dtype}, its operands are on {w.device}, {a.device} and "
                f"{b.device}; accepted: {first.dtype} on {first.device} for all"
            )
        k = first.shape[-1]
        if not (w.dim() == a.dim() == b.dim() == 2) or w.shape[1] != k or a.shape[1] != k:
            raise InvalidArgumentError(
                f"weight[{g}] is {list(w.shape)}, lora_a[{g}] is {list(a.shape)}; "
                f"accepted: [out_features, {k}] and [r, {k}]"
            )
        if b.shape != (w.shape[0], a.shape[0]):
            raise InvalidArgumentError(
                f"lora_b[{g}] is {list(b.shape)}; accepted: [{w.shape[0]}, {a.shape[0]}]"
            )
