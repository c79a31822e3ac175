"""lora_linear through the emulated GPU kernels: what a host entry does, in Python on ctypes.

Outputs lie in buffers with a canary behind them; inputs are registered with the emulator, so that
an asynchronous copy from anywhere else is an error.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import emulator_library as library
import torch
from torch import Tensor

from lora_kernels.ops._philox import keep_scale, threshold
from lora_kernels.testing import LoraLinearInputs, LoraLinearResults

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LARGE, SMALL = 163 << 10, 99 << 10  # shared memory per block: sm_80; sm_86, sm_89, sm_120
CANARY = 64  # elements behind every output


class EmulatorError(RuntimeError):
    """The emulator stopped a kernel, or a launcher refused its arguments."""


def rank_columns(ranks: list[int], padded: bool) -> list[int]:
    """First column of each member, then the total."""
    columns = [0]
    for rank in ranks:
        columns.append(columns[-1] + (-(-rank // 8) * 8 if padded else rank))
    return columns


@dataclass
class Emulator:
    """Runs single launchers; one instance per problem, since it keeps the tensors alive."""

    dll: ctypes.CDLL
    dtype: torch.dtype
    seed: int = 0
    fault: int = 0
    sm_count: int = 2
    splits: int = 0
    tile: int | None = None
    shared_limit: int = LARGE
    held: list[Tensor] = field(default_factory=list)
    outputs: list[tuple[Tensor, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dll.lk_clear_memory()
        self.dll.lk_options(self.seed, self.fault, self.shared_limit)

    def given(self, t: Tensor) -> int:
        """Address of an input."""
        self.held.append(t)
        span = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1
        if t.numel() > 0:
            self.dll.lk_register_memory(t.data_ptr(), span * t.element_size())
        return t.data_ptr()

    def output(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        count = torch.Size(shape).numel()
        buffer = torch.full((count + CANARY,), float("nan"), dtype=dtype or self.dtype)
        self.outputs.append((buffer, count))
        view = buffer[:count].view(shape)
        self.given(view)
        return view

    def run(self, name: str, params: ctypes.Structure) -> None:
        address = ctypes.addressof(params)
        if name in ("shrink", "dy_pass", "da"):
            size = getattr(self.dll, f"lk_workspace_{name}")(address)
            params.workspace = self.output(size // 4, dtype=torch.float32).data_ptr()
        reason = getattr(self.dll, f"lk_check_{name}")(address)
        if reason is not None:
            raise EmulatorError(f"{name}: {reason.decode()}")
        if name == "gemm_sm80" and self.tile is not None:
            status = self.dll.lk_gemm_sm80_tile(address, self.tile)
        else:
            status = getattr(self.dll, f"lk_{name}")(address)
        if status != 0:
            raise EmulatorError(f"{name}: {self.dll.lk_error().decode()}")
        for buffer, count in self.outputs:
            if not buffer[count:].isnan().all():
                raise EmulatorError(f"{name}: wrote past the end of an output")

    def dropout(self, p: float, seed: int | None, on_device: bool) -> ctypes.Structure:
        if p == 0.0 or seed is None:
            return library.Dropout()
        if not on_device:
            return library.Dropout(threshold(p), (seed & 0xFFFFFFFF, seed >> 32), None)
        return library.Dropout(threshold(p), (0, 0), self.given(torch.tensor([seed])))

    def pad(self, tensors: list[Tensor]) -> list[Tensor]:
        """Copies in the dtype of the kernels with rows of a multiple of 16 bytes."""
        params = library.PadParams(dtype=DTYPES[self.dtype], jobs=len(tensors))
        results = []
        for job, t in zip(params.job, tensors, strict=False):
            padded = self.output(t.shape[0], -(-t.shape[1] // 8) * 8)
            results.append(padded[:, : t.shape[1]])
            job.src, job.src_dtype = self.given(t), DTYPES[t.dtype]
            job.ld_src, job.col_stride = t.stride()
            job.rows, job.cols = t.shape
            job.dst, job.ld_dst, job.dst_cols = padded.data_ptr(), *[padded.shape[1]] * 2
            job.scale = 1.0
        self.run("pad", params)
        return results


def emulate(
    dll: ctypes.CDLL,
    inputs: LoraLinearInputs,
    *,
    seed: int = 0,
    fault: int = 0,
    pad: bool = True,
    splits: int = 0,
    tile: int | None = None,
    seed_on_device: bool = False,
    needs: str = "xab",
    shared_limit: int = LARGE,
) -> LoraLinearResults:
    """Forward and backward (without dW and dbias, which no kernel computes).

    Args:
        seed: of the emulator's scheduler.
        fault: one of csrc/common/emulator/faults.h, 0 for none.
        pad: copy the adapters into aligned buffers first; without it kernels take them as they
            are, which needs the dtype of x.
        splits: of the long sums; 0 lets the launcher choose.
        shared_limit: bytes of shared memory per block of the device.
        needs: gradients to compute, out of x, a and b; the others are empty.
        tile: variant of the GEMM (gemm_sm80_tiles.h); None lets the launcher choose.
    """
    i = inputs
    x = i.x.flatten(0, -2)
    dys = [dy.flatten(0, -2) for dy in i.dys]
    e = Emulator(
        dll, x.dtype, seed=seed, fault=fault, splits=splits, tile=tile, shared_limit=shared_limit
    )
    ranks = [a.shape[0] for a in i.lora_as]
    dense, padded = rank_columns(ranks, False), rank_columns(ranks, True)
    if pad:
        low = e.pad([*i.lora_as, *i.lora_bs])
    else:
        low = [*i.lora_as, *i.lora_bs]
        for t in low:
            e.given(t)
    low_as, low_bs = low[: len(ranks)], low[len(ranks) :]
    drop = e.dropout(i.dropout_p, i.seed, seed_on_device)
    rescale = keep_scale(i.dropout_p) if drop.threshold else 1.0
    s, scaled_s = shrink(e, i, x, low_as, dense, padded, drop, rescale)
    ys = forward(e, i, x, scaled_s, low_bs, padded)
    s_in = e.pad([s[:, c : c + r] for c, r in zip(dense, ranks, strict=False)]) if pad else None
    ds, dbs = dy_pass(e, i, dys, low_bs, s, s_in, dense, padded, rescale, needs)
    das = da(e, i, x, ds, padded, drop) if "a" in needs else []
    dx = x.new_empty(0)
    if "x" in needs:
        dx = dgrad(e, i, dys, ds, low_as, padded, drop).view(i.x.shape)
    return LoraLinearResults(
        ys=[y.view(*i.x.shape[:-1], y.shape[-1]) for y in ys],
        dx=dx,
        dws=[],
        das=das,
        dbs=dbs,
        dbiases=[],
    )


def _base(e: Emulator, kind: type[ctypes.Structure], **fields: object) -> ctypes.Structure:
    return kind(dtype=DTYPES[e.dtype], sm_count=e.sm_count, **fields)


def shrink(
    e: Emulator, i: LoraLinearInputs, x: Tensor, low_as: list[Tensor], dense: list[int],
    padded: list[int], drop: ctypes.Structure, rescale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(S [M, sum of ranks], scaling * S [M, sum of padded ranks])."""
    m, k = x.shape
    s, scaled_s = e.output(m, dense[-1]), e.output(m, padded[-1])
    p = _base(
        e, library.ShrinkParams, x=e.given(x), ldx=x.stride(0), m=m, k=k, members=len(low_as),
        s=s.data_ptr(), lds=dense[-1], scaled_s=scaled_s.data_ptr(), ld_scaled=padded[-1],
        keep_scale=rescale, dropout=drop, splits=e.splits,
    )  # fmt: skip
    for g, a in enumerate(low_as):
        p.member[g] = library.ShrinkMember(
            a.data_ptr(), a.stride(0), a.shape[0], dense[g], padded[g], i.scalings[g]
        )
    e.run("shrink", p)
    return s, scaled_s


def _term(a: Tensor, b: Tensor, k: int, stream: int = -1) -> ctypes.Structure:
    return library.GemmTerm(a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0), k, stream)


def forward(
    e: Emulator, i: LoraLinearInputs, x: Tensor, scaled_s: Tensor, low_bs: list[Tensor],
    padded: list[int],
) -> list[Tensor]:  # fmt: skip
    p = _base(e, library.GemmParams, layout=0, m=x.shape[0], problems=len(i.weights))
    ys = []
    for g, (w, b, bias) in enumerate(zip(i.weights, low_bs, i.biases, strict=True)):
        e.given(w)
        ys.append(e.output(x.shape[0], w.shape[0]))
        p.problem[g] = library.GemmProblem(
            w.shape[0], ys[-1].data_ptr(), w.shape[0], None if bias is None else e.given(bias),
            0 if bias is None else DTYPES[bias.dtype], 2 * g, 2,
        )  # fmt: skip
        p.term[2 * g] = _term(scaled_s[:, padded[g] :], b, b.shape[1])
        p.term[2 * g + 1] = _term(x, w, x.shape[1])
    e.run("gemm_sm80", p)
    return ys


def dy_pass(
    e: Emulator, i: LoraLinearInputs, dys: list[Tensor], low_bs: list[Tensor], s: Tensor,
    s_padded: list[Tensor] | None, dense: list[int], padded: list[int], rescale: float, needs: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """(dS [M, sum of padded ranks], dBs)."""
    m = s.shape[0]
    ds = e.output(m, padded[-1]) if "x" in needs or "a" in needs else None
    dbs = [e.output(*b.shape, dtype=b.dtype) for b in i.lora_bs] if "b" in needs else []
    p = _base(
        e, library.DyPassParams, m=m, members=len(dys), 
        ds=None if ds is None else ds.data_ptr(), ldds=padded[-1], keep_scale=rescale,
        splits=e.splits,
    )  # fmt: skip
    for g, (dy, b) in enumerate(zip(dys, low_bs, strict=True)):
        part = s[:, dense[g] : dense[g + 1]] if s_padded is None else s_padded[g]
        p.member[g] = library.DyMember(
            e.given(dy), dy.stride(0), b.data_ptr(), b.stride(0), part.data_ptr(), part.stride(0),
            dy.shape[1], b.shape[1], padded[g], i.scalings[g],
        )  # fmt: skip
        if dbs:
            p.member[g].db, p.member[g].lddb = dbs[g].data_ptr(), dbs[g].stride(0)
            p.member[g].db_dtype = DTYPES[dbs[g].dtype]
    e.run("dy_pass", p)
    return (s.new_empty(0) if ds is None else ds), dbs


def da(
    e: Emulator, i: LoraLinearInputs, x: Tensor, ds: Tensor, padded: list[int],
    drop: ctypes.Structure,
) -> list[Tensor]:  # fmt: skip
    das = [e.output(*a.shape, dtype=a.dtype) for a in i.lora_as]
    p = _base(
        e, library.DaParams, x=x.data_ptr(), ldx=x.stride(0), ds=ds.data_ptr(), ldds=ds.stride(0),
        m=x.shape[0], k=x.shape[1], members=len(das), dropout=drop, splits=e.splits,
    )  # fmt: skip
    for g, out in enumerate(das):
        p.member[g] = library.DaMember(
            out.shape[0], padded[g], out.data_ptr(), out.stride(0), DTYPES[out.dtype]
        )
    e.run("da", p)
    return das


def dgrad(
    e: Emulator, i: LoraLinearInputs, dys: list[Tensor], ds: Tensor, low_as: list[Tensor],
    padded: list[int], drop: ctypes.Structure,
) -> Tensor:  # fmt: skip
    m, k, n = ds.shape[0], low_as[0].shape[1], len(dys)
    dx = e.output(m, k)
    p = _base(e, library.GemmParams, layout=1, m=m, problems=1, dropout=drop)
    p.problem[0] = library.GemmProblem(k, dx.data_ptr(), k, None, 0, 0, 2 * n)
    for g, (dy, a, w) in enumerate(zip(dys, low_as, i.weights, strict=True)):
        p.term[g] = _term(ds[:, padded[g] :], a, a.shape[0], stream=g)
        p.term[n + g] = _term(dy, w, w.shape[0])
    e.run("gemm_sm80", p)
    return dx
