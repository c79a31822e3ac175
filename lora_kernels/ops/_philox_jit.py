"""Dropout of _philox.py in one launch on a GPU, for backends that have no kernel of their own.

Written in torch operators the generator takes some sixty launches over [M, K / 8] int64 words.
torch compiles an elementwise function from source at run time (``torch.cuda.jiterator``), which
makes it one. Before its first use on a device the result is compared with the definition there;
where it differs or cannot be compiled, the definition itself is used, slower and equal in value.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from lora_kernels.ops import _philox

_log = logging.getLogger(__name__)

# Element (row, column group) -> keep decisions of the four columns 4 c ... 4 c + 3 of that row,
# each 16 bits of ones or zeros, the first column lowest.
SOURCE = """
template <typename T> T lora_kernels_keep4(T row, T c, T seed, T threshold, T stream) {
  unsigned long long kept = 0;
  unsigned int lane = 16 * (unsigned int)(c / 32) + (unsigned int)(c % 8) * 2;
  unsigned int word = (unsigned int)(c % 32) / 8;
  for (unsigned int pair = 0; pair != 2; ++pair) {
    unsigned int x[4] = {lane + pair, (unsigned int)row, (unsigned int)stream, 0};
    unsigned int k0 = (unsigned int)seed;
    unsigned int k1 = (unsigned int)((unsigned long long)seed / 4294967296ull);
    for (int round = 0; round != 7; ++round) {
      unsigned long long p0 = 3528531795ull * x[0];
      unsigned long long p1 = 3449720151ull * x[2];
      x[0] = (unsigned int)(p1 / 4294967296ull) ^ x[1] ^ k0;
      x[1] = (unsigned int)p1;
      x[2] = (unsigned int)(p0 / 4294967296ull) ^ x[3] ^ k1;
      x[3] = (unsigned int)p0;
      k0 += 2654435769u;
      k1 += 3144134277u;
    }
    unsigned int draw = word == 0 ? x[0] : word == 1 ? x[1] : word == 2 ? x[2] : x[3];
    unsigned long long low = (draw & 65535u) >= (unsigned int)threshold ? 65535ull : 0ull;
    unsigned long long high = (draw / 65536u) >= (unsigned int)threshold ? 65535ull : 0ull;
    kept |= (low | high * 65536ull) * (pair ? 4294967296ull : 1ull);
  }
  return (T)kept;
}
"""

_usable: dict[int, bool] = {}
_kernel: Callable[..., Tensor] | None = None


def keep_words(
    seed: Tensor, rows: int, columns: int, p: float, stream: int = 0, first_row: int = 0
) -> Tensor:
    """int16 [rows, columns]: -1 where an element is kept, else 0. One launch; `seed` on a GPU."""
    global _kernel
    if _kernel is None:
        from torch.cuda import jiterator

        _kernel = jiterator._create_jit_fn(SOURCE, threshold=0, stream=0)
    row = torch.arange(first_row, first_row + rows, device=seed.device)[:, None]
    group = torch.arange(-(-columns // 4), device=seed.device)[None, :]
    words = _kernel(row, group, seed.reshape(()), threshold=_philox.threshold(p), stream=stream)
    return words.contiguous().view(torch.int16)[:, :columns]


def usable(device: torch.device) -> bool:
    """Is the compiled function there and equal to the definition on this device?"""
    if device.type != "cuda":
        return False
    index = device.index or 0
    if index not in _usable:
        if torch.cuda.is_current_stream_capturing():
            return False  # the comparison waits for the device; decided at a later call
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")  # this once it has to wait
        try:
            _usable[index] = _equals_definition(device)
            why = "its masks differ from the definition"
        except Exception as error:  # NVRTC, the driver or the beta interface itself
            _usable[index] = False
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        if not _usable[index]:
            _log.warning("dropout on %s takes many launches: %s", device, why)
    return _usable[index]


def _equals_definition(device: torch.device) -> bool:
    for value, p, stream, first in ((0x0123456789ABCDEF, 0.1, 2, 5), (2**63 - 1, 1.0, 0, 0)):
        seed = torch.tensor(value, device=device)
        words = keep_words(seed, 9, 391, p, stream, first)
        if not torch.equal(words != 0, _philox.keep_mask(seed, 9, 391, p, stream, first)):
            return False
    return True


def drop(x: Tensor, seed: Tensor, p: float, stream: int = 0, first_row: int = 0) -> Tensor:
    """x [M, K] with dropped elements zero, rows counted from `first_row`; the factor
    :func:`_philox.keep_scale` is left to the caller."""
    if not (x.numel() and usable(x.device)):
        return _philox.drop(x, seed, p, stream, first_row)
    words = keep_words(seed.to(x.device), x.shape[0], x.shape[1], p, stream, first_row)
    if x.dtype.itemsize == 2:
        return (x.view(torch.int16) & words).view(x.dtype)
    return x.masked_fill(words == 0, 0.0)
