"""What each library kernel covers that `aten` may call on a GPU: data that choice and docs read.

A library that has no entry for a feature covers it. ONCE_MORE are features that only these kernels
tell apart; the others are those of capabilities.FEATURES.
"""

from __future__ import annotations

COLUMNS: dict[str, str] = {
    "flash-attn-3": "`flash-attn-3`",
    "flash-attn-4": "`flash-attn-4`",
    "flash-attn-2": "`flash-attn-2`",
    "cudnn": "`cudnn`",
    "flash": "`flash`",
    "efficient": "`efficient`",
    "flex": "`flex`",
}
TITLES: dict[str, str] = {
    "flash-attn-4": "FlashAttention 4, the package flash_attn.cute",
    "flash-attn-3": "FlashAttention 3, the package flash_attn_interface",
    "flash-attn-2": "FlashAttention 2, the package flash_attn",
    "cudnn": "cuDNN, by torch's operator",
    "flash": "FlashAttention 2, by torch's operator",
    "efficient": "memory-efficient attention, by torch's operator",
    "flex": "FlexAttention, compiled",
}
# Tried in this order, the one made for a GPU first (3 for Hopper, 4 for Blackwell); the others are
# taken by name only.
ORDER = ("flash-attn-3", "flash-attn-4", "cudnn", "flash-attn-2", "flash", "efficient")
# These take packed sequences in one call, the others one by one.
PACKED = ("flash-attn-4", "flash-attn-3", "flash-attn-2", "flash", "flex")

ONCE_MORE: dict[str, str] = {
    "deterministic": "a deterministic backward (the default)",
    "wide_mask": "an additive mask in another dtype than q",
    "ahead": "a window that reaches ahead as far as there are keys, and queries farther",
    "scale": "a scale of 0 or below",
}

_DROPOUT = "a library's dropout cannot be replayed from a seed of ours"
_HALF = "the kernels are for bf16 and fp16"
_NO_MASK = "the kernels read no mask of queries x keys"
_NO_LSE = "the backward takes no gradient of the log-sum-exp"
_EMPTY = "nothing to compute: no kernel is started"
_SCALE = "the maximum is taken before the scale, which has to be above 0"

_FLASH: dict[str, str] = {
    "bool_mask": _NO_MASK,
    "additive_mask": _NO_MASK,
    "masked_causal": _NO_MASK,
    "mask_gradient": _NO_MASK,
    "wide_mask": _NO_MASK,
    "dropout": _DROPOUT,
    "lse_gradient": _NO_LSE,
    "empty": _EMPTY,
    "float64": _HALF,
    "float32": _HALF,
    "scale": _SCALE,
}
_AHEAD = "FlashAttention 2 ignores a right side as long as the keys"

LACKS: dict[str, dict[str, str]] = {
    "flash-attn-4": {
        **{name: why for name, why in _FLASH.items() if name != "lse_gradient"},
        "alibi": "FlashAttention 4 takes ALiBi only as a score function",
    },
    "flash-attn-3": {**_FLASH, "alibi": "FlashAttention 3 has no ALiBi"},
    "flash-attn-2": {**_FLASH, "ahead": _AHEAD},
    "cudnn": {
        **_FLASH,
        "causal_unequal": "torch aligns cuDNN's causal mask top-left, not bottom-right",
        "window": "torch's operator has no window",
        "ahead": "torch's operator has no window",
        "softcap": "torch's operator has no softcap",
        "alibi": "torch's operator has no ALiBi",
        "deterministic": "torch holds cuDNN's attention to be not deterministic",
    },
    "flash": {
        **_FLASH,
        "softcap": "torch's operator has no softcap",
        "alibi": "torch's operator has no ALiBi in its backward",
        "ahead": _AHEAD,
    },
    "efficient": {
        "window": "the kernel's window ends at the query's own key",
        "ahead": "the kernel's window ends at the query's own key",
        "softcap": "torch's operator has no softcap",
        "alibi": "it would need a bias of queries x keys",
        "mask_gradient": "it would be written as large as queries x keys",
        "wide_mask": "the kernel reads a bias in the dtype of q",
        "dropout": _DROPOUT,
        "lse_gradient": _NO_LSE,
        "empty": _EMPTY,
        "float64": "the kernels are for fp32, bf16 and fp16",
        "scale": _SCALE,
    },
    "flex": {
        "mask_gradient": "gradients of a captured mask are added by atomics",
        "dropout": _DROPOUT,
        "empty": _EMPTY,
        "float64": "the compiled kernels are for fp32, bf16 and fp16",
    },
}


def answer(library: str, feature: str) -> bool | str:
    """True, or why not."""
    return LACKS[library].get(feature, True)


def lacking(library: str, features: frozenset[str]) -> str:
    """Why `library` cannot do a problem with these features; empty when it can."""
    return "; ".join(dict.fromkeys(why for name, why in LACKS[library].items() if name in features))


def markdown(features: dict[str, str]) -> str:
    """The second table of docs/attention.md."""
    rows = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, text in {**features, **ONCE_MORE}.items():
        cells = (answer(library, name) for library in COLUMNS)
        shown = " | ".join("yes" if cell is True else f"no: {cell}" for cell in cells)
        rows.append(f"| {text} | {shown} |")
    return "\n".join(rows) + "\n"
