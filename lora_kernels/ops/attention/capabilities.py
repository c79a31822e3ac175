"""What each way of computing attention covers, as one table; docs/attention.md is made from it.

A column is a backend, or for `aten` one of its three paths; the kernels of libraries that it calls
on a GPU have a table of their own (libraries/table.py). An entry is True, or the reason for no,
which predicates, `explain` and error messages quote.
"""

from __future__ import annotations

FEATURES: dict[str, str] = {
    "causal": "causal, as many queries as keys",
    "causal_unequal": "causal, another number of queries than keys (aligned bottom-right)",
    "gqa": "grouped and multi-query heads",
    "value_dim": "value heads of another size than query heads",
    "varlen": "packed sequences (`cu_seqlens`)",
    "window": "sliding window",
    "softcap": "softcap",
    "sinks": "attention sinks, with gradient",
    "alibi": "ALiBi",
    "bool_mask": "boolean mask",
    "additive_mask": "additive mask",
    "masked_causal": "a mask together with causal",
    "mask_gradient": "gradient of an additive mask",
    "dropout": "dropout (counter based)",
    "lse_gradient": "gradient through the returned log-sum-exp",
    "empty": "no queries or no keys",
    "head_dim": "head sizes other than 64 and 128",
    "float64": "fp64",
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
}

COLUMNS: dict[str, str] = {
    "reference": "`reference`",
    "sdpa": "`aten`, SDPA path",
    "bands": "`aten`, SDPA in bands",
    "blocked": "`aten`, blocked path",
    "cpu": "`cpu`",
    "triton": "`triton`",
    "cuda": "`cuda`",
}

_SDPA_LACKS: dict[str, str] = {
    "causal_unequal": "SDPA aligns a causal mask top-left, not bottom-right",
    "value_dim": "SDPA's CPU kernel wants value heads as wide as query heads",
    "window": "SDPA would need a mask of queries x keys",
    "softcap": "SDPA has no softcap",
    "alibi": "SDPA would need a bias of queries x keys",
    "masked_causal": "SDPA takes a mask or causal, not both",
    "mask_gradient": "SDPA's CPU kernel gives no gradient of a mask",
    "dropout": "SDPA's dropout cannot be replayed from a seed",
    "lse_gradient": "SDPA's backward takes no gradient of the log-sum-exp",
    "empty": "SDPA's CPU kernel divides by the number of keys",
    "gpu": "only SDPA's CPU kernel is called with its log-sum-exp",
}

_TRITON_LACKS: dict[str, str] = {
    "float64": "scores and sums are fp32 in the kernels",
}

_CPU_LACKS: dict[str, str] = {
    "float64": "sums of the CPU kernels are fp32",
    "gpu": "the CPU kernels take tensors of the CPU",
}

_NO_MASK = "the kernels read no mask of queries x keys"
_CUDA_LACKS: dict[str, str] = {
    "value_dim": "the kernels want value heads as wide as query heads",
    "bool_mask": _NO_MASK,
    "additive_mask": _NO_MASK,
    "masked_causal": _NO_MASK,
    "mask_gradient": _NO_MASK,
    "head_dim": "the kernels are for head sizes 64 and 128",
    "float64": "the kernels are for bf16 and fp16",
    "float32": "the kernels are for bf16 and fp16",
}

# What a mask for some rows at a time makes up for.
_BANDS_HAVE = ("causal_unequal", "window", "masked_causal")

TABLE: dict[str, dict[str, bool | str]] = {
    "reference": dict.fromkeys(FEATURES, True),
    "sdpa": {name: _SDPA_LACKS.get(name, True) for name in (*FEATURES, "gpu")},
    "bands": {
        name: name in _BANDS_HAVE or _SDPA_LACKS.get(name, True) for name in (*FEATURES, "gpu")
    },
    "blocked": dict.fromkeys(FEATURES, True),
    "cpu": {name: _CPU_LACKS.get(name, True) for name in (*FEATURES, "gpu")},
    "triton": {name: _TRITON_LACKS.get(name, True) for name in FEATURES},
    "cuda": {name: _CUDA_LACKS.get(name, True) for name in FEATURES},
}


def lacking(column: str, features: frozenset[str]) -> str:
    """Why `column` cannot do a problem with these features; empty when it can."""
    reasons = [answer for name, answer in TABLE[column].items() if name in features]
    return "; ".join(dict.fromkeys(reason for reason in reasons if isinstance(reason, str)))


def aten_path(features: frozenset[str]) -> tuple[str, str]:
    """(column, reason) of the path that `aten` takes. SDPA wherever it covers everything."""
    why = lacking("sdpa", features)
    if not why:
        return "sdpa", "torch's SDPA kernel covers every argument"
    whole = lacking("bands", features)
    if not whole:
        return "bands", f"torch's SDPA kernel on some queries and their keys at a time: {why}"
    return "blocked", f"blocks of queries x keys with an online softmax: {whole}"


def markdown() -> str:
    """The tables of docs/attention.md."""
    from lora_kernels.ops.attention.libraries import table

    rows = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, text in FEATURES.items():
        cells = (TABLE[column][name] for column in COLUMNS)
        shown = " | ".join("yes" if cell is True else f"no: {cell}" for cell in cells)
        rows.append(f"| {text} | {shown} |")
    rows += ["", "The kernels of libraries that `aten` calls on a GPU:", ""]
    return "\n".join(rows) + "\n" + table.markdown(FEATURES)
