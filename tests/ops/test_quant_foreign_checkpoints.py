"""Checkpoints as other programs write them: packed here element by element from the published
layouts, not by this package, and read back to the values that those programs mean."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

import lora_kernels as lk
from lora_kernels.errors import QuantizedWeightError
from lora_kernels.modules import safetensors_file

N, K, SIZE = 24, 64, 16
GROUPS = K // SIZE
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def gptq(q: Tensor, zero: Tensor, scales: Tensor, g_idx: Tensor | None) -> dict[str, Tensor]:
    """q [K, N], zero [G, N] as it is to be stored."""
    qweight = [
        [signed(sum(int(q[8 * r + j, n]) << 4 * j for j in range(8))) for n in range(N)]
        for r in range(K // 8)
    ]
    qzeros = [
        [signed(sum(int(zero[g, 8 * c + j]) << 4 * j for j in range(8))) for c in range(N // 8)]
        for g in range(GROUPS)
    ]
    found = {"qweight": torch.tensor(qweight, dtype=torch.int32), "scales": scales,
             "qzeros": torch.tensor(qzeros, dtype=torch.int32)}  # fmt: skip
    return found if g_idx is None else found | {"g_idx": g_idx}


def awq(q: Tensor, zero: Tensor, scales: Tensor) -> dict[str, Tensor]:
    def packed(rows: Tensor) -> Tensor:
        words = [
            [
                signed(sum(int(row[8 * c + AWQ_COLUMNS[i]]) << 4 * i for i in range(8)))
                for c in range(N // 8)
            ]
            for row in rows
        ]
        return torch.tensor(words, dtype=torch.int32)

    return {"qweight": packed(q), "qzeros": packed(zero), "scales": scales}


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """Codes [K, N], zero points of 1 to 15 and fp16 scales [G, N]."""
    scales = (torch.rand(GROUPS, N) + 0.5).half()
    return torch.randint(0, 16, (K, N)), torch.randint(1, 16, (GROUPS, N)), scales


def meant(q: Tensor, zero: Tensor, scales: Tensor, group: Tensor) -> Tensor:
    """[N, K] in fp32."""
    return ((q - zero[group]).float() * scales.float()[group]).t()


IN_ORDER = torch.arange(K, dtype=torch.int32) // SIZE


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq(tmp_path, version, desc_act, symmetric):
    q, zero, scales = drawn()
    if symmetric:
        zero = torch.full_like(zero, 8)
    g_idx = IN_ORDER[torch.randperm(K)] if desc_act else IN_ORDER
    stored = zero - int(version == "gptq")
    quantization = {
        "quant_method": "gptq", "bits": 4, "group_size": SIZE, "desc_act": desc_act,
        "sym": symmetric, "checkpoint_format": version,
    }  # fmt: skip
    loaded = load(tmp_path, gptq(q, stored, scales, g_idx), quantization)
    assert loaded.spec.act_order == desc_act
    assert torch.equal(loaded.dequantize(torch.float32), meant(q, zero, scales, g_idx.long()))


def load(folder, parts: dict[str, Tensor], quantization: dict | None) -> lk.QuantTensor:
    with open(folder / "model.safetensors", "wb") as handle:
        safetensors_file.write(handle, {f"a.{k}": t.contiguous() for k, t in parts.items()})
    config = {} if quantization is None else {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps({"dtype": "float16", **config}))
    return lk.load_quantized(folder)["a.weight"]


@pytest.mark.parametrize("g_idx", [None, torch.zeros(K, dtype=torch.int32), IN_ORDER.long()])
def test_gptq_groups_in_order_in_all_their_spellings(g_idx):
    """Left out, never filled in, or of 64 bits."""
    q, zero, scales = drawn()
    state = gptq(q, zero, scales, g_idx)
    loaded = lk.QuantTensor.from_state_dict(state, layout="gptq", block_size=SIZE)
    assert not loaded.spec.act_order
    assert torch.equal(loaded.dequantize(torch.float32), meant(q, zero, scales, IN_ORDER.long()))


def test_the_version_under_its_newer_name(tmp_path):
    q, zero, scales = drawn()
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": SIZE, "format": "gptq_v2"}
    loaded = load(tmp_path, gptq(q, zero, scales, IN_ORDER), quantization)
    assert torch.equal(loaded.dequantize(torch.float32), meant(q, zero, scales, IN_ORDER.long()))


def test_awq_gemm(tmp_path):
    q, zero, scales = drawn()
    state = awq(q, zero, scales)
    want = meant(q, zero, scales, IN_ORDER.long())
    for config in (
        {"quant_method": "awq", "bits": 4, "group_size": SIZE, "version": "gemm"},
        {"quant_method": "awq", "w_bit": 4, "q_group_size": SIZE, "version": "GEMM"},
        {"quant_method": "awq", "bits": 4, "group_size": SIZE, "format": "gemm"},
        None,
    ):
        assert torch.equal(load(tmp_path, state, config).dequantize(torch.float32), want), config


REFUSED = {
    "awq gemv": ({"quant_method": "awq", "version": "gemv"}, "version='gemv'; accepted: gemm"),
    "awq gemv_fast": ({"quant_method": "awq", "version": "gemv_fast"}, "version='gemv_fast'"),
    "awq of another name": ({"quant_method": "awq", "checkpoint_format": "llm-awq"}, "'llm-awq'"),
    "awq of 3 bits": ({"quant_method": "awq", "w_bit": 3}, "bits=3; accepted: 4"),
    "gptq of 3 bits": ({"quant_method": "gptq", "bits": 3}, "bits=3; accepted: 4"),
    "marlin": ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin'"),
    "old marlin": ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "is_marlin"),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        "quant_method='compressed-tensors'; accepted: bitsandbytes, gptq, awq, fp8",
    ),
    "hqq": ({"quant_method": "hqq"}, "quant_method='hqq'"),
    "oblong blocks": (
        {"quant_method": "fp8", "weight_block_size": [128, 64]}, "two equal integers"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_other_layouts_are_refused_by_name(tmp_path, what):
    quantization, message = REFUSED[what]
    with pytest.raises(QuantizedWeightError, match=message) as caught:
        load(tmp_path, awq(*drawn()), {"group_size": SIZE, **quantization})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_gptq_of_other_widths_without_a_configuration(bits):
    """The sizes give them away, with and without g_idx."""
    state = {
        "qweight": torch.zeros(K * bits // 32, 32, dtype=torch.int32),
        "qzeros": torch.zeros(GROUPS, 32 * bits // 32, dtype=torch.int32),
        "scales": torch.ones(GROUPS, 32).half(),
    }
    for more in ({}, {"g_idx": IN_ORDER}):
        with pytest.raises(QuantizedWeightError, match=r"has shape|groups"):
            lk.QuantTensor.from_state_dict({**state, **more}, layout="gptq", block_size=SIZE)


def test_awq_gemv_tensors_without_a_configuration():
    """Packed along k: rows of out_features."""
    state = {
        "qweight": torch.zeros(N, K // 8, dtype=torch.int32),
        "qzeros": torch.zeros(N, 1, dtype=torch.int32),
        "scales": torch.ones(N, 8).half(),
    }
    with pytest.raises(QuantizedWeightError):
        lk.QuantTensor.from_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bitsandbytes_statistics_that_were_cast_with_the_model(dtype):
    q = lk.ops.quantize(torch.randn(N, K), "nf4", double_quant=False)
    state = dict(q.state_dict())
    state["weight.absmax"] = state["weight.absmax"].to(dtype)
    loaded = lk.QuantTensor.from_state_dict(state)
    parts = q.named_parts()
    code = torch.stack([parts["packed"] >> 4, parts["packed"] & 15], 1).reshape(-1).long()
    absmax = parts["absmax"].to(dtype).float().repeat_interleave(64)
    want = (parts["code"][code] * absmax).view(N, K)
    assert torch.equal(loaded.dequantize(torch.float32), want)


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu], ids=str)
def test_fp8_blocks_of_deepseek_and_qwen(tmp_path, scales):
    """weight_scale_inv multiplies, whatever its name says; the last blocks are cut off."""
    packed = torch.randn(200, 300).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.5, 2.0, 1.0], [4.0, 0.25, 8.0]])
    want = packed.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:200, :300]
    quantization = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }  # fmt: skip
    state = {"weight": packed, "weight_scale_inv": scale.to(scales)}
    if scales == torch.float8_e8m0fnu:  # files are read by safetensors_file in tests of their own
        loaded = lk.QuantTensor.from_state_dict(state, block_size=128)
    else:
        loaded = load(tmp_path, state, quantization)
    assert loaded.layout == "fp8_block"
    assert torch.equal(loaded.dequantize(torch.float32), want)


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_fp8_with_one_scale(name, shape):
    packed = torch.randn(200, 300).to(torch.float8_e4m3fn)
    state = {"weight": packed, name: torch.full(shape, 0.75)}
    loaded = lk.QuantTensor.from_state_dict(state)
    assert torch.equal(loaded.dequantize(torch.float32), packed.float() * 0.75)
