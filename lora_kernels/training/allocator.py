"""The C library's allocator, for a process that allocates the same large tensors at every step."""

from __future__ import annotations

import ctypes
import os
import platform

# malloc.h of the GNU C library
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1
_LARGEST_BLOCK = 2**30
_OURS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed_pages() -> bool:
    """Ask glibc to keep freed memory for the next allocation instead of returning it.

    A training step on the CPU frees its activations in the backward; returned to the system, their
    pages are cleared and mapped again by the next forward. For the whole process, so a program
    calls it, not a library. The memory in use at the peak stays the same; less is given back
    between peaks.

    Returns:
        False where there is nothing to ask: another C library, one preloaded over it, or settings
        in the environment, which stay as they are.
    """
    if platform.libc_ver()[0] != "glibc" or os.environ.get("LD_PRELOAD"):
        return False
    if any(name in os.environ for name in _OURS):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    asked = ((_M_MMAP_THRESHOLD, _LARGEST_BLOCK), (_M_TRIM_THRESHOLD, _NEVER))
    return all(libc.mallopt(name, value) == 1 for name, value in asked)
