"""State dicts of quantized weights: round trips, and damage that has to be named."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

import lora_kernels as lk
from lora_kernels.errors import InvalidArgumentError, LoraKernelsError, QuantizedWeightError
from lora_kernels.ops.quant_linear import FORMAT_NAMES, quantized_layers

BLOB = "weight.quant_state.bitsandbytes__nf4"


def blob(**changes) -> torch.Tensor:
    content = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [33, 50],
        "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5, **changes,
    }  # fmt: skip
    text = json.dumps({k: v for k, v in content.items() if v is not ...})
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize("prefix", ["", "model.layers.0.q_proj."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_round_trip_through_safetensors(format, dtype, prefix):
    safetensors = pytest.importorskip("safetensors.torch")
    for shape in ((64, 128), (33, 50), (7, 3), (1, 1), (8, 8)):
        q = lk.ops.quantize(torch.randn(shape).to(dtype), format)
        state = {k: t.contiguous() for k, t in q.state_dict(prefix).items()}
        loaded = safetensors.load(safetensors.save(state))
        assert lk.QuantTensor.from_state_dict(loaded, prefix).equal(q), shape
        assert quantized_layers(loaded) == {prefix: "flat" if format in ("nf4", "fp4") else
                                            format.split("_")[0]}  # fmt: skip


@pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_linear4bit_both_ways(kind, nested, storage):
    bnb = pytest.importorskip("bitsandbytes")

    def layer():
        return bnb.nn.Linear4bit(
            128, 64, False, compress_statistics=nested, quant_type=kind, quant_storage=storage
        )

    theirs = layer()
    theirs.load_state_dict({"weight": torch.randn(64, 128)})
    theirs.to("cpu")
    theirs.weight = (
        theirs.weight._quantize("cpu") if not theirs.weight.bnb_quantized else theirs.weight
    )
    state = theirs.state_dict()
    q = lk.QuantTensor.from_state_dict(state)
    dequantized = bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    assert torch.equal(lk.ops.dequantize(q), dequantized)
    ours = q.state_dict()
    assert list(ours) == list(state)
    for name, t in state.items():
        assert (ours[name].dtype, ours[name].shape) == (t.dtype, t.shape), name
        assert torch.equal(ours[name].view(torch.uint8), t.view(torch.uint8)), name
    again = bnb.nn.Params4bit.from_prequantized(
        ours.pop("weight"), {f"weight.{k.removeprefix('weight.')}": v for k, v in ours.items()},
        device="cpu",
    )  # fmt: skip
    theirs_again = bnb.functional.dequantize_4bit(again.data, again.quant_state)
    assert torch.equal(theirs_again, dequantized)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_odd_tails_in_every_storage(storage):
    for shape in ((5, 7), (1, 1), (3, 3), (33, 50)):
        q = lk.ops.quantize(torch.randn(shape), quant_storage=storage)
        state = q.state_dict()
        assert state["weight"].dtype == storage and state["weight"].shape[1] == 1
        assert lk.QuantTensor.from_state_dict(state).equal(q)


def nf4_state():
    return dict(lk.ops.quantize(torch.randn(33, 50)).state_dict("p."))


DAMAGE = {
    "packed data missing": (lambda s: s.pop("p.weight"), r"p\.weight is missing"),
    "packed data truncated": (
        lambda s: s.update({"p.weight": s["p.weight"][:-1]}), "824 bytes of packed data; the shape"
    ),
    "packed data too long": (
        lambda s: s.update({"p.weight": torch.zeros(900, 1, dtype=torch.uint8)}), "900 bytes"
    ),
    "absmax missing": (lambda s: s.pop("p.weight.absmax"), r"p\.weight\.absmax is missing"),
    "absmax short": (
        lambda s: s.update({"p.weight.absmax": s["p.weight.absmax"][1:]}), r"has shape \[25\]"
    ),
    "absmax not nested": (
        lambda s: s.update({"p.weight.absmax": torch.ones(26)}), "absmax is float32"
    ),
    "nested_absmax missing": (
        lambda s: s.pop("p.weight.nested_absmax"), "nested_absmax is missing"
    ),
    "nested_quant_map missing": (
        lambda s: s.pop("p.weight.nested_quant_map"), "nested_quant_map is missing"
    ),
    "nested_absmax with NaN": (
        lambda s: s["p.weight.nested_absmax"].fill_(math.nan), "NaN or infinite"
    ),
    "quant_map missing": (lambda s: s.pop("p.weight.quant_map"), "quant_map is missing"),
    "quant_map short": (
        lambda s: s.update({"p.weight.quant_map": torch.ones(8)}), r"quant_map has shape \[8\]"
    ),
    "quant_state missing": (lambda s: s.pop("p." + BLOB), "bitsandbytes__nf4 is missing"),
    "unknown quant_type": (
        lambda s: s.update({"p." + BLOB[:-3] + "nf2": s.pop("p." + BLOB)}), "quant_type 'nf2'"
    ),
    "other quant_type": (lambda s: s.update({"p." + BLOB: blob(quant_type="fp4")}), "'fp4'"),
    "not JSON": (
        lambda s: s.update({"p." + BLOB: torch.tensor([123, 1], dtype=torch.uint8)}), "not JSON"
    ),
    "JSON list": (
        lambda s: s.update({"p." + BLOB: torch.tensor([91, 93], dtype=torch.uint8)}), "JSON list"
    ),
    "other shape": (lambda s: s.update({"p." + BLOB: blob(shape=[33, 51])}), "needs 842"),
    "absurd shape": (
        lambda s: s.update({"p." + BLOB: blob(shape=[2**40, 2**20])}), "of packed data"
    ),
    "overflowing shape": (
        lambda s: s.update({"p." + BLOB: blob(shape=[2**62, 2**62])}), "has shape"
    ),
    "negative shape": (lambda s: s.update({"p." + BLOB: blob(shape=[-33, -50])}), "has shape"),
    "shape of text": (lambda s: s.update({"p." + BLOB: blob(shape="33x50")}), "has shape"),
    "blocksize 48": (lambda s: s.update({"p." + BLOB: blob(blocksize=48)}), "blocksize 48"),
    "blocksize true": (lambda s: s.update({"p." + BLOB: blob(blocksize=True)}), "blocksize True"),
    "unknown dtype": (lambda s: s.update({"p." + BLOB: blob(dtype="int8")}), "dtype 'int8'"),
    "nested_offset missing": (
        lambda s: s.update({"p." + BLOB: blob(nested_offset=...)}), "no 'nested_offset'"
    ),
    "nested_offset infinite": (
        lambda s: s.update({"p." + BLOB: blob(nested_offset=math.inf)}), "nested_offset inf"
    ),
    "nested_blocksize 128": (
        lambda s: s.update({"p." + BLOB: blob(nested_blocksize=128)}), "nested_blocksize 128"
    ),
    "blob of floats": (
        lambda s: s.update({"p." + BLOB: torch.zeros(8)}), "dtype float32; accepted: uint8"
    ),
    "huge blob": (
        lambda s: s.update({"p." + BLOB: torch.zeros(10**6, dtype=torch.uint8)}), "1000000 bytes"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_in_one_line(damage):
    state = nf4_state()
    change, message = DAMAGE[damage]
    change(state)
    with pytest.raises(QuantizedWeightError, match=message) as caught:
        lk.QuantTensor.from_state_dict(state, "p.")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("p.")


INT4 = {
    "three bits": ({}, {"bits": 3}, "3 bits"),
    "group size 0": ({}, {"block_size": 0, "layout": "gptq"}, "group size 0"),
    "other group size": ({}, {"block_size": 16, "layout": "gptq"}, "need 4"),
    "g_idx too short": ({"g_idx": torch.zeros(50).int()}, {}, "need .7, 24."),
    "g_idx out of range": ({"g_idx": torch.full((64,), 9).int()}, {}, "goes from 9 to 9"),
    "g_idx negative": ({"g_idx": torch.full((64,), -1).int()}, {}, "goes from -1"),
    "scales of another width": ({"scales": torch.ones(2, 23)}, {}, "scales of 23 columns"),
    "zeros of another width": ({"qzeros": torch.ones(2, 2).int()}, {}, "qzeros has shape"),
    "qweight of floats": ({"qweight": torch.ones(8, 24)}, {}, "dtype float32; accepted: int32"),
    "scales with infinity": ({"scales": torch.full((2, 24), math.inf)}, {}, "infinite"),
    "an unknown version": ({}, {"layout": None}, "give layout="),
    "an unknown layout": ({}, {"layout": "marlin"}, "layout='marlin'"),
}


@pytest.mark.parametrize("case", INT4)
def test_int4_damage(case):
    changes, hints, message = INT4[case]
    state = dict(lk.ops.quantize(torch.randn(24, 64), "int4", 32).named_parts())
    state.update(changes)
    with pytest.raises((QuantizedWeightError, InvalidArgumentError), match=message):
        lk.QuantTensor.from_state_dict(state, **{"layout": "gptq", **hints})


def test_symmetric_gptq_tells_its_version():
    parts = lk.ops.quantize(torch.randn(24, 64), "int4", 32).named_parts()
    for layout, word in (("gptq", -0x77777778), ("gptq_v1", 0x77777777)):
        q = lk.QuantTensor.from_state_dict(
            {**parts, "qzeros": torch.full_like(parts["qzeros"], word)}
        )
        assert q.layout == layout
        zero = torch.zeros_like(parts["qweight"]) + (-0x77777778)
        state = {**parts, "qweight": zero, "qzeros": torch.full_like(parts["qzeros"], word)}
        assert not lk.ops.dequantize(lk.QuantTensor.from_state_dict(state)).any()


def test_int8_and_fp8_damage():
    state = dict(lk.ops.quantize(torch.randn(24, 64), "int8").state_dict())
    for change, message in (
        ({"SCB": torch.ones(23)}, r"SCB has shape \[23\]"),
        ({"SCB": torch.full((24,), math.nan)}, "SCB has 24 NaN"),
        ({"weight_format": torch.tensor(2, dtype=torch.uint8)}, "row-major"),
        ({"weight": torch.ones(24, 64)}, "weight has dtype float32"),
    ):
        with pytest.raises(QuantizedWeightError, match=message):
            lk.QuantTensor.from_state_dict({**state, **change})
    state = dict(lk.ops.quantize(torch.randn(24, 64), "fp8").state_dict())
    with pytest.raises(QuantizedWeightError, match=r"weight_scale has shape \[7\]"):
        lk.QuantTensor.from_state_dict({**state, "weight_scale": torch.ones(7)})
    with pytest.raises(QuantizedWeightError, match="describes no quantized weight"):
        lk.QuantTensor.from_state_dict({**state, "quant_spec": torch.ones(9, dtype=torch.uint8)})
    with pytest.raises(QuantizedWeightError, match="no quantized weight here"):
        lk.QuantTensor.from_state_dict({"weight": torch.ones(2, 2)})


@pytest.mark.parametrize("format", ["nf4", "int8", "int4", "fp8_block"])
def test_fuzzed_state_dicts_never_do_more_than_raise(format):
    """Random damage to keys, dtypes, shapes and the JSON: an error of ours, or a weight that fits
    its parts."""
    rng = random.Random(format)
    whole = lk.ops.quantize(torch.randn(24, 64), format).state_dict()
    refused = 0
    for _ in range(300):
        state = dict(whole)
        for _ in range(rng.randint(1, 2)):
            name = rng.choice(sorted(state))
            t = state[name]
            kind = rng.randrange(6)
            if kind == 0:
                del state[name]
            elif kind == 1 and t.dim():
                state[name] = t[: rng.randrange(t.shape[0] + 1)]
            elif kind == 2:
                state[name] = t.reshape(-1)
            elif kind == 3:
                state[name] = torch.zeros(rng.choice([(), (3,), (24, 64), (0, 5)]),
                                          dtype=rng.choice([t.dtype, torch.float64]))  # fmt: skip
            elif kind == 4:
                raw = t.clone().reshape(-1).view(torch.uint8)
                if raw.numel():
                    raw[rng.randrange(raw.numel())] = rng.randrange(256)
                state[name] = raw.view(t.dtype).view(t.shape)
            else:
                state[name + rng.choice("xyz")] = state.pop(name)
            if not state:
                break
        try:
            q = lk.QuantTensor.from_state_dict(state)
        except LoraKernelsError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert lk.ops.dequantize(q, backend="aten").shape == q.shape
    assert refused > 100


def test_fuzzed_json():
    rng = random.Random(7)
    state = nf4_state()
    text = bytearray(state["p." + BLOB].tolist())
    for _ in range(300):
        damaged = bytearray(text)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        state["p." + BLOB] = torch.tensor(list(damaged), dtype=torch.uint8)
        try:
            q = lk.QuantTensor.from_state_dict(state, "p.")
        except QuantizedWeightError as error:
            assert "\n" not in str(error)
        else:
            assert q.numel() == 33 * 50
