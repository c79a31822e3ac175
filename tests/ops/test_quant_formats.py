"""The formats: known tables, bitsandbytes' wheel bit for bit, QuantTensor as a container."""

from __future__ import annotations

import copy
import hashlib
import io
import pickle

import pytest
import torch

import lora_kernels as lk
from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops.quant_linear import FORMAT_NAMES, encode, formats, reference
from lora_kernels.ops.quant_linear.formats import from_key, parts_of

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# K is a multiple of 64 in the first two: there the wheel's AVX-512 dequantizer is right.
SHAPES = [(64, 128), (33, 64), (7, 20), (5, 7), (300, 400), (4, 96), (1, 1), (3, 4096)]


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes.functional")


def test_tables():
    digest = hashlib.sha256(bytes(formats.dynamic_map().view(torch.uint8).tolist())).hexdigest()
    assert digest.startswith("e732639a65f497b4")
    assert formats.code_table("nf4")[7] == 0 and formats.code_table("nf4").diff().gt(0).all()
    fp4 = formats.code_table("fp4")
    assert torch.equal(fp4[:8], -fp4[8:]) and fp4[8].signbit()
    # The published decision boundaries are the midpoints.
    nf4 = formats.code_table("nf4")
    middles = (nf4[:-1] + nf4[1:]) / 2
    assert middles[0].item() == torch.tensor(-0.8480964004993439).item()
    assert middles[14].item() == torch.tensor(0.8614784181118011).item()


def test_tables_equal_those_of_bitsandbytes(bnb):
    assert torch.equal(formats.dynamic_map(), bnb.create_dynamic_map())
    for kind in ("nf4", "fp4"):
        assert torch.equal(formats.code_table(kind), bnb.get_4bit_type(kind, device="cpu"))


@pytest.mark.parametrize("block", [32, 64, 256, 4096])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_quantize_gives_the_bytes_of_bitsandbytes(bnb, kind, dtype, block):
    for shape in SHAPES:
        w = torch.randn(shape).to(dtype)
        w.view(-1)[: min(block, w.numel() // 2)] = 0  # a block of zeros
        theirs, state = bnb.quantize_4bit(
            w, blocksize=block, quant_type=kind, compress_statistics=False
        )
        q = lk.ops.quantize(w, kind, block, False)
        assert torch.equal(q.named_parts()["packed"], theirs.view(-1)), shape
        # It stores the smallest normal-sized number for a last, partial block of zeros.
        absmax = state.absmax.masked_fill(state.absmax <= formats.MIN_ABSMAX, 0)
        assert torch.equal(q.named_parts()["absmax"], absmax), shape


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_dequantize_gives_the_values_of_bitsandbytes(bnb, kind, dtype, nested):
    for shape in SHAPES[:2]:
        w = torch.randn(shape).to(dtype)
        theirs, state = bnb.quantize_4bit(w, quant_type=kind, compress_statistics=nested)
        parts = [theirs.view(-1), state.absmax, state.code]
        if nested:
            parts += [state.state2.absmax, state.state2.code, state.offset]
        spec = lk.ops.quantize(w, kind, 64, nested).spec
        for backend in ("reference", "aten"):
            ours = lk.ops.dequantize(lk.QuantTensor(spec, parts), backend=backend)
            assert torch.equal(ours, bnb.dequantize_4bit(theirs, state)), (shape, backend)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_ragged_shapes_follow_the_torch_formula_of_bitsandbytes(bnb, kind):
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    plain = getattr(_dequantize_4bit_compute, "__wrapped__", _dequantize_4bit_compute)
    for shape in SHAPES[2:]:
        q = lk.ops.quantize(torch.randn(shape), kind, 64, False)
        packed, absmax, code = q.parts
        theirs = plain(packed, absmax, code, 64, shape, torch.float32)
        assert torch.equal(lk.ops.dequantize(q), theirs), shape


def test_nested_statistics_are_the_nearest_codes(bnb):
    """The wheel's quantizer looks its codes up in a coarse table and is off by one here and there;
    never is it closer."""
    w = torch.randn(512, 1024)
    _, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    parts = lk.ops.quantize(w).named_parts()
    assert torch.equal(parts["nested_absmax"], state.state2.absmax)
    assert parts["offset"] == state.offset
    assert (parts["absmax"].int() - state.absmax.int()).abs().max() <= 1
    exact = w.view(-1, 64).abs().amax(1)
    mine = lk.ops.quantize(w)
    scale = parts["nested_absmax"].repeat_interleave(256)
    theirs = state.code.new_tensor(0) + parts["nested_code"][state.absmax.long()] * scale
    ours = reference.absmax(mine.parts, mine.spec) - parts["offset"]
    wanted = exact - parts["offset"]
    tie = torch.finfo(torch.float32).eps * wanted.abs().max()
    assert ((ours - wanted).abs() <= (theirs - wanted).abs() + tie).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_int8_equals_linear8bitlt(bnb, dtype):
    w = torch.randn(64, 128).to(dtype)
    codes, scale, _ = bnb.int8_vectorwise_quant(w.half())
    q = lk.ops.quantize(w, "int8")
    assert torch.equal(q.parts[0], codes) and torch.equal(q.parts[1], scale)
    theirs = bnb.int8_vectorwise_dequant(codes, scale)
    assert torch.equal(lk.ops.dequantize(q, dtype=torch.float32), theirs)


def test_int4_layouts_by_hand():
    """One weight, packed bit by bit in plain Python, read through every layout."""
    torch.manual_seed(1)
    k, n, group = 16, 8, 8
    codes = torch.randint(0, 16, (k, n))
    zeros, scales = torch.randint(1, 15, (2, n)), (torch.rand(2, n) + 0.5).half()
    w = (codes - zeros.repeat_interleave(group, 0)).float() * scales.repeat_interleave(group, 0)

    def words(rows, order=range(8)):
        """Each row of eight codes as one signed 32-bit integer."""
        packed = []
        for row in rows.tolist():
            value = sum(row[element] << 4 * i for i, element in enumerate(order))
            packed.append(value - 2**32 if value >= 2**31 else value)
        return torch.tensor(packed, dtype=torch.int32)

    along_k = words(codes.t().reshape(-1, 8)).view(n, k // 8).t().contiguous()
    order = torch.randperm(k)
    g_idx = (torch.arange(k) // group).int()
    awq = (0, 2, 4, 6, 1, 3, 5, 7)
    cases = {
        "gptq": (along_k, words(zeros)[:, None], g_idx),
        "gptq_v1": (along_k, words(zeros - 1)[:, None], g_idx),
        "awq": (words(codes, awq)[:, None], words(zeros, awq)[:, None], None),
        "act order": (
            words(codes[order].t().reshape(-1, 8)).view(n, k // 8).t().contiguous(),
            words(zeros)[:, None],
            g_idx[order],
        ),
    }
    for name, (qweight, qzeros, index) in cases.items():
        state = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
        if index is not None:
            state["g_idx"] = index
        layout = "gptq" if name == "act order" else name
        q = lk.QuantTensor.from_state_dict(state, layout=layout)
        want = w[order].t() if name == "act order" else w.t()
        assert q.spec.act_order == (name == "act order")
        for backend in ("reference", "aten"):
            got = lk.ops.dequantize(q, dtype=torch.float32, backend=backend)
            assert torch.equal(got, want), (name, backend)


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_error_of_quantization_is_what_the_format_allows(format):
    w = torch.randn(256, 512)
    q = lk.ops.quantize(w, format, double_quant=False if format in ("nf4", "fp4") else None)
    error = (lk.ops.dequantize(q) - w).abs()
    blocks = w.abs().view(-1, 64).amax(1).repeat_interleave(64).view_as(w)
    rows, spread = w.abs().amax(1, keepdim=True), w.view(-1, 128).amax(1) - w.view(-1, 128).amin(1)
    half_step = {
        "nf4": formats.code_table("nf4").diff().max() / 2 * blocks,
        "fp4": formats.code_table("fp4").sort().values.diff().max() / 2 * blocks,
        "int8": rows / 127 / 2,
    }.get(format)
    if format.startswith("int4"):
        # Half a step, and the zero point and the scale are rounded, too.
        half_step = (spread / 15).repeat_interleave(128).view_as(w)
    if half_step is None:  # fp8: three bits of mantissa
        half_step = torch.maximum(w.abs() / 16, w.abs().max() / 448 * 2.0**-10)
    assert (error <= half_step * (1 + 2.0**-10)).all()


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_chunks_give_the_bytes_of_the_whole(format, monkeypatch):
    w = torch.randn(300, 400)
    whole = lk.ops.quantize(w, format)
    monkeypatch.setattr(encode, "_CHUNK", 2**13)
    assert lk.ops.quantize(w, format).equal(whole)
    strided = torch.randn(400, 300)
    assert lk.ops.quantize(strided.t(), format).equal(lk.ops.quantize(strided.t().clone(), format))


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_extreme_values(format):
    for value in (0.0, 1e-38, 1e-30, 1e36, -1.0):
        w = torch.full((16, 64), value)
        w[1, 1] = -value
        d = lk.ops.dequantize(lk.ops.quantize(w, format))
        assert d.isfinite().all(), value
        assert (d.abs() <= w.abs() * (1 + 2 / 15)).all(), value  # int4 steps are 2 v / 15


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_container(format):
    q = lk.ops.quantize(torch.randn(33, 50).bfloat16(), format)
    assert (q.shape, q.dtype, q.ndim, q.numel()) == ((33, 50), torch.bfloat16, 2, 33 * 50)
    assert from_key(q.spec.key) == q.spec
    for other in (pickle.loads(pickle.dumps(q)), copy.deepcopy(q), q.clone(), q.to("cpu")):
        assert other.equal(q)
    buffer = io.BytesIO()
    torch.save({"q": q}, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True)["q"].equal(q)
    half = q.to(torch.float16)
    assert half.dtype == torch.float16 and half.parts is q.parts and not half.equal(q)
    assert half.dequantize().dtype == torch.float16
    meta = q.to("meta")
    assert meta.device.type == "meta" and [t.shape for t in meta.parts] == [
        p.shape for p in parts_of(q.spec)
    ]
    assert q.nbytes < 33 * 50 * 2 + 2048


def test_bits_per_parameter():
    w = torch.randn(1024, 1024)
    bits = {
        (f, d): 8 * (lk.ops.quantize(w, f, double_quant=d).nbytes) / w.numel()
        for f, d in (("nf4", True), ("nf4", False), ("int8", None), ("fp8", None))
    }
    tables = 8 * (16 * 4 + 256 * 4 + 4) / w.numel()
    assert bits["nf4", True] == 4 + 8 / 64 + 32 / 64 / 256 + tables
    assert bits["nf4", False] == 4 + 32 / 64 + 8 * 64 / w.numel()
    assert bits["int8", None] == bits["fp8", None] == 8 + 32 / 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("absmax"), "'absmax' .* is missing"),
        (lambda p: p.update(absmax=p["absmax"][:-1]), r"'absmax' is uint8 \[25\]"),
        (lambda p: p.update(code=p["code"].double()), "'code' is float64"),
        (lambda p: p.update(extra=p["code"]), "'extra' does not belong"),
        (lambda p: p.update(packed=3), "'packed' .* is a int"),
        (lambda p: p.update(code=p["code"].to("meta")), "several devices"),
    ],
)
def test_inconsistent_parts_are_refused(change, message):
    q = lk.ops.quantize(torch.randn(33, 50))
    parts = q.named_parts()
    change(parts)
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        lk.QuantTensor(q.spec, parts)
    assert "\n" not in str(caught.value)


W = torch.arange(-256.0, 256.0).view(8, 64) / 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((W, "nf5"), "format='nf5'"),
        ((W, "nf4", 48), "block_size=48"),
        ((W, "nf4", 16), "block_size=16"),
        ((W, "nf4", 64.0), "block_size=64.0"),
        ((W, "int8", 64), "int8 has none"),
        ((W, "int8", None, True), "double_quant=True"),
        ((W, "int4", 0), "block_size=0"),
        ((W, "fp8_block", -1), "block_size=-1"),
        ((W.int(),), "dtype torch.int32"),
        ((W.to("meta"),), "meta device"),
        ((W[0], "int8"), r"shape \[64\]"),
        ((W.new_tensor(3.0),), r"shape \[\]"),
        (([[1.0]],), "is a list"),
        ((W.masked_fill(W > 2, float("nan")),), "NaN or infinite"),
        ((W / 0,), "512 NaN or infinite values of 512"),
        ((W.double() * 1e300,), "overflow float32"),
        ((W * 1e37,), "overflow float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_of_quantize(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        lk.ops.quantize(*arguments)
    assert "\n" not in str(caught.value)


def test_the_name_is_in_the_message():
    with pytest.raises(InvalidArgumentError, match=r"tensor 'layers\.3\.q\.weight' has 1 NaN"):
        lk.ops.quantize(torch.tensor([[1.0, float("nan")]]), name="layers.3.q.weight")
