"""A tiny random model of any architecture that transformers has, from the names of its settings.

A setting of a name that is known here gets a small value, whatever the architecture; rates of
dropout get 0; nested configurations are treated alike. What cannot be built that way raises
:class:`NotBuiltError` with the reason.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 61
PARAMETERS_AT_MOST = 3_000_000
_MAPPINGS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "classes": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "audio": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
}
ARCHITECTURES = [
    f"{kind}-{name}" for kind, at in _MAPPINGS.items() for name in getattr(modeling_auto, at)
]

_VALUES: list[tuple[Any, str]] = [
    (32, "hidden_size d_model n_embd dim embed_dim hidden_dim model_dim n_embed embedding_size "
         "word_embed_proj_dim projection_dim lru_width attention_hidden_size final_dim d_embed "
         "true_hidden_size intra_bottleneck_size emb_dim"),
    (2, "num_hidden_layers n_layer n_layers num_layers num_key_value_heads num_kv_heads "
        "num_experts_per_tok moe_topk moe_k moe_top_k type_vocab_size linear_num_key_heads "
        "num_global_key_value_heads mamba_expand num_feedforward_networks"),
    (1, "encoder_layers decoder_layers num_encoder_layers num_decoder_layers topk_group n_group "
        "n_shared_experts moe_num_shared_experts num_shared_experts first_k_dense_replace "
        "mamba_n_groups n_groups bos_token_id max_window_layers decoder_start_token_id"),
    (4, "num_attention_heads n_head n_heads num_heads encoder_attention_heads index_topk "
        "decoder_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts "
        "sliding_window attention_window rotary_dim mamba_d_conv time_step_rank num_buckets "
        "linear_num_value_heads laurel_rank mem_len index_n_heads"),
    (8, "head_dim d_kv q_lora_rank kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim "
        "state_size mamba_d_state mamba_n_heads mamba_d_head mamba_chunk_size mamba_num_heads "
        "mamba_head_dim chunk_size ssm_state_size linear_key_head_dim linear_value_head_dim "
        "patch_size num_mel_bins hidden_size_per_layer_input relative_attention_num_buckets "
        "d_head head_dim_global global_head_dim"),
    (16, "qk_head_dim image_size max_target_positions bottleneck_size index_head_dim"),
    (48, "intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size n_inner "
         "intermediate_size_mlp d_inner"),
    (24, "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size"),
    (64, "max_position_embeddings n_positions max_seq_len max_seq_length seq_length"),
    (VOCABULARY, "vocab_size vocab_size_per_layer_input n_token"),
    (0.2, "initializer_range init_std initializer_std"),
    (0, "pad_token_id num_kv_shared_layers"),
    (3, "num_labels num_channels kernel_size"),
    (12, "max_source_positions"),
    ([16, 16], "embed_dims"), ([16, 32, 32, 32], "hidden_sizes"), ([1, 1, 1, 1], "depths"),
]  # fmt: skip
_SIZES: dict[str, Any] = {name: value for value, names in _VALUES for name in names.split()}
_SIZES["eos_token_id"] = 2
_STAY_NONE = {
    "sliding_window", "rotary_dim", "q_lora_rank", "n_shared_experts", "n_inner", "n_group",
    "topk_group",
}  # fmt: skip
# Tried in turn until one of them runs.
ALTERNATIVES: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {
        "attn_layer_indices": [1], "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "num_hidden_layers": 2,
        "layer_types": ["mamba", "attention"], "layers_block_type": ["mamba", "attention"],
    },
    {"block_types": ["recurrent", "attention"]},
    {"decoder_start_token_id": 0, "image_size": 32},
)  # fmt: skip


class NotBuiltError(Exception):
    """No tiny model of this architecture; why."""


def _names(cls: Any) -> set[str]:
    found: set[str] = set()
    for c in cls.__mro__:
        found |= {*getattr(c, "__dataclass_fields__", {}), *inspect.get_annotations(c)}
    return found


def _is_rate(name: str, value: Any) -> bool:
    marks = ("dropout", "drop_rate", "layerdrop", "pdrop")
    return isinstance(value, float) and any(mark in name for mark in marks)


def _settings(cls: Any) -> dict[str, Any]:
    names, settings = _names(cls), {}
    try:
        default = cls()
    except Exception:  # of any kind: the library's, or a package that is not there
        default = None
    for name in names:
        was, value = getattr(default, name, None), _SIZES.get(name)
        if _is_rate(name, was):
            settings[name] = 0.0
        elif name in ("layer_types", "mlp_layer_types") and isinstance(was, (list, tuple)):
            kinds = list(dict.fromkeys(was))
            settings[name] = (kinds * 2)[: max(2, min(len(kinds), 4))]
            settings["num_hidden_layers"] = len(settings[name])
        elif value is None or (default is not None and was is None and name in _STAY_NONE):
            continue
        elif isinstance(was, (list, tuple)) == isinstance(value, list):
            settings.setdefault(name, value[: len(was)] if isinstance(value, list) else value)
    for name in set(getattr(cls, "sub_configs", {}) or {}) & names:
        part = type(getattr(default, name, None))
        if issubclass(part, hf.PretrainedConfig):
            settings[name] = tiny_config(part).to_dict()
    return settings


def tiny_config(cls: Any, **others: Any) -> Any:
    """Settings that the class refuses are left at what they are."""
    known = _names(cls)
    settings = _settings(cls) | {k: v for k, v in others.items() if k in known}
    while True:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return cls(**settings)
        except Exception as error:
            named = [name for name in settings if name in str(error)]
            if not named:
                raise NotBuiltError(f"{type(error).__name__}: {error}") from None
            del settings[named[0]]


def build(architecture: str, **others: Any) -> nn.Module:
    """The model with eager attention, in eval mode, the same in each call.

    Raises:
        NotBuiltError: it needs a package that is not there, is too large, or refuses the settings.
    """
    kind, _, name = architecture.partition("-")
    try:
        config = tiny_config(CONFIG_MAPPING[name], **others)
        if kind == "seq2seq" and getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = 1
        cls = getattr(modeling_auto, _MAPPINGS[kind])[name]
        cls = getattr(hf, cls[0] if isinstance(cls, tuple) else cls)
        with torch.device("meta"):
            size = sum(p.numel() for p in cls._from_config(config).parameters())
        if size > PARAMETERS_AT_MOST:
            raise NotBuiltError(f"{size} parameters")
        torch.manual_seed(0)
        config._experts_implementation = "eager"  # the others have no fp64
        model: nn.Module = cls._from_config(config, attn_implementation="eager").eval()
    except NotBuiltError:
        raise
    except Exception as error:
        raise NotBuiltError(f"{type(error).__name__}: {error}") from None
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point() and p.numel() and not bool((p.abs() < 1e3).all()):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)  # left uninitialized
    return model


def inputs(architecture: str, model: Any, padded: str = "right") -> dict[str, Tensor]:
    """Two samples; `padded`: the side on which the second is shorter, or neither."""
    kind, main = architecture.partition("-")[0], model.main_input_name
    g = torch.Generator().manual_seed(1)
    few = torch.randint(3, VOCABULARY, (2, 5), generator=g)
    if kind == "image":
        size = getattr(model.config, "image_size", 16)
        size = size if isinstance(size, int) else size[0]
        return {main: torch.randn(2, getattr(model.config, "num_channels", 3), size, size)}
    if main == "input_values":
        return {main: torch.randn(2, 2000, generator=g)}
    if main == "input_features":
        labels = {} if kind == "audio" else {"labels": few}
        return {main: torch.randn(2, 8, 24, generator=g), **labels}
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 1 if padded != "right" else 0
    mask[1, :3] = 1 if padded != "left" else 0
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=g).masked_fill(mask == 0, 0)
    labels = {"seq2seq": few, "classes": torch.tensor([0, 1])}.get(kind)
    if labels is None:
        # The first token is no label: padding would predict it, which sees nothing.
        first = mask.diff(dim=1, prepend=torch.zeros(2, 1, dtype=torch.long)) == 1
        labels = ids.masked_fill((mask == 0) | first, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
