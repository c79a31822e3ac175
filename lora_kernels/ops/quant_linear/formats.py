"""The quantized formats as data: code tables, packed layouts, shapes of the parts. Torch only.

A quantized weight is a :class:`QuantSpec` and a tuple of tensors, its parts, whose names, order,
dtypes and shapes :func:`parts_of` derives from the spec. Every backend reads this file and nothing
else to know what a byte means. W is [N, K] = [out_features, in_features], n = N K; all arithmetic
of dequantization is fp32, every product rounded (no fused multiply-add), with one last rounding
to the dtype that is asked for.

flat        nf4, fp4 (bitsandbytes 4-bit). Blocks of `block_size` run over the row-major flattened
            tensor and straddle rows when K is not a multiple. Element 2i is the HIGH nibble of
            byte i; an odd tail is padded with the code of zero.
                W[e] = code[nibble(e)] * absmax[e // block_size]
            Nested statistics (double quantization): absmax is uint8 and
                absmax[b] = nested_code[absmax_u8[b]] * nested_absmax[b // nested] + offset
            To quantize: x * (1 / max(absmax, MIN_ABSMAX)), in a last, partial block x / max(...),
            and the nearest code; ties go to the lower value.
int8        row-wise (bitsandbytes Linear8bitLt).   W[n, k] = (packed[n, k] * scale[n]) * (1/127)
gptq        int4, eight consecutive k of a column n in one int32, lowest bits first.
                W[n, k] = (q[k, n] - zero[g_idx[k], n]) * scales[g_idx[k], n]
            zeros are packed along n; `gptq_v1` stores zero - 1 (of the first checkpoint version).
awq         int4, eight consecutive n of a row k in one int32: bits 4i hold column 8c+AWQ_ORDER[i].
                W[n, k] = (q[k, n] - zero[k // block_size, n]) * scales[k // block_size, n]
fp8_*       float8_e4m3fn.                          W[n, k] = packed[n, k] * scale[...]
            one scale (fp8_tensor), one per n (fp8_row), or per block_size x block_size (fp8_block).

Sources: bitsandbytes (QuantState, create_dynamic_map; Dettmers et al. 2023, arXiv 2305.14314),
AutoGPTQ and GPTQModel (Frantar et al. 2022, arXiv 2210.17323), AutoAWQ (Lin et al. 2023,
arXiv 2306.00978), the e4m3fn format of Micikevicius et al. 2022 (arXiv 2209.05433).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Twelfths; code 8 is -0.0. Neither OCP E2M1 nor monotone in the nibble.
FP4_CODE = tuple(s * m / 12 for s in (1.0, -1.0) for m in (0.0, 0.0625, 8, 12, 4, 6, 2, 3))

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # of the flat layout
NESTED_BLOCK = 256
INT8_RECIPROCAL = 7.874015718698502e-3  # bitsandbytes' 1/127, to be rounded to fp32
FP8_MAX = 448.0
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PER_INT32 = 8  # int4 codes in one int32
# Blocks with a smaller maximum are coded as if it were this large (bitsandbytes does so, too).
MIN_ABSMAX = 1e-38
MAX_VALUE = 2.0**120  # 127 times this, and sums of 256 of these, are finite in fp32

FLAT, INT8_ROW = "flat", "int8_row"
GPTQ, GPTQ_V1, AWQ = "gptq", "gptq_v1", "awq"
FP8_TENSOR, FP8_ROW, FP8_BLOCK = "fp8_tensor", "fp8_row", "fp8_block"
FORMATS: dict[str, tuple[str, ...]] = {
    "nf4": (FLAT,),
    "fp4": (FLAT,),
    "int8": (INT8_ROW,),
    "int4": (GPTQ, GPTQ_V1, AWQ),
    "fp8": (FP8_TENSOR, FP8_ROW, FP8_BLOCK),
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SCALES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Part:
    """One tensor of a quantized weight: contiguous, of one of `dtypes`, exactly of `shape`."""

    name: str
    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class QuantSpec:
    """All that is not a tensor.

    `format` and `layout` as in :data:`FORMATS`; `shape` of W; `dtype` that dequantization gives
    unless another is asked for; `block_size` elements per scale (flat: of the flattened tensor;
    gptq, awq: along k; fp8_block: the side of a square; otherwise K). `nested_block_size` > 0:
    nested statistics. `act_order` (gptq): g_idx is not simply k // block_size. `storage`: dtype
    under which the packed bytes go to a checkpoint (bitsandbytes' quant_storage).
    """

    format: str
    layout: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    block_size: int = 64
    nested_block_size: int = 0
    act_order: bool = False
    storage: torch.dtype = torch.uint8
    # One line of text that from_key turns back; what the registered ops carry.
    key: str = field(init=False, repr=False, compare=False)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """N; leading axes of a tensor of more than two count as rows."""
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """K."""
        return self.shape[-1] if self.shape else 1

    @property
    def blocks(self) -> int:
        """Scales of the flat layout."""
        return -(-self.numel // self.block_size)

    @property
    def groups(self) -> int:
        """Groups along k of gptq and awq."""
        return -(-self.columns // self.block_size)

    def with_dtype(self, dtype: torch.dtype) -> QuantSpec:
        return replace(self, dtype=dtype)

    def __post_init__(self) -> None:
        shape = "x".join(map(str, self.shape))
        fields = (
            self.format, self.layout, shape, _name(self.dtype), self.block_size,
            self.nested_block_size, int(self.act_order), _name(self.storage),
        )  # fmt: skip
        object.__setattr__(self, "key", "/".join(map(str, fields)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.lru_cache(maxsize=4096)
def from_key(key: str) -> QuantSpec:
    """The spec whose :attr:`QuantSpec.key` this is."""
    fmt, layout, shape, dtype, block, nested, act_order, storage = key.split("/")
    return QuantSpec(
        fmt, layout, tuple(int(n) for n in shape.split("x") if n), getattr(torch, dtype),
        int(block), int(nested), act_order == "1", getattr(torch, storage),
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def parts_of(spec: QuantSpec) -> tuple[Part, ...]:
    """Names, dtypes and shapes of the tensors of a weight, in the order that every op takes.

    flat            packed u8 [ceil(n/2)], absmax f32 or (nested) u8 [blocks], code f32 [16]
    flat, nested    ... then nested_absmax f32 [ceil(blocks/nested)], nested_code f32 [256],
                    offset f32 []
    int8_row        packed i8 [N, K], scale f32 [N]
    gptq, gptq_v1   qweight i32 [ceil(K/8), N], qzeros i32 [G, ceil(N/8)], scales [G, N],
                    g_idx i32 [K]
    awq             qweight i32 [K, ceil(N/8)], qzeros i32 [G, ceil(N/8)], scales [G, N]
    fp8_tensor, fp8_row, fp8_block
                    packed f8e4m3fn [N, K], scale f32 [] | [N] | [ceil(N/b), ceil(K/b)]
    """
    n, k, g = spec.rows, spec.columns, spec.groups
    f32, i32 = (torch.float32,), (torch.int32,)
    packed_n = -(-n // PER_INT32)
    if spec.layout == FLAT:
        nested = spec.nested_block_size
        parts = [
            Part("packed", (torch.uint8,), (-(-spec.numel // 2),)),
            Part("absmax", (torch.uint8,) if nested else f32, (spec.blocks,)),
            Part("code", f32, (16,)),
        ]
        if nested:
            parts += [
                Part("nested_absmax", f32, (-(-spec.blocks // nested),)),
                Part("nested_code", f32, (256,)),
                Part("offset", f32, ()),
            ]
        return tuple(parts)
    if spec.layout == INT8_ROW:
        return Part("packed", (torch.int8,), (n, k)), Part("scale", f32, (n,))
    if spec.layout == AWQ:
        return (
            Part("qweight", i32, (k, packed_n)),
            Part("qzeros", i32, (g, packed_n)),
            Part("scales", _SCALES, (g, n)),
        )
    if spec.layout in (GPTQ, GPTQ_V1):
        return (
            Part("qweight", i32, (-(-k // PER_INT32), n)),
            Part("qzeros", i32, (g, packed_n)),
            Part("scales", _SCALES, (g, n)),
            Part("g_idx", i32, (k,)),
        )
    b = spec.block_size
    scale = {FP8_TENSOR: (), FP8_ROW: (n,), FP8_BLOCK: (-(-n // b), -(-k // b))}[spec.layout]
    return Part("packed", (torch.float8_e4m3fn,), (n, k)), Part("scale", f32, scale)


@functools.cache
def code_table(fmt: str) -> Tensor:
    """The 16 values of nf4 or fp4, fp32 on the CPU. Not to be written to."""
    return torch.tensor(NF4_CODE if fmt == "nf4" else FP4_CODE, dtype=torch.float32, device="cpu")


@functools.cache
def dynamic_map() -> Tensor:
    """The 256 values of the nested statistics, sorted, fp32 on the CPU. Not to be written to.

    Seven decades; decade i is cut into 2**i equal steps of [0.1, 1], whose middles are the values,
    of both signs; then 0 and 1 (Dettmers et al. 2021, arXiv 2110.02861, dynamic tree datatype).
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        middles = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


def default_storage(layout: str) -> torch.dtype:
    """What the first part of a layout is stored as."""
    if layout == INT8_ROW:
        return torch.int8
    if layout in (GPTQ, GPTQ_V1, AWQ):
        return torch.int32
    return torch.uint8 if layout == FLAT else torch.float8_e4m3fn
