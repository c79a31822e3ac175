"""Tiny random models of the families that `apply` knows, with LoRA on every linear layer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import lora_kernels as lk

VOCABULARY = 61
_DECODER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCABULARY, "initializer_range": 0.2,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_ENCODER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": VOCABULARY, "initializer_range": 0.2, "pad_token_id": 0, "num_labels": 3,
}  # fmt: skip


def tokens(length: int = 11) -> Tensor:
    return torch.randint(3, VOCABULARY, (3, length), generator=torch.Generator().manual_seed(1))


def padding(side: str, length: int = 11) -> Tensor:
    """Rows of 11, 6 and 1 tokens."""
    mask = torch.zeros(3, length, dtype=torch.long)
    for row, n in enumerate((length, 6, 1)):
        mask[row, length - n if side == "left" else 0 : length if side == "left" else n] = 1
    return mask


def causal_inputs() -> dict[str, Tensor]:
    """Left padding. The first token of a row is no label: it would be predicted by a padding token,
    which sees nothing, where implementations are free to differ."""
    ids, mask = tokens(), padding("left")
    first = mask.diff(dim=1, prepend=torch.zeros(3, 1, dtype=torch.long)) == 1
    return {
        "input_ids": ids.masked_fill(mask == 0, 0),
        "attention_mask": mask,
        "labels": ids.masked_fill((mask == 0) | first, -100),
    }


def class_inputs() -> dict[str, Tensor]:
    mask = padding("right")
    ids = tokens().masked_fill(mask == 0, 0)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2, 1])}


def seq2seq_inputs() -> dict[str, Tensor]:
    mask = padding("right")
    ids = tokens().masked_fill(mask == 0, 0)
    return {"input_ids": ids, "attention_mask": mask, "labels": tokens(5)}


def image_inputs() -> dict[str, Tensor]:
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "labels": torch.tensor([0, 2, 1])}


def speech_inputs() -> dict[str, Tensor]:
    features = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(1))
    return {"input_features": features, "labels": tokens(5)[:2]}


@dataclass(frozen=True)
class Family:
    """`groups`: members of each group that has several, in the order of the report."""

    model: str
    config: str
    settings: dict[str, Any]
    inputs: Callable[[], dict[str, Tensor]]
    groups: list[int]
    lora: dict[str, Any] = field(default_factory=dict)

    def build(self, attention: str = "eager") -> nn.Module:
        torch.manual_seed(0)
        config = getattr(hf, self.config)(**self.settings)
        config._attn_implementation = attention
        config._experts_implementation = "eager"  # the others have no fp64
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(hf, self.model)(config).eval()

    def peft_model(self, dtype: torch.dtype, attention: str = "eager") -> PeftModel:
        settings = {
            "r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False,
        }  # fmt: skip
        model = self.build(attention).to(dtype)
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return get_peft_model(model, LoraConfig(**(settings | self.lora))).eval()


def _causal(
    name: str, *, config: str = "Config", lora: dict[str, Any] | None = None, **settings: Any
) -> Family:
    return Family(
        f"{name}ForCausalLM", name + config, _DECODER | settings, causal_inputs, [3, 2, 3, 2],
        lora or {},
    )  # fmt: skip


def _t5(gated: bool) -> Family:
    settings = {
        "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4,
        "vocab_size": VOCABULARY, "decoder_start_token_id": 0, "pad_token_id": 0,
        "feed_forward_proj": "gated-gelu" if gated else "gelu", "dropout_rate": 0.0,
    }  # fmt: skip
    groups = [3, 2, 3, 2, 2] if gated else [3, 3, 2]
    return Family("T5ForConditionalGeneration", "T5Config", settings, seq2seq_inputs, groups)


_WINDOWS = ["sliding_attention", "full_attention"]
FAMILIES = {
    "llama": _causal("Llama"),
    "mistral": _causal("Mistral", sliding_window=4),
    "qwen2": _causal("Qwen2", use_sliding_window=True, sliding_window=4, layer_types=_WINDOWS),
    "qwen3": _causal("Qwen3"),
    "gemma2": _causal(
        "Gemma2", sliding_window=4, layer_types=_WINDOWS, query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0, final_logit_softcapping=5.0,
    ),
    "gemma3": _causal(
        "Gemma3", config="TextConfig", sliding_window=4, layer_types=_WINDOWS,
        query_pre_attn_scalar=8,
    ),
    "smollm3": _causal("SmolLM3"),
    "phi3": Family("Phi3ForCausalLM", "Phi3Config", _DECODER, causal_inputs, []),
    "gpt2": Family(
        "GPT2LMHeadModel", "GPT2Config",
        {
            "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY,
            "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "n_positions": 64,
        },
        causal_inputs, [], {"fan_in_fan_out": True},
    ),
    "bert": Family(
        "BertForSequenceClassification", "BertConfig", _ENCODER, class_inputs, [3, 3]
    ),
    "roberta": Family(
        "RobertaForSequenceClassification", "RobertaConfig", _ENCODER, class_inputs, [3, 3]
    ),
    "t5": _t5(False),
    "t5_gated": _t5(True),
    "vit": Family(
        "ViTForImageClassification", "ViTConfig",
        {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 16, "patch_size": 8, "num_labels": 3,
            "initializer_range": 0.2,
        },
        image_inputs, [3, 3],
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration", "WhisperConfig",
        {
            "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
            "vocab_size": VOCABULARY, "num_mel_bins": 8, "max_source_positions": 12,
            "max_target_positions": 16, "init_std": 0.2, "decoder_start_token_id": 1,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        },
        speech_inputs, [3, 3, 2],
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM", "GptOssConfig",
        _DECODER | {
            "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4,
            "layer_types": _WINDOWS,
        },
        causal_inputs, [3, 3], {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    ),
}  # fmt: skip


def run(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits at the tokens that are there, and the gradient of every adapter."""
    model.zero_grad(set_to_none=True)
    dtype = next(p.dtype for n, p in model.named_parameters() if "lora" not in n)
    floats = {k: t.to(dtype) if t.is_floating_point() else t for k, t in inputs.items()}
    out = model(**floats)
    out.loss.backward()
    logits = out.logits.detach()
    if logits.dim() == 3 and "attention_mask" in inputs and logits.shape[1] == 11:
        logits = logits[inputs["attention_mask"].bool()]
    return {"logits": logits} | {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


class NothingInFloat32(TorchFunctionMode):
    """Models compute norms, rotary tables and softmax in fp32 whatever their dtype is; an oracle
    must not."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is Tensor.float:
            function = Tensor.double

        def wider(a: Any) -> Any:
            return torch.float64 if a is torch.float32 else a

        kwargs = {k: wider(a) for k, a in (kwargs or {}).items()}
        return function(*map(wider, args), **kwargs)


def oracle(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """:func:`run` of eager PEFT, wholly in fp64."""
    double = copy.deepcopy(model).double()
    with NothingInFloat32():
        return run(double, inputs)


def eager_logits(family: str, **inputs: Any) -> tuple[Tensor, Tensor]:
    """Of the family's model without LoRA: in fp64, and in fp32."""
    model = FAMILIES[family].build("eager")
    with torch.no_grad():
        low = model(**inputs).logits
        with NothingInFloat32():
            return model.double()(**inputs).logits, low


def use_our_attention(model: nn.Module) -> None:
    lk.register_attention()
    model.get_base_model().set_attn_implementation("lora_kernels")
