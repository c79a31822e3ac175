"""An MLP inside of a larger forward: one call where nothing looks between, else the layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.modules.blocks import Mlp
from lora_kernels.modules.deferred_mlp import run_around

PLAIN = Mlp("up", "", "down", "act", inside=True)
GATED = Mlp("gate", "up", "down", "act", inside=True)
PACKED = Mlp("gate", "", "down", "act", packed=True, inside=True)


class Block(nn.Module):
    """`between` is what happens to the result of `steps` that the MLP is made of."""

    def __init__(self, mlp: Mlp, between=lambda block, h: h) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 10 if mlp.packed else 5)
        self.up, self.down, self.act = nn.Linear(6, 5), nn.Linear(5, 6), nn.SiLU()
        self.mlp, self.between, self.calls = mlp, between, 0

    def hidden(self, x: Tensor) -> Tensor:
        if self.mlp is PLAIN:
            return self.act(self.up(x))
        if self.mlp is PACKED:
            gate, up = self.gate(x).chunk(2, dim=-1)
            return up * self.act(gate)
        return self.act(self.gate(x)) * self.up(x)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.calls += 1
        return x + scale * self.down(self.between(self, self.hidden(x)))


def both(block: Block, x: Tensor, fits=lambda x: True, **kwargs: float) -> tuple[bool, Tensor]:
    """(whether one call computed the MLP, the result); equal bits to the block by itself."""
    whole_calls = []

    def whole(x: Tensor) -> Tensor:
        whole_calls.append(x)
        return block.down(block.hidden(x))

    torch.manual_seed(3)
    want = block(x, **kwargs)
    torch.manual_seed(3)
    got = run_around(Block.forward, block, block.mlp, fits, whole, (x,), kwargs)
    assert type(got) is type(want) and torch.equal(got, want)
    assert block.calls == 2  # attributes are the block's own
    return bool(whole_calls), got


@pytest.mark.parametrize("mlp", [PLAIN, GATED, PACKED], ids=["plain", "gated", "packed"])
def test_one_call(mlp: Mlp) -> None:
    x = torch.randn(3, 6)
    assert both(Block(mlp), x, scale=0.5)[0]
    assert not both(Block(mlp), x, fits=lambda x: False)[0]


def off(block: Block, h: Tensor) -> Tensor:
    h = F.dropout(h, p=0.5, training=False)
    return F.dropout(h, p=0.0, training=True)


@pytest.mark.parametrize("mlp", [PLAIN, GATED, PACKED], ids=["plain", "gated", "packed"])
def test_dropout_that_drops_nothing(mlp: Mlp) -> None:
    assert both(Block(mlp, off), torch.randn(3, 6))[0]
    assert both(Block(mlp, lambda b, h: nn.Dropout(0.5).eval()(h)), torch.randn(3, 6))[0]

    def cast(block: Block, h: Tensor) -> Tensor:
        wanted = block.down.weight.dtype
        return h if h.dtype == wanted else h.to(wanted)

    assert both(Block(mlp, cast), torch.randn(3, 6))[0]


BETWEEN = {
    "dropout": lambda b, h: F.dropout(h, p=0.5),
    "method": lambda b, h: h.clamp(-0.1, 0.1),
    "function": lambda b, h: torch.clamp(h, max=0.1),
    "library": lambda b, h: torch._C._nn.gelu(h),
    "operator": lambda b, h: 2.0 * h - h / 3.0 + (h > 0),
    "twice": lambda b, h: h * h,
    "from the right": lambda b, h: torch.ones(3, 5) * h,
    "attribute": lambda b, h: h if h.shape == (3, 5) else None,
    "index": lambda b, h: h[torch.tensor([2, 1, 0])],
    "stack": lambda b, h: torch.stack([h, h]).sum(0),
    "in place": lambda b, h: h.mul_(0.5),
    "augmented": lambda b, h: _augmented(h),
    "norm": lambda b, h: F.layer_norm(h, (5,)),
    "activation again": lambda b, h: b.act(h),
    "copy": lambda b, h: h.clone(),
    "unpack": lambda b, h: torch.stack(list(h)),
}


def _augmented(h: Tensor) -> Tensor:
    h *= 0.5
    h += 1.0
    return h


@pytest.mark.parametrize("between", BETWEEN)
def test_anything_between_is_done_with_the_tensor(between: str) -> None:
    for mlp in (PLAIN, GATED, PACKED):
        assert not both(Block(mlp, BETWEEN[between]), torch.randn(3, 6))[0]


def test_gradients_and_hooks() -> None:
    block, x = Block(GATED, BETWEEN["method"]), torch.randn(3, 6, requires_grad=True)
    seen: list[str] = []
    block.act.register_forward_hook(lambda *_: seen.append("act"))
    want = torch.autograd.grad(block(x).sum(), [x, *block.parameters()])
    y = run_around(Block.forward, block, GATED, lambda x: True, lambda x: x, (x,), {})
    got = torch.autograd.grad(y.sum(), [x, *block.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert seen == ["act", "act"]


class Inner(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.dense, self.act, self.norm = nn.Linear(*sizes), nn.GELU(), nn.LayerNorm(6)

    def forward(self, h: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.act(self.dense(h)) if residual is None else self.norm(self.dense(h) + residual)


class Outer(nn.Module):
    """Layers on paths, an early result beside the last one, and a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.intermediate, self.output = Inner(6, 5), Inner(5, 6)

    def forward(self, x: Tensor, early: bool) -> tuple[Tensor, ...]:
        h = self.intermediate(x)
        assert self.intermediate.dense.weight.shape == (5, 6)
        y = self.chunk(h, x)
        return (y, h) if early else (y,)

    def chunk(self, h: Tensor, x: Tensor) -> Tensor:
        return self.output(h, x)


@pytest.mark.parametrize("early", [False, True])
def test_paths_and_results_that_leave_the_block(early: bool) -> None:
    block, x, calls = Outer(), torch.randn(2, 4, 6), []
    mlp = Mlp("intermediate.dense", "", "output.dense", "intermediate.act", inside=True)

    def whole(x: Tensor) -> Tensor:
        calls.append(1)
        return block.output.dense(block.intermediate(x))

    got = run_around(Outer.forward, block, mlp, lambda x: True, whole, (x, early), {})
    want = block(x, early)
    assert len(calls) == 1 and len(got) == len(want)
    assert all(type(t) is Tensor and torch.equal(t, w) for t, w in zip(got, want, strict=True))


def test_inputs_that_are_not_one_tensor() -> None:
    """gate and up of different inputs, and an input changed in place before the last layer."""

    class Two(Block):
        def hidden(self, x: Tensor) -> Tensor:
            return self.act(self.gate(x)) * self.up(x + 1.0)

    block, x = Two(GATED), torch.randn(3, 6)
    got = run_around(Block.forward, block, GATED, lambda x: True, lambda x: x, (x,), {})
    assert torch.equal(got, block(x))

    def changed(block: Block, h: Tensor) -> Tensor:
        x.add_(1.0)
        return h

    with torch.no_grad(), pytest.raises(RuntimeError, match="changed in place"):
        both(Block(GATED, changed), x)
