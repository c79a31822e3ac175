"""Small models and layers for the tests of lora_kernels.modules."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

import lora_kernels as lk


class Block(nn.Module):
    def __init__(self, width=24, hidden=40):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.norm(self.up(x))))


class Net(nn.Module):
    """Embedding, two blocks, head; no get_output_embeddings."""

    def __init__(self, width=24):
        super().__init__()
        self.inp = nn.Linear(16, width)
        self.layers = nn.ModuleList([Block(width), Block(width)])
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.inp(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


LINEARS = ["inp", "layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down", "head"]


def net_input(rows=7, dtype=torch.float32):
    return torch.randn(rows, 16).to(dtype)


@torch.no_grad()
def strengthen(model):
    """Give every adapter of `model` an effect as large as its base layer's."""
    for layer in model.modules():
        if not isinstance(layer, lk.LoRALinear):
            continue
        x = torch.randn(64, layer.in_features, dtype=torch.float64)
        layer.lora_B.normal_()
        base = F.linear(x, layer.weight.double())
        update = x @ layer.lora_A.double().t() @ layer.lora_B.double().t() * layer.scaling
        layer.lora_B.mul_(base.norm() / update.norm())
        if layer.lora_magnitude_vector is not None:
            layer.lora_magnitude_vector.mul_(torch.rand_like(layer.lora_magnitude_vector) + 0.5)
    return model


@torch.no_grad()
def fill_peft(model):
    """The same for a PEFT model: B as large as the base, other magnitudes."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.3)
        elif "magnitude" in name:
            parameter.mul_(torch.rand_like(parameter) + 0.5)
        elif "modules_to_save" in name:
            parameter.normal_()
    return model


def adapted_net(**options):
    """(plain net, the same net with strong adapters)."""
    base = Net()
    model = copy.deepcopy(base)
    lk.replace_modules(model, **{"r": 4, "alpha": 8, **options})
    return base, strengthen(model)


def bits(tensor):
    """A copy in which NaN equals itself."""
    return tensor.detach().clone().reshape(-1).view(torch.uint8)


def state(model):
    """Everything that an error must leave alone."""
    return (
        {name: id(m) for name, m in model.named_modules(remove_duplicate=False)},
        {n: (id(p), p.requires_grad, p._version) for n, p in model.named_parameters()},
        {name: bits(t) for name, t in model.state_dict().items()},
        [(m.alpha, m.rslora, m.merged) for m in model.modules() if isinstance(m, lk.LoRALinear)],
        [vars(m).get("saved_with_adapter") for m in model.modules()],
    )


def assert_unchanged(model, before):
    after = state(model)
    assert (after[0], after[1], after[3], after[4]) == (before[0], before[1], before[3], before[4])
    for name, tensor in before[2].items():
        assert torch.equal(after[2][name], tensor), name
