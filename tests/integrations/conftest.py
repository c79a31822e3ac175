from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("peft")

from peft_models import Calls

from lora_kernels.integrations.peft import fallback, linear, mlp_blocks
from lora_kernels.modules import layer_group


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls, op = Calls(), linear.lora_linear

    def counted(*args: object, **kwargs: object) -> torch.Tensor:
        calls.count += 1
        return op(*args, **kwargs)

    grouped = layer_group.grouped_lora_linear

    def counted_group(*args: object, **kwargs: object) -> list[torch.Tensor]:
        ys = grouped(*args, **kwargs)
        calls.count += len(ys)
        return ys

    dora = linear.dora_linear

    def counted_dora(*args: object, **kwargs: object) -> torch.Tensor:
        calls.count += 1
        return dora(*args, **kwargs)

    whole = mlp_blocks.fused_mlp

    def counted_mlp(x: torch.Tensor, first: list[object], *args: object) -> torch.Tensor | None:
        before = calls.count
        calls.count += len(first) + 1  # now: a checkpoint ends its second run inside the call
        y = whole(x, first, *args)
        if y is None:
            calls.count = before
        return y

    monkeypatch.setattr(mlp_blocks, "fused_mlp", counted_mlp)
    monkeypatch.setattr(linear, "lora_linear", counted)
    monkeypatch.setattr(linear, "dora_linear", counted_dora)
    monkeypatch.setattr(layer_group, "grouped_lora_linear", counted_group)
    return calls


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each MLP of a fused block that was called, whether it was one node."""
    found: list[bool] = []
    whole = mlp_blocks._as_one

    def recorded(*args: object) -> torch.Tensor | None:
        y = whole(*args)
        found.append(y is not None)
        return y

    monkeypatch.setattr(mlp_blocks, "_as_one", recorded)
    return found


@pytest.fixture(autouse=True)
def fresh_warnings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Warnings are given once per process; each test starts anew, in the default environment."""
    monkeypatch.setattr(fallback, "_warned", set())
    for name in ("STRICT", "DISABLE", "BACKEND"):
        monkeypatch.delenv(f"LORA_KERNELS_{name}", raising=False)
    torch.manual_seed(0)
    yield
