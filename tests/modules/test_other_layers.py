"""Embeddings, convolutions, LSTM and Conv1D layers in a model: replace, files, PEFT, merge."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.errors import AdapterFileError, InvalidArgumentError
from lora_kernels.modules.lora_linear import adapters_disabled
from lora_kernels.modules.lora_transposed_linear import LoRATransposedLinear
from lora_kernels.testing import assert_within_budget


class Net(nn.Module):
    """Tokens through an embedding, a convolution, an LSTM and a linear."""

    def __init__(self, lstm=True):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.lstm = nn.LSTM(8, 5, batch_first=True, bidirectional=True) if lstm else None
        self.head = nn.Linear(10 if lstm else 8, 4)

    def forward(self, tokens):
        x = self.conv(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
        return self.head(x if self.lstm is None else self.lstm(x)[0])


TOKENS = torch.arange(24).reshape(3, 8) % 11
NAMES = ["embed", "conv", "lstm", "head"]


def strengthen(model):
    """Every factor random: updates of the size of the weights."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.3)
    return model


def adapted(lstm=True, **options):
    torch.manual_seed(1)
    base = Net(lstm)
    model = copy.deepcopy(base)
    names = NAMES if lstm else ["embed", "conv", "head"]
    report = lk.replace_modules(model, **{"r": 2, "alpha": 3, "targets": names, **options})
    assert [e.name for e in report.fused] == names
    return base, strengthen(model)


def test_replace_by_name_and_freeze():
    base, model = adapted()
    kinds = [type(getattr(model, n)).__name__ for n in NAMES]
    assert kinds == ["LoRAEmbedding", "LoRAConv1d", "LoRALSTM", "LoRALinear"]
    assert {n.split(".")[-1][:5] for n, p in model.named_parameters() if p.requires_grad} == {
        "lora_"
    }
    assert not torch.equal(model(TOKENS), base(TOKENS))
    # torch takes other LSTM kernels where no weight may need a gradient.
    base.requires_grad_(False)
    with adapters_disabled(model), torch.no_grad():
        assert torch.equal(model(TOKENS), base(TOKENS))
    model(TOKENS).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)


def test_all_linear_leaves_the_others_alone():
    model = Net()
    report = lk.replace_modules(model, r=2)
    assert [e.name for e in report.layers] == ["head"]
    assert type(model.conv) is nn.Conv1d


def test_dora_and_quantization_are_for_linear_layers():
    with pytest.raises(InvalidArgumentError, match="dora=True; a Embedding"):
        lk.replace_modules(Net(), targets=["embed", "head"], dora=True)
    with pytest.raises(InvalidArgumentError, match="cannot be quantized"):
        lk.replace_modules(Net(), targets=["conv"], quant="nf4")
    with pytest.raises(InvalidArgumentError, match="2 groups"):
        lk.replace_modules(nn.Sequential(nn.Conv1d(4, 4, 1, groups=2)), targets=["0"])


@pytest.mark.parametrize("exact", [False, True])
def test_merge_and_unmerge_of_a_model(exact):
    _, model = adapted()
    low, before = model(TOKENS), copy.deepcopy(model.state_dict())
    want = copy.deepcopy(model).double()(TOKENS)
    assert lk.merge(model, exact=exact) == NAMES
    assert_within_budget(model(TOKENS), want, low)
    assert lk.merge(model) == [] and lk.unmerge(model) == NAMES
    if exact:
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_tied_embedding_is_not_merged():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
    model["head"].weight = model["embed"].weight
    lk.replace_modules(model, targets=["embed"])
    with pytest.raises(InvalidArgumentError, match="tied"):
        lk.merge(model)


def test_files_round_trip(tmp_path):
    base, model = adapted()
    lk.save_adapter(model, tmp_path)
    fresh = copy.deepcopy(base)
    report = lk.load_adapter(fresh, tmp_path)
    assert len(report.fused) == 4
    assert torch.equal(fresh(TOKENS), model(TOKENS))
    present = copy.deepcopy(base)
    lk.replace_modules(present, r=2, alpha=9, targets=NAMES)
    lk.load_adapter(present, tmp_path)
    assert torch.equal(present(TOKENS), model(TOKENS))


def test_lstm_with_one_kind_of_adapter_comes_back_so(tmp_path):
    base = Net()
    model = copy.deepcopy(base).requires_grad_(False)
    model.lstm = lk.LoRALSTM.from_lstm(model.lstm, r=2, adapt="hh")
    strengthen(model)
    lk.save_adapter(model, tmp_path)
    lk.load_adapter(base, tmp_path)
    assert base.lstm.adapt == ("hh",)
    assert torch.equal(base(TOKENS), model(TOKENS))


def test_peft_loads_ours_and_we_load_its(tmp_path):
    peft = pytest.importorskip("peft")
    base, model = adapted(lstm=False)
    lk.save_adapter(model, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours"))
    exact, low = copy.deepcopy(loaded).double()(TOKENS), loaded(TOKENS)
    assert_within_budget(model(TOKENS), exact, low)
    loaded.save_pretrained(str(tmp_path / "theirs"))
    fresh = copy.deepcopy(base)
    lk.load_adapter(fresh, tmp_path / "theirs")
    assert torch.equal(fresh(TOKENS), model(TOKENS))


def test_peft_refuses_an_lstm_rather_than_leaving_it_out(tmp_path):
    peft = pytest.importorskip("peft")
    base, model = adapted()
    lk.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="LSTM"):
        peft.PeftModel.from_pretrained(base, str(tmp_path))


@pytest.mark.parametrize(
    ("other", "fragment"),
    [
        (lambda: nn.Embedding(12, 6), "lora_embedding_A: the file has [2, 11]"),
        (lambda: nn.Linear(11, 6), "is not a linear layer's"),
        (lambda: nn.Conv1d(11, 6, 1), "for another model"),
        (lambda: nn.Embedding(11, 6, sparse=True), "sparse"),
    ],
)
def test_adapter_of_another_layer_is_refused(tmp_path, other, fragment):
    base, model = adapted(lstm=False)
    lk.save_adapter(model, tmp_path)
    base.embed = other()
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(AdapterFileError) as caught:
        lk.load_adapter(base, tmp_path)
    assert fragment in str(caught.value) and "\n" not in str(caught.value)
    assert before.keys() == base.state_dict().keys()


def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    shape = transformers.GPT2Config(
        vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3
    )
    return transformers.GPT2LMHeadModel(shape).eval()


def test_gpt2_all_linear_adapts_its_conv1d_layers(tmp_path):
    peft = pytest.importorskip("peft")
    base, tokens = gpt2(), torch.arange(12)[None]
    model = copy.deepcopy(base)
    report = lk.replace_modules(model, r=2, alpha=4)
    assert len(report.fused) == 8 and isinstance(
        model.transformer.h[0].attn.c_attn, LoRATransposedLinear
    )
    assert torch.equal(model(tokens).logits, base(tokens).logits)
    strengthen(model)
    lk.save_adapter(model, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours"))
    low, exact = loaded(tokens).logits, copy.deepcopy(loaded).double()(tokens).logits
    assert_within_budget(model(tokens).logits, exact, low)
    lk.merge(model)
    assert_within_budget(model(tokens).logits, exact, low)
    # PEFT's own file says fan_in_fan_out, which only describes these layers.
    wrapped = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(
            r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False
        ),
    )
    wrapped.save_pretrained(str(tmp_path / "theirs"))
    content = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert content["fan_in_fan_out"] is True
    fresh = copy.deepcopy(base)
    lk.load_adapter(fresh, tmp_path / "theirs")
    low, exact = wrapped(tokens).logits, copy.deepcopy(wrapped).double()(tokens).logits
    assert_within_budget(fresh(tokens).logits, exact, low)


def test_gpt2_with_an_embedding_saved_by_peft(tmp_path):
    peft = pytest.importorskip("peft")
    base, tokens = gpt2(), torch.arange(12)[None]
    wrapped = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(r=2, target_modules=["wte", "c_attn"], init_lora_weights=False),
    )
    wrapped.save_pretrained(str(tmp_path))
    lk.load_adapter(base, tmp_path)
    low, exact = wrapped(tokens).logits, copy.deepcopy(wrapped).double()(tokens).logits
    assert_within_budget(base(tokens).logits, exact, low)


def test_transposed_linear_drops_and_trains():
    layer = LoRATransposedLinear(nn.Parameter(torch.randn(6, 4)), r=2, dropout=1.0)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 6)
    assert torch.equal(layer.train()(x), x @ layer.weight)
    layer.eval()(x).sum().backward()
    assert layer.lora_A.grad.abs().sum() > 0 and layer.weight.grad is None
    with pytest.raises(InvalidArgumentError, match="accepted: transformers"):
        LoRATransposedLinear.from_conv1d(nn.Linear(3, 3))
