"""A small Whisper with random weights: writes down tones, then PEFT + lk.apply adapt it to noise.

The spectrograms are generated: each tone is a bright band, each token of the text one tone.
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration

import lora_kernels as lk

MELS, FRAMES, TONES, LENGTH = 16, 40, 8, 5
START, END = TONES, TONES + 1


def melodies(count: int, seed: int, noise: float) -> tuple[Tensor, Tensor]:
    """Spectrograms [count, 16, 40] and their texts [count, 6]: five tones and the end."""
    generator = torch.Generator().manual_seed(seed)
    tones = torch.randint(0, TONES, (count, LENGTH), generator=generator)
    bands = 2 * tones.repeat_interleave(FRAMES // LENGTH, dim=1)
    sound = torch.zeros(count, FRAMES, MELS).scatter_(2, bands[..., None], 1.0).transpose(1, 2)
    sound = sound + noise * torch.randn(sound.shape, generator=generator)
    return sound, torch.cat([tones, torch.full((count, 1), END)], dim=1)


@torch.no_grad()
def error_rate(model: torch.nn.Module, noise: float) -> float:
    """Share of tones that greedy decoding gets wrong."""
    sound, text = melodies(128, 999, noise)
    model.eval()
    written = torch.full((len(sound), 1), START)
    for _ in range(LENGTH):
        logits = model(input_features=sound, decoder_input_ids=written).logits
        written = torch.cat([written, logits[:, -1:].argmax(-1)], dim=1)
    model.train()
    return (written[:, 1:] != text[:, :-1]).float().mean().item()


def train(model: torch.nn.Module, steps: int, rate: float, noise: float) -> None:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate)
    for step in range(steps):
        sound, text = melodies(32, step, noise)
        model(input_features=sound, labels=text).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrain-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--noise", type=float, default=0.6)
    parser.add_argument("--stock", action="store_true", help="leave the adapter to PEFT")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=TONES + 2, num_mel_bins=MELS, d_model=64, encoder_layers=2,
            decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=128, decoder_ffn_dim=128, max_source_positions=FRAMES // 2,
            max_target_positions=16, pad_token_id=END, bos_token_id=START, eos_token_id=END,
            decoder_start_token_id=START,
        )
    )  # fmt: skip
    train(model, options.pretrain_steps, 1e-3, noise=0.0)
    clean, before = error_rate(model, 0.0), error_rate(model, options.noise)
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(model, adapter)
    report = None if options.stock else lk.apply(model)
    train(model, options.steps, 2e-3, options.noise)
    after = error_rate(model, options.noise)
    how = f"{len(report.fused)} of {len(report.layers)} layers fused" if report else "stock PEFT"
    print(f"{how}; without noise {clean:.3f} of the tones were wrong")
    print(f"share of wrong tones in noise {before:.3f} -> {after:.3f}")


if __name__ == "__main__":
    main()
