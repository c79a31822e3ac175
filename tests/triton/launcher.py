"""The host half of a launch, as far as it goes without a driver: the glue code that unpacks the
arguments of a compiled kernel must exist for its very signature."""

from __future__ import annotations

from typing import Any

from triton.backends.nvidia import driver


def tensor_maps(compiled: Any) -> int:
    """Tensor maps that the glue code passes; raises where it cannot be made."""
    source, metadata = compiled.src, compiled.metadata
    maps = getattr(metadata, "tensordesc_meta", None)
    signature = dict(source.signature)
    if hasattr(driver, "make_launcher"):  # triton 3.6: C code, made from the signature
        names = source.fn.arg_names
        constants = {
            (names.index(key),) if isinstance(key, str) else key: value
            for key, value in source.constants.items()
        }
        made = driver.make_launcher(constants, signature, maps)
        return made.count("= getTmaDesc(")
    expanded = driver.expand_signature(signature.values(), maps, "nvTmaDesc")
    return str(expanded).count("nvTmaDesc")
