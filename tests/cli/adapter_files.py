"""A tiny language model with a tokenizer, and an adapter for it, as folders."""

from __future__ import annotations

from pathlib import Path

WORDS = [f"w{i}" for i in range(40)] + ["the", "cat", "sat", "on", "mat", "<s>", "</s>", "<unk>"]
CHAT = (
    "{% for m in messages %}the {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}cat {% endif %}"
)


def write_language_model(folder: Path) -> Path:
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(str(folder))
    torch.manual_seed(1)
    shape = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=24, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=6, max_position_embeddings=32,
        initializer_range=0.5, bos_token_id=45, eos_token_id=46, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(str(folder))
    return folder


def write_adapter_for(
    base: Path, folder: Path, targets: str | list[str] = "all-linear", seed: int = 2
) -> Path:
    """B is not zero, so the adapter changes what the model says."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(base))
    torch.manual_seed(seed)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=targets)
    model = peft.get_peft_model(model, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(folder))
    return folder
