"""The calculation of memory against counted parameters and against what autograd really keeps."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.training.memory_estimate import (
    LLAMA_3_8B,
    LLAMA_3_70B,
    METHODS,
    DecoderShape,
    estimate_memory,
    table,
)

R, BATCH, LENGTH = 4, 2, 32


def test_parameters_of_the_named_models():
    # The published counts.
    assert LLAMA_3_8B.parameters == 8_030_261_248
    assert LLAMA_3_70B.parameters == 70_553_706_496


@pytest.fixture(scope="module")
def small():
    """(fused PEFT model in fp32, its shape)."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    import lora_kernels as lk

    config = transformers.LlamaConfig(
        vocab_size=160, hidden_size=64, intermediate_size=176, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        attn_implementation="sdpa", tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    plain = sum(p.numel() for p in model.parameters())
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=R, target_modules="all-linear")
    model = peft.get_peft_model(model, lora)
    lk.apply(model)
    return model, DecoderShape.from_config(config), plain


def test_counts_match_the_model(small):
    model, shape, plain = small
    assert shape.parameters == plain
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape.adapter_parameters(R) == trained


def kept_bytes(model, **options):
    """Bytes that autograd holds between forward and backward of one micro-batch."""
    tokens = torch.randint(0, 160, (BATCH, LENGTH))
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.model.model(tokens, use_cache=False) if options.get("body") else model(tokens)
    return sum(s.nbytes() for s in kept.values())


def test_activations_match_what_autograd_keeps(small):
    """Measured: storages saved for the backward in the blocks. The estimate is of the op's own
    keeping; the model's eager parts (norms, rotation) keep copies on top."""
    model, shape, _ = small
    body = kept_bytes(model, body=True)
    counted = estimate_memory(
        shape, "lora", batch=BATCH, length=LENGTH, r=R, weight_bytes=4
    ).activations
    assert counted <= body <= 1.3 * counted, (counted, body)


def test_state_matches_what_the_optimizer_allocates(small):
    model, shape, _ = small
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    model(torch.randint(0, 160, (1, 8))).logits.sum().backward()
    optimizer.step()
    found = estimate_memory(shape, "lora", batch=1, length=8, r=R, weight_bytes=4)
    gradients = sum(p.grad.nbytes for p in trained)
    moments = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.dim() > 0)
    assert found.gradients == gradients and found.optimizer == moments
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    assert found.weights == frozen and found.adapter == sum(p.nbytes for p in trained)
    model.zero_grad()


@pytest.mark.parametrize("method", METHODS)
def test_sharding_divides_what_it_says(method):
    one = estimate_memory(LLAMA_3_8B, method)
    ddp, zero2, fsdp2 = (
        estimate_memory(LLAMA_3_8B, method, processes=8, strategy=s)
        for s in ("ddp", "zero2", "fsdp2")
    )
    assert ddp == one
    assert zero2.weights == one.weights and zero2.optimizer * 8 == one.optimizer
    assert fsdp2.weights * 8 == one.weights and fsdp2.gradients * 8 == one.gradients
    assert fsdp2.activations == one.activations
    assert fsdp2.total < zero2.total < one.total


def test_known_orders_of_magnitude():
    full = estimate_memory(LLAMA_3_8B, "full", trained_bytes=4)
    # 16 bytes per parameter: weight, gradient and two moments in fp32.
    assert full.weights + full.gradients + full.optimizer == 16 * LLAMA_3_8B.parameters
    lora, qlora = (estimate_memory(LLAMA_3_8B, m) for m in ("lora", "qlora"))
    assert qlora.weights < 0.4 * lora.weights and lora.optimizer < 0.01 * full.optimizer
    assert lora.weights == 2 * LLAMA_3_8B.parameters
    light = estimate_memory(LLAMA_3_8B, "lora", checkpointing=True, fused_loss=True)
    assert light.activations < 0.15 * lora.activations and light.logits == 0.0
    assert estimate_memory(LLAMA_3_8B, "freeze", frozen_layers=32).optimizer == 0


def test_table_and_errors():
    text = table(LLAMA_3_8B, [("lora", {"method": "lora"})], 1, "ddp")
    assert text.count("\n") == 2 and "| lora | 15.0 |" in text
    for options, fragment in (
        ({"method": "magic"}, "method='magic'"),
        ({"strategy": "x"}, "strategy='x'"),
        ({"batch": 0}, "batch=0"),
        ({"method": "freeze", "frozen_layers": 99}, "frozen_layers=99"),
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            estimate_memory(LLAMA_3_8B, **options)
        assert fragment in str(caught.value)
    with pytest.raises(InvalidArgumentError, match="hidden_size"):
        DecoderShape.from_config({"d_model": 4})
