"""Triton's interpreter with the arithmetic of a GPU in bf16 and fp16.

Upstream's interpreter keeps bf16 as raw 16-bit integers: a product multiplies bit patterns and a
conversion from fp32 cuts the low half off (triton 3.6 to 3.9). Inside :func:`exact`, products of
bf16 and fp16 tiles are computed in fp32, as a tensor core does, and conversions to bf16 round to
nearest even. Everything else in bf16 stays wrong there, so kernels do element-wise work in fp32.
A loop bound, an array of one element, becomes an integer in a way that numpy 2.4 still allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def exact() -> Iterator[None]:
    """Corrects the interpreter for the time of a launch; puts it back at the end."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle
    dot, cast = builder.create_dot, builder.cast_impl
    patch = interpreter._patch_lang_tensor

    def widen(h: Any) -> Any:
        if h.dtype.scalar == tl.bfloat16:
            return (h.data.astype(np.uint32) << 16).view(np.float32)
        return h.data.astype(np.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if {a.dtype.scalar, b.dtype.scalar} & {tl.bfloat16, tl.float16}:
            product = np.matmul(widen(a), widen(b)) + d.data
            return handle(product.astype(d.data.dtype), d.dtype.scalar)
        return dot(self, a, b, d, *rest)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        pair = (src.dtype.scalar, dst_type.scalar)
        if pair == (tl.bfloat16, tl.float32):
            return handle(widen(src), tl.float32)
        if pair != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        bits = np.ascontiguousarray(src.data, dtype=np.float32).view(np.uint32)
        rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        quiet = (bits >> 16).astype(np.uint16) | np.uint16(0x40)
        return handle(np.where(np.isnan(src.data), quiet, rounded), tl.bfloat16)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    interpreter._patch_lang_tensor = patch_lang_tensor
    try:
        yield
    finally:
        builder.create_dot, builder.cast_impl = dot, cast
        interpreter._patch_lang_tensor = patch
