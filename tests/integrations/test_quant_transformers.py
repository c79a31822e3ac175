"""from_pretrained with a QuantConfig: checkpoints of bitsandbytes without it, and on the fly."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import lora_kernels as lk
from lora_kernels.errors import InvalidArgumentError, QuantizedWeightError

ROOT = Path(__file__).resolve().parents[2]
FORMATS = ["nf4", "fp4", "int8", "int4", "int4_awq", "fp8", "fp8_block", "fp8_tensor"]
IDS = torch.arange(14).reshape(2, 7)


@pytest.fixture(autouse=True)
def _one_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense and quantized layers then run the same library products, and give the same bits."""
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "aten")


def tiny():
    options = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    tiny().save_pretrained(folder)
    return folder


def load(folder, config=None, **options):
    options.setdefault("dtype", torch.float32)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=lk.QuantConfig() if config is None else config, **options
    )


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@torch.no_grad()
def dequantized_logits(folder, quantized) -> torch.Tensor:
    """Of the dense model with the values of the quantized weights put in."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in quantized.named_modules():
        if isinstance(module, lk.QuantLinear):
            model.get_submodule(name).weight.copy_(module.quant_weight.dequantize(torch.float32))
    return logits(model)


@pytest.mark.parametrize("format", FORMATS)
def test_on_the_fly_save_and_load(dense, tmp_path, format):
    model = load(dense, lk.QuantConfig(format))
    kinds = {type(m).__name__ for m in model.modules() if isinstance(m, torch.nn.Linear)}
    assert kinds == {"QuantLinear", "Linear"}
    assert type(model.lm_head) is torch.nn.Linear
    assert torch.equal(logits(model), dequantized_logits(dense, model))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))
    found = lk.load_quantized(tmp_path)
    q = found["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(
        q.dequantize(torch.float32),
        model.model.layers[1].mlp.down_proj.quant_weight.dequantize(torch.float32),
    )


@pytest.mark.parametrize("shards", [None, "20KB"])
def test_adapters_from_the_configuration(dense, tmp_path, shards):
    load(dense, lk.QuantConfig("nf4")).save_pretrained(
        tmp_path, **({"max_shard_size": shards} if shards else {})
    )
    model = load(tmp_path, lk.QuantConfig(r=4, alpha=8))
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, lk.QuantLoRALinear) and layer.scaling == 2.0
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    assert len(lk.load_quantized(tmp_path)) == 21


def test_gpt2_transposed_layers(tmp_path):
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=96, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = load(tmp_path, lk.QuantConfig("int8"))
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    layer, plain = model.transformer.h[0].mlp.c_fc, stock.transformer.h[0].mlp.c_fc
    assert (layer.in_features, layer.out_features) == (32, 128)
    assert layer.quant_weight.equal(lk.ops.quantize(plain.weight.detach().t().contiguous(), "int8"))
    assert torch.equal(layer.bias, plain.bias)
    model.save_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(load(tmp_path / "quantized")), logits(model))


def test_a_bf16_model_keeps_its_statistics_in_fp32(dense):
    model = load(dense, lk.QuantConfig("nf4", double_quant=False), dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.absmax.dtype == torch.float32
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert logits(model).dtype == torch.bfloat16
    model.to(torch.float16)
    assert layer.absmax.dtype == torch.float32


def test_skipped_modules_stay_dense(dense):
    model = load(dense, lk.QuantConfig("nf4", skip_modules=["lm_head", "down_proj"]))
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert isinstance(model.model.layers[0].mlp.up_proj, lk.QuantLinear)


def test_dequantize_gives_a_dense_model(dense):
    model = load(dense, lk.QuantConfig("nf4"))
    before = logits(model)
    model.dequantize()
    assert not any(isinstance(m, lk.QuantLinear) for m in model.modules())
    assert torch.equal(logits(model), before)


def test_arguments_that_the_checkpoint_decides_are_refused(dense, tmp_path):
    load(dense, lk.QuantConfig("nf4")).save_pretrained(tmp_path)
    with pytest.raises(InvalidArgumentError, match="format='int8', but the checkpoint"):
        load(tmp_path, lk.QuantConfig("int8"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "nf5"}, "nf5"),
        ({"format": "int8", "double_quant": True}, "double_quant"),
        ({"block_size": 48}, "block_size=48"),
        ({"quant_storage": "complex"}, "quant_storage"),
        ({"r": 0}, "r=0"),
    ],
)
def test_bad_options_are_refused_at_once(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        lk.QuantConfig(**options)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "bits=3"),
        ({"quant_method": "awq", "bits": 4, "group_size": 0}, "group_size=0"),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"},
            "version='gemv'",
        ),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format"),
        ({"quant_method": "hqq"}, "quant_method='hqq'"),
    ],
)
def test_checkpoints_of_other_kinds_are_refused_by_name(config, message):
    with pytest.raises(QuantizedWeightError, match=message):
        lk.QuantConfig().for_checkpoint(config)


def test_a_missing_part_fails_the_load(dense, tmp_path):
    from safetensors.torch import load_file, save_file

    load(dense, lk.QuantConfig("nf4")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight.nested_absmax"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError):
        load(tmp_path)


def test_without_a_quant_config_transformers_is_as_before(dense):
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear


def bitsandbytes_config(kind):
    make = transformers.BitsAndBytesConfig
    if kind == "int8":
        return make(load_in_8bit=True)
    return make(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind[:3],
        bnb_4bit_use_double_quant="dq" in kind,
        bnb_4bit_quant_storage=torch.bfloat16 if "bf16" in kind else torch.uint8,
    )


KINDS = ["nf4", "nf4-dq", "fp4", "nf4-dq-bf16", "int8"]
WITHOUT_BITSANDBYTES = """
    import sys

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "bitsandbytes":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            return None

    sys.meta_path.insert(0, Blocked())
    import torch
    import lora_kernels as lk
    from transformers import AutoModelForCausalLM

    for folder in sys.argv[1:]:
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=lk.QuantConfig(), dtype=torch.float32
        )
        layer = model.model.layers[0].mlp.up_proj
        assert isinstance(layer, lk.QuantLinear), layer
        expected = torch.load(f"{folder}/expected.pt")
        assert torch.equal(layer.quant_weight.dequantize(torch.float32), expected)
        model.save_pretrained(f"{folder}/again")
    assert "bitsandbytes" not in sys.modules
"""


def test_what_transformers_and_bitsandbytes_wrote(dense, tmp_path):
    """Loaded without bitsandbytes in a fresh process, bit for bit; and what that one saves is again
    the checkpoint of bitsandbytes."""
    bnb = pytest.importorskip("bitsandbytes")
    theirs = {}
    for kind in KINDS:
        folder = tmp_path / kind
        theirs[kind] = model = transformers.AutoModelForCausalLM.from_pretrained(
            dense,
            quantization_config=bitsandbytes_config(kind),
            dtype=torch.float32,
            device_map="cpu",
        )
        model.save_pretrained(folder)
        layer = model.model.layers[0].mlp.up_proj
        if kind == "int8":
            w = bnb.functional.int8_vectorwise_dequant(layer.weight.CB, layer.weight.SCB)
        else:
            w = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        torch.save(w.float(), folder / "expected.pt")
    script = textwrap.dedent(WITHOUT_BITSANDBYTES)
    done = subprocess.run(
        [sys.executable, "-c", script, *(str(tmp_path / kind) for kind in KINDS)],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for kind in KINDS:
        again = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / kind / "again", dtype=torch.float32, device_map="cpu"
        )
        state, other = theirs[kind].state_dict(), again.state_dict()
        assert type(again.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
        assert list(state) == list(other)
        for name, t in state.items():
            assert (other[name].dtype, other[name].shape) == (t.dtype, t.shape)
            a, b = (v.contiguous().reshape(-1).view(torch.uint8) for v in (t, other[name]))
            assert torch.equal(a, b), name
