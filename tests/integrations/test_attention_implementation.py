"""attn_implementation="lora_kernels": arguments, padding, windows, packing, caches, generation."""

from __future__ import annotations

import pytest
import torch
import transformers
from families import FAMILIES, NothingInFloat32, eager_logits, padding, tokens
from torch import Tensor, nn
from transformers import StaticCache

import lora_kernels as lk
from lora_kernels.errors import InvalidArgumentError
from lora_kernels.integrations.transformers.attention import attention_forward
from lora_kernels.testing import assert_within_budget

DECODERS = ("llama", "mistral", "qwen2", "gemma2", "gemma3", "gpt2", "gpt_oss")


@pytest.fixture(autouse=True)
def _registered() -> None:
    assert lk.register_attention() == "lora_kernels"


class Layer(nn.Module):
    is_causal = True


def heads(length: int = 6, keys: int | None = None, batch: int = 2) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    shapes = ((batch, 4, length, 8), *((batch, 2, keys or length, 8),) * 2)
    return tuple(torch.randn(s, generator=g) for s in shapes)


def test_the_name_is_known_to_models():
    model = FAMILIES["llama"].build("lora_kernels")
    assert model.config._attn_implementation == "lora_kernels"
    with pytest.raises(ValueError, match="lora_kernel_"):
        model.set_attn_implementation("lora_kernel_")


@pytest.mark.parametrize(
    "others",
    [
        {"output_attentions": True},
        {"cache": object()},
        {"head_mask": torch.ones(4)},
        {"an_argument_of_tomorrow": 1.0},
    ],
    ids=lambda o: next(iter(o)),
)
def test_what_is_not_honoured_raises(others):
    with pytest.raises(InvalidArgumentError, match=next(iter(others))) as caught:
        attention_forward(Layer(), *heads(), None, **others)
    assert "\n" not in str(caught.value)


def test_arguments_without_a_meaning_pass():
    q, k, v = heads()
    want = attention_forward(Layer(), q, k, v, None)[0]
    out, weights = attention_forward(
        Layer(), q, k, v, None, position_ids=torch.arange(6)[None], num_items_in_batch=3,
        output_attentions=False, head_mask=None, use_cache=True,
    )  # fmt: skip
    assert torch.equal(out, want) and weights is None
    assert out.shape == (2, 6, 4, 8) and out.is_contiguous()


def test_causality_comes_from_module_argument_or_mask():
    q, k, v = heads()
    causal = attention_forward(Layer(), q, k, v, None)[0]
    full = attention_forward(Layer(), q, k, v, None, is_causal=False)[0]
    assert not torch.allclose(causal, full)
    seen = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    assert torch.equal(attention_forward(Layer(), q, k, v, seen)[0], full)
    triangle = seen.tril()
    assert_within_budget(attention_forward(Layer(), q, k, v, triangle)[0], causal.double(), causal)
    last = attention_forward(Layer(), q[:, :, -1:], k, v, None)[0]
    assert_within_budget(last, causal[:, -1:].double(), causal[:, -1:])


def test_a_window_without_a_mask():
    q, k, v = heads()
    at = torch.arange(6)
    mask = ((at[:, None] >= at) & (at[:, None] - at < 3))[None, None]
    want = attention_forward(Layer(), q, k, v, mask)[0]
    got = attention_forward(Layer(), q, k, v, None, sliding_window=3)[0]
    assert_within_budget(got, want.double(), want)


@pytest.mark.parametrize("form", ["none", "bool", "float"])
def test_position_bias_and_its_gradient(form):
    q, k, v = heads()
    seen = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    additive = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
    mask = {"none": None, "bool": seen, "float": additive}[form]
    bias = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(2))

    def run(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        b = bias.to(dtype).requires_grad_()
        args = [t.to(dtype) for t in (q, k, v)]
        keys, values = (t.repeat_interleave(2, 1) for t in args[1:])
        scores = args[0] @ keys.transpose(2, 3) * 8**-0.5 + b
        scores = scores if form == "none" else scores.masked_fill(~seen, float("-inf"))
        out = (scores.softmax(-1) @ values).transpose(1, 2)
        return out.detach(), torch.autograd.grad(out.square().sum(), b)[0]

    b = bias.clone().requires_grad_()
    mask = mask.float() if form == "float" else mask
    out = attention_forward(Layer(), q, k, v, mask, is_causal=False, position_bias=b)[0]
    grad = torch.autograd.grad(out.square().sum(), b)[0]
    both = (run(torch.float64), run(torch.float32))
    for mine, exact, low in zip((out.detach(), grad), *both, strict=True):
        assert_within_budget(mine, exact, low, factor=3.0)


@pytest.mark.parametrize("window", [None, 3])
def test_packed_sequences(window):
    """Through cu_seqlens, through a mask beside them, and each sequence by itself."""
    q, k, v = heads(9, batch=1)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    parts = [
        attention_forward(Layer(), *(t[:, :, a:b] for t in (q, k, v)), None, sliding_window=window)[
            0
        ]
        for a, b in ((0, 4), (4, 9))
    ]
    want = torch.cat(parts, 1)
    options = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 5, "max_length_k": 5}
    got = attention_forward(Layer(), q, k, v, None, sliding_window=window, **options)[0]
    assert_within_budget(got, want.double(), want)
    at = torch.arange(9)
    mask = at[:, None] >= at if window is None else (at[:, None] >= at) & (at[:, None] - at < 3)
    for form in (mask, torch.zeros(9, 9).masked_fill(~mask, float("-inf"))):
        got = attention_forward(Layer(), q, k, v, form[None, None], **options)[0]
        assert_within_budget(got, want.double(), want)
    with pytest.raises(InvalidArgumentError, match="batch of 2"):
        attention_forward(Layer(), *heads(9), None, cu_seq_lens_q=cu)


@pytest.mark.parametrize("family", DECODERS)
def test_left_padding_changes_nothing(family):
    """A row's logits are those of the row alone."""
    model = FAMILIES[family].build("lora_kernels")
    mask, ids = padding("left"), tokens()
    with torch.no_grad():
        batch = model(
            input_ids=ids.masked_fill(mask == 0, 0), attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        ).logits  # fmt: skip
    for row in range(3):
        n = int(mask[row].sum())
        exact, low = eager_logits(family, input_ids=ids[row : row + 1, -n:])
        assert_within_budget(batch[row, -n:], exact[0], low[0])


@pytest.mark.parametrize("family", DECODERS)
def test_decoding_with_a_cache_equals_prefill(family):
    model, ids = FAMILIES[family].build("lora_kernels"), tokens()
    exact, low = eager_logits(family, input_ids=ids)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        cache, steps = None, []
        for a, b in ((0, 5), (5, 8), *((i, i + 1) for i in range(8, 11))):
            out = model(input_ids=ids[:, a:b], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    assert_within_budget(whole, exact, low)
    assert_within_budget(torch.cat(steps, 1), exact, low)


@pytest.mark.parametrize("family", [*DECODERS, "t5", "whisper"])
def test_greedy_tokens(family):
    inputs = FAMILIES[family].inputs()
    inputs.pop("labels")
    found = []
    for attention in ("eager", "lora_kernels"):
        model = FAMILIES[family].build(attention)
        model.generation_config.eos_token_id = None
        found.append(model.generate(**inputs, max_new_tokens=6, do_sample=False))
    assert torch.equal(*found)


def test_generation_steps_read_the_cache_in_place(monkeypatch):
    from lora_kernels.integrations.transformers import attention as implementation

    calls = []
    decode = implementation.attention_decode

    def counted(q, *rest, **options):
        calls.append(q.shape[1])
        return decode(q, *rest, **options)

    monkeypatch.setattr(implementation, "attention_decode", counted)
    model, ids = FAMILIES["llama"].build("lora_kernels"), tokens()
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(ids)
    model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert calls == [1] * 3 * model.config.num_hidden_layers  # the first token is the prompt's
    mask[0, :2] = 0
    model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert len(calls) == 3 * model.config.num_hidden_layers  # padding needs the mask


def test_static_cache():
    model = FAMILIES["llama"].build("lora_kernels")
    ids = tokens()
    exact, low = eager_logits("llama", input_ids=ids)
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=16)
        first = model(input_ids=ids[:, :7], past_key_values=cache).logits
        rest = model(
            input_ids=ids[:, 7:], past_key_values=cache,
            position_ids=torch.arange(7, 11)[None].expand(3, -1),
        ).logits  # fmt: skip
    assert_within_budget(torch.cat([first, rest], 1), exact, low)


def test_attention_dropout_is_replayed_by_checkpointing():
    model = FAMILIES["llama"].build("lora_kernels").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    ids, grads = tokens(), []
    for _ in range(2):
        torch.manual_seed(3)
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
        model.activation_checkpointing_enable()
    assert torch.equal(*grads)


def test_compiled():
    torch.compiler.reset()
    model = FAMILIES["llama"].build("lora_kernels")
    ids = tokens()
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
        graph = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(graph(input_ids=ids, use_cache=False).logits, want)


_CODER = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 61,
    "max_position_embeddings": 64, "init_std": 0.2, "pad_token_id": 0, "dropout": 0.0,
    "activation_dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("stem", ["PegasusX", "BigBirdPegasus", "NllbMoe"])
def test_models_without_sdpa_that_count_on_their_mask(stem):
    """The decoder's attention is causal by its mask alone; BigBird's encoder adds it by itself."""
    name = f"{stem}ForConditionalGeneration"
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, f"{stem}Config")(**_CODER)).eval()
    model.set_attn_implementation("eager")
    inputs = {"input_ids": tokens(), "attention_mask": padding("right"), "labels": tokens(5)}
    with torch.no_grad():
        low = model(**inputs).logits
        model.set_attn_implementation("lora_kernels")
        got = model(**inputs).logits
        model.set_attn_implementation("eager")
        with NothingInFloat32():
            exact = model.double()(**inputs).logits
    assert_within_budget(got, exact, low)


def test_a_causal_model_that_adds_its_mask():
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 61,
        "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.2,
        "pad_token_id": 0,
    }  # fmt: skip
    vision = sizes | {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = transformers.GitForCausalLM(
        transformers.GitConfig(vision_config=vision, **sizes)
    ).eval()
    mask = padding("left")
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    with torch.no_grad():
        model.set_attn_implementation("eager")
        want = model(**inputs).logits[mask.bool()]
        model.set_attn_implementation("lora_kernels")
        assert torch.equal(model(**inputs).logits[mask.bool()], want)  # its text layers are its own


@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
def test_chosen_keys(mask):
    """Sparse attention hands over which keys a query may see."""
    q, k, v = heads()
    indices = torch.tensor([[0], [0], [2], [1], [3], [5]]).expand(2, 6, 1).contiguous()
    padded = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    padded[0, :, :, 0] = False
    given = {"none": None, "bool": padded, "additive": torch.zeros(padded.shape)}[mask]
    if mask == "additive":
        given = given.masked_fill(~padded, float("-inf"))
    out, _ = attention_forward(Layer(), q, k, v, given, indices=indices)
    want = v.repeat_interleave(2, 1)[:, :, indices[0, :, 0]].transpose(1, 2).clone()
    if mask != "none":
        want[0, :2] = 0.0  # their only key is padding
    assert_within_budget(out, want.double(), want)


def test_a_sparse_model():
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "vocab_size": 61,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "initializer_range": 0.2, "max_position_embeddings": 64, "pad_token_id": 0,
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_group": 1, "topk_group": 1, "index_n_heads": 4, "index_head_dim": 16, "index_topk": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.DeepseekV32ForCausalLM(transformers.DeepseekV32Config(**sizes)).eval()
    model.set_attn_implementation("eager")
    mask = padding("left")
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    with torch.no_grad():
        low = model(**inputs).logits[mask.bool()]
        model.set_attn_implementation("lora_kernels")
        got = model(**inputs).logits[mask.bool()]
        model.set_attn_implementation("eager")
        with NothingInFloat32():
            exact = model.double()(**inputs).logits[mask.bool()]
    assert_within_budget(got, exact, low)
