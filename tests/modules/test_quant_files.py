"""load_quantized and save_quantized: folders, shards, configurations, damaged files."""

from __future__ import annotations

import json
import random

import pytest
import torch

import lora_kernels as lk
from lora_kernels.errors import InvalidArgumentError, QuantizedWeightError
from lora_kernels.modules import safetensors_file
from lora_kernels.ops.quant_linear import FORMAT_NAMES


def weights(format="nf4"):
    return {
        "a.weight": lk.ops.quantize(torch.randn(24, 64), format),
        "a.bias": torch.randn(24),
        "norm.weight": torch.ones(64),
    }


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, t in wanted.items():
        if isinstance(t, lk.QuantTensor):
            assert found[name].equal(t), name
        else:
            assert torch.equal(found[name], t), name


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_round_trip(tmp_path, format):
    made = weights(format)
    lk.save_quantized(made, tmp_path / "w.safetensors")
    assert_same(lk.load_quantized(tmp_path / "w.safetensors"), made)
    assert_same(lk.load_quantized(tmp_path), made)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w.safetensors"]


def test_shards_with_an_index_may_cut_through_a_weight(tmp_path):
    made = weights()
    state = made["a.weight"].state_dict("a.") | {k: made[k] for k in ("a.bias", "norm.weight")}
    names = sorted(state)
    shards = {"m-1.safetensors": names[:4], "m-2.safetensors": names[4:]}
    for file, keys in shards.items():
        with open(tmp_path / file, "wb") as handle:
            safetensors_file.write(handle, {k: state[k] for k in keys})
    index = {"weight_map": {k: file for file, keys in shards.items() for k in keys}}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    assert_same(lk.load_quantized(tmp_path), made)
    for change, message in (
        ({"weight_map": {**index["weight_map"], "b": "m-1.safetensors"}}, "lacks 'b'"),
        ({"weight_map": {"a": "../m-1.safetensors"}}, "without a folder"),
        ({"weight_map": {"a": "m-9.safetensors"}}, "m-9.safetensors"),
        ({"weight_map": [1]}, "no 'weight_map'"),
        ([], "a JSON list"),
    ):
        path.write_text(json.dumps(change))
        with pytest.raises(QuantizedWeightError, match=message) as caught:
            lk.load_quantized(tmp_path)
        assert "\n" not in str(caught.value)
    path.write_text("{")
    with pytest.raises(QuantizedWeightError, match="is not JSON"):
        lk.load_quantized(tmp_path)


def test_the_configuration_beside_it_is_honoured(tmp_path):
    parts = lk.ops.quantize(torch.randn(24, 64), "int4", 32).named_parts()
    with open(tmp_path / "model.safetensors", "wb") as handle:
        safetensors_file.write(handle, {f"a.{k}": t for k, t in parts.items()})
    with pytest.raises(QuantizedWeightError, match="give layout="):
        lk.load_quantized(tmp_path)
    for version, layout in (("gptq", "gptq_v1"), ("gptq_v2", "gptq"), (None, "gptq_v1")):
        quantization = {"quant_method": "gptq", "bits": 4, "group_size": 32}
        if version:
            quantization["checkpoint_format"] = version
        config = {"quantization_config": quantization, "dtype": "bfloat16"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        q = lk.load_quantized(tmp_path)["a.weight"]
        assert (q.layout, q.dtype, q.block_size) == (layout, torch.bfloat16, 32)
    for quantization, message in (
        ({"quant_method": "gptq", "bits": 8, "group_size": 32}, "bits=8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 16}, "need 4"),
        ({"quant_method": "gptq", "bits": 4, "group_size": "x"}, "group_size='x'"),
        ({"quant_method": "aqlm"}, "quant_method='aqlm'"),
        ("text", "not an object"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
        with pytest.raises(QuantizedWeightError, match=message):
            lk.load_quantized(tmp_path)


def test_files_that_are_no_safetensors(tmp_path):
    for name, message in (
        ("a.bin", "pickles run code"),
        ("a.gguf", "gguf_file="),
        ("missing.safetensors", "No such file"),
    ):
        if "missing" not in name:
            (tmp_path / name).write_bytes(b"GGUF")
        with pytest.raises(QuantizedWeightError, match=message):
            lk.load_quantized(tmp_path / name)
    with pytest.raises(QuantizedWeightError, match="has no safetensors file"):
        lk.load_quantized(tmp_path)
    made = weights()
    for name in ("a", "b"):
        lk.save_quantized(made, tmp_path / f"{name}.safetensors")
    with pytest.raises(QuantizedWeightError, match="which another file of the folder has"):
        lk.load_quantized(tmp_path)
    with pytest.raises(InvalidArgumentError, match=r"must end in \.weight"):
        lk.save_quantized({"a": made["a.weight"]}, tmp_path / "c.safetensors")
    with pytest.raises(QuantizedWeightError, match="cannot be written"):
        lk.save_quantized(made, tmp_path / "nowhere" / "c.safetensors")


def test_damaged_files_raise_one_line(tmp_path):
    """Cut and overwritten at random: an error of ours, or what an undamaged header describes."""
    lk.save_quantized(weights(), tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng, refused = random.Random(5), 0
    for _ in range(200):
        data = bytearray(whole)
        if rng.random() < 0.3:
            data = data[: rng.randrange(len(data))]
        for _ in range(rng.randint(0, 3)):
            if data:
                data[rng.randrange(min(len(data), header))] = rng.randrange(256)
        (tmp_path / "w.safetensors").write_bytes(data)
        try:
            lk.load_quantized(tmp_path / "w.safetensors")
        except QuantizedWeightError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100
