"""A small ViT with random weights: learns shapes, then LoRA teaches it the same in negative.

lk.replace_modules makes the adapter; PEFT is not needed.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

import lora_kernels as lk

SIZE, SHAPES = 32, ("disc", "square", "bar", "cross")


def pictures(count: int, seed: int, negative: bool) -> tuple[Tensor, Tensor]:
    """Images [count, 1, 32, 32] with noise, and the numbers of their shapes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, len(SHAPES), (count,), generator=generator)
    centre = torch.randint(10, 22, (2, count, 1, 1), generator=generator)
    radius = torch.randint(4, 9, (count, 1, 1), generator=generator)
    places = torch.arange(SIZE)
    y, x = (places[:, None] - centre[0]).abs(), (places[None, :] - centre[1]).abs()
    inside = torch.maximum(x, y) <= radius
    drawn = torch.stack([
        x**2 + y**2 <= radius**2, inside, (y <= 2) & (x <= radius),
        ((x <= 1) | (y <= 1)) & inside,
    ])  # fmt: skip
    image = drawn[labels, torch.arange(count)].float()
    image = (1 - image if negative else image) + 0.2 * torch.randn(image.shape, generator=generator)
    return image[:, None], labels


@torch.no_grad()
def accuracy(model: ViTForImageClassification, negative: bool) -> float:
    images, labels = pictures(256, 999, negative)
    return (model(images).logits.argmax(-1) == labels).float().mean().item()


def train(model: ViTForImageClassification, steps: int, rate: float, negative: bool) -> None:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate)
    for step in range(steps):
        images, labels = pictures(32, step, negative)
        model(images, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrain-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=SIZE, patch_size=8, num_channels=1, hidden_size=64, num_hidden_layers=3,
            num_attention_heads=4, intermediate_size=128, num_labels=len(SHAPES),
            initializer_range=0.1,
        )
    )  # fmt: skip
    train(model, options.pretrain_steps, 1e-3, negative=False)
    known, before = accuracy(model, negative=False), accuracy(model, negative=True)
    whole = copy.deepcopy(model)
    train(whole, options.steps, 1e-3, negative=True)
    report = lk.replace_modules(model, r=8, alpha=16, exclude=["classifier"])
    train(model, options.steps, 3e-3, negative=True)
    after = accuracy(model, negative=True)
    lk.merge(model)
    print(f"{len(report.fused)} layers adapted, {known:.3f} on the images learnt first")
    print(f"all weights tuned instead: {accuracy(whole, negative=True):.3f} on negatives")
    print(f"accuracy on negatives {before:.3f} -> {after:.3f}; merged {accuracy(model, True):.3f}")


if __name__ == "__main__":
    main()
