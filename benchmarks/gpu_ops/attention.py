"""attention: against SDPA's flash, cuDNN and efficient kernels, FlexAttention and flash-attn, and
`aten` with each library's kernel that it may call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_ops.attention_decode import (
    DecodeInputs,
    decode_inputs,
    decode_problem,
    decode_work,
)
from benchmarks.gpu_ops.attention_libraries import (
    NOT_DETERMINISTIC,
    PROVIDERS,
    LibraryWork,
    library_of,
    need,
    taking,
)
from benchmarks.gpu_ops.row import GpuOp, Judge, Keywords, Work
from benchmarks.peers import UnavailableError, load
from lora_kernels.ops import _registry, attention
from lora_kernels.testing import (
    AttentionInputs,
    BudgetExceededError,
    assert_within_budget,
    attention_inputs,
)
from lora_kernels.testing.attention import GRADIENT_FACTOR, results, yardstick
from lora_kernels.testing.budget import FACTOR

BF16, FP16 = torch.bfloat16, torch.float16
SDPA = {
    "sdpa-flash": "FLASH_ATTENTION", "sdpa-cudnn": "CUDNN_ATTENTION",
    "sdpa-efficient": "EFFICIENT_ATTENTION",
}  # fmt: skip
Peer = Callable[[AttentionInputs, dict[str, Tensor]], Tensor]


def _inputs(**keywords: Any) -> AttentionInputs | DecodeInputs:
    return decode_inputs(**keywords) if "cache" in keywords else attention_inputs(**keywords)


def _judge(i: AttentionInputs | DecodeInputs) -> Judge:
    if isinstance(i, DecodeInputs):
        oracle, low = (i.results(dtype) for dtype in (torch.float64, i.q.dtype))
    else:
        oracle = results(i, torch.float64)
        low = yardstick(i, oracle)
    nothing = oracle["lse"] == -torch.inf

    def check(got: dict[str, Tensor], label: str) -> object:
        if "lse" in got and not torch.equal(got["lse"] == -torch.inf, nothing):
            raise BudgetExceededError(f"{label}: lse is -inf for rows that see a key")
        margins = []
        for name, t in got.items():
            parts = [t, oracle[name], low[name]]
            if name == "lse":
                parts = [p.masked_fill(nothing, 0.0) for p in parts]
            factor = GRADIENT_FACTOR if name.startswith("d") else FACTOR
            margins.append(assert_within_budget(*parts, f"{label}: {name}", factor))
        return margins

    return check


def _work(i: AttentionInputs | DecodeInputs, provider: str) -> Work:
    library = library_of(provider)
    if library is not None:
        device = str(i.q.device.type)
        need(library, _registry.find("attention").problem(**_asked(i, library), device=device))
    if isinstance(i, DecodeInputs):
        return decode_work(i, provider, ROW.peers)
    leaves = {n: t.detach().requires_grad_() for n, t in i.leaves().items()}
    generator = torch.Generator().manual_seed(1)
    shape = (*i.q.shape[:-1], i.v.shape[-1])
    dout = torch.randn(shape, generator=generator, dtype=torch.float64).to(i.q)
    if library is not None:
        options = {**i.options, "deterministic": library not in NOT_DETERMINISTIC}

        def by_library() -> dict[str, Tensor]:
            with taking(library):
                made = attention(
                    **leaves, **i.constants(), **options, return_lse=True, backend="aten"
                )
            return dict(zip(("out", "lse"), made, strict=True))

        return LibraryWork(by_library, leaves, {"out": dout}, library)
    peer = _peer(i, provider)

    def forward() -> dict[str, Tensor]:
        if peer is not None:
            return {"out": peer(i, leaves)}
        out, lse = attention(
            **leaves, **i.constants(), **i.options, return_lse=True, backend=provider
        )
        return {"out": out, "lse": lse}

    return Work(forward, leaves, {"out": dout})


def _peer(i: AttentionInputs, provider: str) -> Peer | None:
    """None for a backend of the op; raises where the peer does not do what is asked."""
    if provider not in ROW.peers:
        return None
    plain = set(i.options) <= {"causal"}
    sizes = i.q.shape[-3] == i.k.shape[-3]
    if i.sinks is not None or i.attn_mask is not None or i.alibi_slopes is not None:
        raise UnavailableError(f"{provider} is called here without sinks, mask and ALiBi")
    if provider.startswith("flash-attn"):
        if set(i.options) - {"causal", "window", "softcap"} or i.cu_seqlens is not None:
            raise UnavailableError("flash-attn is called here for dense batches without dropout")
        return _flash_attn(load("flash_attn", "flash_attn_func"))
    if i.cu_seqlens is not None or not (plain or set(i.options) <= {"causal", "window", "softcap"}):
        raise UnavailableError(f"{provider} is called here for dense batches")
    if provider == "flex":
        return _flex(i)
    if not plain or not sizes:
        raise UnavailableError("SDPA has no window, softcap or bottom-right causal mask")
    return _sdpa(provider)


def _sdpa(provider: str) -> Peer:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernel = getattr(SDPBackend, SDPA[provider])

    def run(i: AttentionInputs, leaves: dict[str, Tensor]) -> Tensor:
        q, k, v = (leaves[n].transpose(1, 2) for n in "qkv")
        with sdpa_kernel(kernel):
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=i.options.get("causal", False), enable_gqa=True
            )
        return out.transpose(1, 2)

    return run


def _flex(i: AttentionInputs) -> Peer:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    o, compiled = i.options, torch.compile(flex_attention)
    (rows, keys), left = (i.q.shape[1], i.k.shape[1]), o.get("window", (-1, -1))[0]
    right = 0 if o.get("causal") else o.get("window", (-1, -1))[1]

    def seen(b: Any, h: Any, row: Any, key: Any) -> Any:
        at = row + (keys - rows)
        inside = key >= 0
        if left >= 0:
            inside = inside & (key >= at - left)
        return inside & (key <= at + right) if right >= 0 else inside

    def capped(score: Any, b: Any, h: Any, row: Any, key: Any) -> Any:
        return o["softcap"] * torch.tanh(score / o["softcap"])

    mask = create_block_mask(seen, None, None, rows, keys, device=str(i.q.device))
    change = capped if o.get("softcap") else None

    def run(i: AttentionInputs, leaves: dict[str, Tensor]) -> Tensor:
        q, k, v = (leaves[n].transpose(1, 2) for n in "qkv")
        out = compiled(q, k, v, score_mod=change, block_mask=mask, enable_gqa=True)
        return out.transpose(1, 2)

    return run


def _flash_attn(function: Any) -> Peer:
    def run(i: AttentionInputs, leaves: dict[str, Tensor]) -> Tensor:
        o = i.options
        return function(
            leaves["q"], leaves["k"], leaves["v"], causal=o.get("causal", False),
            window_size=o.get("window", (-1, -1)), softcap=o.get("softcap", 0.0),
            deterministic=True,
        )  # fmt: skip

    return run


def _problem(i: AttentionInputs | DecodeInputs) -> Keywords:
    """As the op sees it: of packed sequences their number and all rows, since their lengths are
    on the device."""
    if isinstance(i, DecodeInputs):
        return decode_problem(i)
    o, packed, mask = i.options, i.cu_seqlens is not None, i.attn_mask
    B = i.q.shape[0] if i.cu_seqlens is None else len(i.cu_seqlens) - 1
    return {
        "B": B, "S": i.q.shape[-3], "H": i.q.shape[-2], "D": i.q.shape[-1], "Sk": i.k.shape[-3],
        "Hk": i.k.shape[-2],
        "Dv": i.v.shape[-1], "causal": bool(o.get("causal")), "window": o.get("window"),
        "softcap": o.get("softcap"), "sinks": i.sinks is not None,
        "mask": "" if mask is None else "bool" if mask.dtype == torch.bool else "additive",
        "alibi": i.alibi_slopes is not None, "varlen": packed,
        "dropout_p": float(o.get("dropout_p", 0.0)),
        "mask_gradient": mask is not None and mask.is_floating_point(), "dtype": i.q.dtype,
    }  # fmt: skip


def _asked(i: AttentionInputs | DecodeInputs, library: str) -> Keywords:
    return {**_problem(i), "deterministic": library not in NOT_DETERMINISTIC}


def _counted(i: AttentionInputs | DecodeInputs) -> tuple[Keywords, ...]:
    """Packed sequences one by one, whose flops and bytes are those of the whole."""
    whole = _problem(i)
    if isinstance(i, DecodeInputs) or i.cu_seqlens is None:
        return (whole,)
    ends = i.cu_seqlens.cpu()
    ends_k = ends if i.cu_seqlens_k is None else i.cu_seqlens_k.cpu()
    lengths = zip(ends.diff().tolist(), ends_k.diff().tolist(), strict=True)
    return tuple({**whole, "B": 1, "S": S, "Sk": Sk} for S, Sk in lengths if S and Sk)


def _gate(keywords: Keywords) -> Keywords:
    """One sequence of 512 and as many heads as show the grouping: the oracle has every score."""
    H, Hk = keywords["H"], keywords.get("Hk", keywords["H"])
    if "cache" in keywords:
        most = [min(n, 700) for n in keywords["lengths"][:2]]
        return {**keywords, "lengths": (*most, 333), "H": 2 * H // Hk, "Hk": 2, "capacity": 0}
    made = {**keywords, "B": 1, "H": 2 * H // Hk, "Hk": 2}
    if "lengths" in made:
        return {**made, "lengths": (300, 1, 211)}
    rows = min(keywords["S"], 512)
    window = keywords.get("window")
    made |= {"S": rows, "Sk": rows if "Sk" not in keywords else 1024}
    return made if window is None else {**made, "window": (min(window[0], 200), window[1])}


LLAMA: dict[str, Any] = {"H": 32, "Hk": 8, "D": 128, "dtype": BF16}
PACKED = (1900, 700, 2400, 300, 1100, 1792)
ROW = GpuOp(
    name="attention",
    small=(
        {"B": 2, "S": 33, "H": 4, "Hk": 2, "D": 64, "causal": True, "dtype": BF16},
        {"B": 1, "S": 70, "Sk": 45, "H": 3, "D": 40, "Dv": 24, "dtype": FP16},
        {"H": 4, "Hk": 1, "D": 72, "lengths": (1, 37, 0, 26), "causal": True, "dtype": BF16},
        {"S": 65, "D": 16, "causal": True, "window": (9, 0), "softcap": 5.0, "sinks": True,
         "dtype": BF16},
        {"S": 21, "D": 32, "mask": "bool", "dropout_p": 0.2, "seed": 5, "dtype": FP16},
        {"B": 1, "S": 1, "Sk": 77, "H": 8, "Hk": 2, "D": 128, "dtype": BF16},
        {"H": 4, "Hk": 2, "D": 128, "lengths": (70, 1, 58), "causal": True, "window": (33, 0),
         "sinks": True, "dtype": BF16},
        {"H": 4, "D": 64, "lengths": (65, 40), "causal": True, "softcap": 5.0, "alibi": True,
         "dropout_p": 0.2, "seed": 5, "dtype": BF16},
        {"cache": "paged", "lengths": (37, 1, 300), "H": 8, "Hk": 2, "D": 128, "dtype": BF16},
        {"cache": "contiguous", "lengths": (90, 0), "capacity": 130, "H": 3, "D": 72, "S": 2,
         "window": (40, 0), "softcap": 5.0, "dtype": FP16},
        {"cache": "contiguous", "lengths": (900,), "H": 8, "Hk": 2, "D": 64, "dtype": BF16},
    ),
    cases={
        "4×2048 causal, 32/8 heads of 128 bfloat16": {
            "B": 4, "S": 2048, "causal": True, **LLAMA,
        },
        "1×8192 causal, 32/8 heads of 128 bfloat16": {
            "B": 1, "S": 8192, "causal": True, **LLAMA,
        },
        "8192 packed causal, 32/8 heads of 128 bfloat16": {
            "lengths": PACKED, "causal": True, **LLAMA,
        },
        "4×2048 causal, 32/32 heads of 64 bfloat16": {
            "B": 4, "S": 2048, "causal": True, "H": 32, "Hk": 32, "D": 64, "dtype": BF16,
        },
        "1×8192 window 1024, 32/8 heads of 128 bfloat16": {
            "B": 1, "S": 8192, "causal": True, "window": (1023, 0), **LLAMA,
        },
        "1×8192 sinks window 128, 64/8 heads of 64 bfloat16": {
            "B": 1, "S": 8192, "causal": True, "window": (127, 0), "sinks": True, "H": 64,
            "Hk": 8, "D": 64, "dtype": BF16,
        },
        "16×1 of 4096 keys, 32/8 heads of 128 bfloat16": {
            "B": 16, "S": 1, "Sk": 4096, "causal": True, **LLAMA,
        },
        "decode 1×1 of a cache of 4096, 32/8 heads of 128 bfloat16": {
            "cache": "contiguous", "lengths": (4000,), "capacity": 4096, **LLAMA,
        },
        "decode 16×1 of pages for 4096, 32/8 heads of 128 bfloat16": {
            "cache": "paged", "lengths": (4000, 1000, 2500, 333) * 4, "capacity": 4096, **LLAMA,
        },
        "2×4096 softcap, 8/4 heads of 256 bfloat16": {
            "B": 2, "S": 4096, "causal": True, "softcap": 50.0, "H": 8, "Hk": 4, "D": 256,
            "dtype": BF16,
        },
    },
    inputs=_inputs,
    judge=_judge,
    work=_work,
    problem=_problem,
    counted=_counted,
    peers=(*SDPA, "flex", "flash-attn", *PROVIDERS),
    gate=_gate,
)  # fmt: skip
