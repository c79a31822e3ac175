"""The loss of causal language models without logits, against the stock loss."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import lora_kernels as lk  # noqa: E402
from lora_kernels.integrations.transformers.causal_lm_loss import (  # noqa: E402
    fuse_loss,
    unfuse_loss,
)
from lora_kernels.integrations.transformers.deferred_logits import DeferredLogits  # noqa: E402
from lora_kernels.testing import assert_within_budget  # noqa: E402

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def config(kind: str):
    c = transformers
    return {
        "llama": lambda: c.LlamaConfig(**SMALL),
        "tied": lambda: c.LlamaConfig(**SMALL, tie_word_embeddings=True),
        "mistral": lambda: c.MistralConfig(**SMALL),
        "qwen3": lambda: c.Qwen3Config(**SMALL, head_dim=8),
        "gemma2": lambda: c.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0),
        "granite": lambda: c.GraniteConfig(**SMALL, logits_scaling=3.0),
        "gpt2": lambda: c.GPT2Config(
            vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0,
            attn_pdrop=0.0, embd_pdrop=0.0,
        ),
        "phi": lambda: c.PhiConfig(**{**SMALL, "num_key_value_heads": 4}),  # the head has a bias
    }[kind]()  # fmt: skip


def build(kind: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(kind))
    for p in model.parameters():  # logits far from uniform
        torch.nn.init.normal_(p, std=0.2)
    return model.to(dtype)


def batch(**kwargs):
    torch.manual_seed(1)
    ids = torch.randint(0, 97, (2, 13))
    labels = ids.clone()
    labels[0, :5] = -100
    return {"input_ids": ids, "labels": labels, **kwargs}


def gradients(model, **kwargs):
    model.zero_grad()
    out = model(**batch(**kwargs))
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out, {"loss": out.loss.detach(), **grads}


def oracle(model, num_items_in_batch=None, shift_labels=None):
    """Loss and gradients in fp64; transformers itself computes the loss in fp32."""
    model = copy.deepcopy(model).double()
    given = batch()
    logits = model(input_ids=given["input_ids"]).logits
    labels = shift_labels
    if labels is None:
        labels = F.pad(given["labels"], (0, 1), value=-100)[:, 1:]
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=reduction)
    loss = loss / (1 if num_items_in_batch is None else num_items_in_batch)
    if loss.requires_grad:
        loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


KINDS = ["llama", "tied", "mistral", "qwen3", "gemma2", "granite", "gpt2", "phi"]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients(kind):
    model = build(kind)
    exact = oracle(model)
    _, stock = gradients(model)
    (entry,) = fuse_loss(model)
    assert entry.status == "fused", entry.reason
    out, fused = gradients(model)
    assert isinstance(out.logits, DeferredLogits)
    assert set(fused) == set(stock)
    for name, t in fused.items():
        assert_within_budget(t, exact[name], stock[name], name)
    assert unfuse_loss(model) == 1
    again = gradients(model)
    assert not isinstance(again[0].logits, DeferredLogits)
    assert all(torch.equal(t, stock[n]) for n, t in again[1].items())


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite"])
def test_logits_are_exact_when_read(kind):
    model = build(kind).eval()
    want = model(**batch()).logits
    fuse_loss(model)
    got = model(**batch()).logits
    assert isinstance(got, DeferredLogits) and got.shape == want.shape and got.dtype == want.dtype
    budget = want.double()
    assert_within_budget(got.logits(), budget, want)
    assert torch.equal(got.argmax(-1), want.argmax(-1))
    assert torch.equal(got[:, -1], got.logits()[:, -1])
    assert torch.equal(torch.softmax(got, -1), torch.softmax(got.logits(), -1))
    assert torch.equal(pickle.loads(pickle.dumps(got.detach())), got.logits())
    assert torch.equal(copy.deepcopy(got.detach()), got.logits())
    got.sum().backward()
    assert model.get_output_embeddings().weight.grad is not None


def test_a_call_without_labels_makes_logits():
    model = build("llama").eval()
    want = model(input_ids=batch()["input_ids"]).logits
    fuse_loss(model)
    got = model(input_ids=batch()["input_ids"]).logits
    assert not isinstance(got, DeferredLogits) and torch.equal(got, want)
    ids = batch()["input_ids"]
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    unfuse_loss(model)
    assert torch.equal(
        tokens, model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    )


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_items_in_batch": 11},
        {"num_items_in_batch": torch.tensor(11)},
        {"shift_labels": torch.randint(0, 97, (2, 13))},
    ],
    ids=["count", "count_tensor", "shift_labels"],
)
def test_arguments_of_the_loss(kwargs):
    model = build("llama")
    exact = oracle(model, **kwargs)
    _, stock = gradients(model, **kwargs)
    fuse_loss(model)
    _, fused = gradients(model, **kwargs)
    for name, t in fused.items():
        assert_within_budget(t, exact[name], stock[name], name)


def lora(model, **kwargs):
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"], **kwargs)
    )
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    return wrapped


def test_an_adapter_on_the_head():
    model = lora(build("llama"))
    exact = oracle(model)
    _, stock = gradients(model)
    (entry,) = fuse_loss(model)
    assert entry.status == "fused", entry.reason
    out, fused = gradients(model)
    assert isinstance(out.logits, DeferredLogits)
    assert any("lm_head" in n and "lora_B" in n for n in fused)
    for name, t in fused.items():
        assert_within_budget(t, exact[name], stock[name], name)
    with model.disable_adapter():
        plain = model(**batch()).loss
    unfuse_loss(model)
    with model.disable_adapter():
        assert_within_budget(plain, oracle(model)["loss"], model(**batch()).loss)


@pytest.mark.parametrize("kwargs", [{"lora_dropout": 0.5}, {"use_dora": True}])
def test_what_the_op_cannot_do_goes_through_the_logits(kwargs):
    model = lora(build("llama"), **kwargs)
    fuse_loss(model)
    torch.manual_seed(2)
    out = model(**batch())
    assert not isinstance(out.logits, DeferredLogits)
    unfuse_loss(model)
    torch.manual_seed(2)
    assert torch.equal(out.loss, model(**batch()).loss)


def test_bf16_autocast_and_checkpointing():
    model = build("llama")
    model.gradient_checkpointing_enable()
    exact = oracle(model)
    fuse_loss(model)
    with torch.autocast("cpu", torch.bfloat16):
        _, fused = gradients(model)
    unfuse_loss(model)
    with torch.autocast("cpu", torch.bfloat16):
        _, stock = gradients(model)
    for name, t in fused.items():
        assert_within_budget(t, exact[name], stock[name].bfloat16(), name)


def test_reasons_to_stay_stock():
    model = build("llama")
    model.loss_function = lambda **kwargs: torch.zeros(())
    (entry,) = fuse_loss(model)
    assert (entry.status, entry.reason) == ("stock", "the model has a loss function of its own")
    model = build("llama")
    model.get_output_embeddings().register_forward_hook(lambda *a: None)
    (entry,) = fuse_loss(model)
    assert entry.status == "stock" and "hooks" in entry.reason
    assert fuse_loss(torch.nn.Linear(2, 2)) == []


def test_an_exception_in_the_call_leaves_no_trace():
    model = build("llama")
    fuse_loss(model)
    with pytest.raises(Exception, match=""):
        model(input_ids=torch.full((1, 3), 10_000), labels=torch.zeros(1, 3, dtype=torch.int64))
    assert not isinstance(model(input_ids=batch()["input_ids"]).logits, DeferredLogits)


def test_copies_and_pickles_compute_the_same():
    model = build("llama")
    fuse_loss(model)
    loss = model(**batch()).loss
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**batch()).loss, loss)
        assert other.lm_head.forward.args[0] is other.lm_head
    assert list(model.state_dict()) == list(build("llama").state_dict())


def test_apply_takes_the_loss_on_request():
    model = lora(build("llama"))
    loss = "linear_cross_entropy"
    assert not [g for g in lk.apply(model).groups if g["kind"] == loss]
    assert not isinstance(model(**batch()).logits, DeferredLogits)
    with lk.applied(model, fused_loss=True) as report:
        (group,) = [g for g in report.groups if g["kind"] == loss]
        assert group["status"] == "fused"
        assert group["name"].endswith("lm_head")
        assert isinstance(model(**batch()).logits, DeferredLogits)
        assert group in report.to_dict()["groups"]
    assert not isinstance(model(**batch()).logits, DeferredLogits)
    layers = len(lk.apply(model, fused_loss=True).layers)
    assert lk.unapply(model) == layers + 1
    assert lk.unapply(model) == 0
