"""attention's Triton kernels on a GPU: what the interpreter cannot show, matrix units and copies.

Marked gpu: part of make gpu-check. Without a GPU every test skips and says so.
"""

from __future__ import annotations

import pytest
import torch

from lora_kernels._backends import triton as backend
from lora_kernels.ops import attention, attention_decode
from lora_kernels.ops._philox import keep_mask
from lora_kernels.testing import attention_inputs, attention_op, check_attention, moved
from tests.ops.attention_cases import CASES
from tests.ops.decode_cases import CASES as DECODE_CASES
from tests.ops.decode_cases import check_decode, decode_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.skipif(backend.load()[0] is None, reason=backend.load()[1]),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("feature", [name for name in CASES if name != "float64"])
def test_features(feature):
    check_attention(moved(attention_inputs(**CASES[feature]), "cuda"), "triton")


@pytest.mark.parametrize("D", [16, 40, 64, 72, 80, 96, 112, 128, 192, 256])
def test_head_sizes_over_several_tiles(D):
    i = attention_inputs(
        1, 333, 2, D, Sk=401, Hk=1, causal=True, dtype=BF16, Dv=128 if D == 192 else D
    )
    check_attention(moved(i, "cuda"), "triton")


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_everything_over_several_tiles(dtype):
    i = attention_inputs(
        1, 300, 4, 64, Sk=411, Hk=2, dtype=dtype, causal=True, window=(150, 0), softcap=2.0,
        sinks=True, mask="additive", alibi=True, dropout_p=0.2, seed=3, return_lse=True,
    )  # fmt: skip
    check_attention(moved(i, "cuda"), "triton")


@pytest.mark.parametrize("lengths", [(300, 0, 1, 129), (64, 64, 200)], ids=str)
def test_packed_sequences(lengths):
    i = attention_inputs(H=4, D=64, Hk=2, lengths=lengths, causal=True, dtype=BF16, sinks=True)
    check_attention(moved(i, "cuda"), "triton")


@pytest.mark.parametrize("layout", ["strided", "permuted", "misaligned"])
def test_layouts(layout):
    i = attention_inputs(1, 150, 4, 64, Hk=2, layout=layout, dtype=FP16, causal=True)
    check_attention(moved(i, "cuda"), "triton")


@pytest.mark.parametrize("D", [64, 128, 256])
def test_dropout_drops_what_the_reference_drops(D):
    length, p, seed = 200, 0.4, 2**33 + 7
    v = torch.eye(length, D, device="cuda")[None, :, None].expand(1, length, 2, D)
    q = torch.zeros(1, 130, 2, 64, device="cuda", dtype=BF16)
    k = torch.zeros(1, length, 2, 64, device="cuda", dtype=BF16)
    out = attention(q, k, v.to(BF16), dropout_p=p, seed=seed, backend="triton")
    for h in (0, 1):
        kept = keep_mask(torch.tensor(seed), 130, min(D, length), p, h)
        assert torch.equal(out[0, :, h, :length].cpu() != 0, kept)


def test_bitwise_from_run_to_run():
    i = moved(
        attention_inputs(
            2, 700, 8, 64, Hk=2, dtype=BF16, causal=True, sinks=True, dropout_p=0.1, seed=1
        ),
        "cuda",
    )
    first, second = (attention_op(i, "triton") for _ in range(2))
    assert all(torch.equal(t, second[name]) for name, t in first.items())


@pytest.mark.parametrize("case", DECODE_CASES)
@pytest.mark.parametrize("page", [0, 16], ids=["contiguous", "paged"])
def test_decode(case, page):
    i = decode_inputs(page=page, lengths=(700, 0, 33), D=64, dtype=BF16, **DECODE_CASES[case])
    for splits in (None, 1, 5):
        check_decode(i, "triton", "cuda", num_splits=splits)
    check_decode(i, "aten", "cuda")


def test_decode_out_of_range_is_not_a_number():
    i = moved(decode_inputs(lengths=(7, 12, 9), page=4), "cuda")
    arguments = i.arguments()
    arguments["cache_seqlens"][1], arguments["block_table"][2, 1] = 13, 10**6
    for name in ("aten", "triton"):
        out = attention_decode(**arguments, backend=name)
        assert out[0].isfinite().all() and out[1:].isnan().all()


def test_decode_in_a_graph_reads_the_lengths_of_its_replay():
    i = moved(decode_inputs(lengths=(40, 64), page=16, D=64, dtype=BF16), "cuda")
    arguments = i.arguments()
    attention_decode(**arguments, backend="triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention_decode(**arguments, backend="triton")
    arguments["cache_seqlens"].copy_(torch.tensor([3, 17]))
    graph.replay()
    assert torch.equal(out, attention_decode(**arguments, backend="triton"))
