"""Every error that lora_kernels raises on purpose.

The command line turns any :class:`LoraKernelsError` into one line on stderr and exit code 2;
each class also derives from the builtin that callers would expect to catch.
"""

from __future__ import annotations


class LoraKernelsError(Exception):
    """Base class of all deliberate errors of this package."""


class InvalidArgumentError(LoraKernelsError, ValueError):
    """An argument has a shape, dtype, device or value that cannot be used."""


class BackendUnavailableError(LoraKernelsError, RuntimeError):
    """A backend was requested by name and cannot run this problem; the message says why."""


class StrictFallbackError(LoraKernelsError, RuntimeError):
    """``LORA_KERNELS_STRICT=1`` and something would have fallen back to a slower path."""


class AdapterFileError(LoraKernelsError, ValueError):
    """An adapter file is missing, malformed, or belongs to another model."""


class QuantizedWeightError(LoraKernelsError, ValueError):
    """A checkpoint with quantized weights is missing, malformed or inconsistent."""


class ConfigError(LoraKernelsError, ValueError):
    """A training configuration has an unknown key or a value out of range."""


class DataError(LoraKernelsError, ValueError):
    """A data file cannot be read or holds nothing usable."""


class CheckpointError(LoraKernelsError, RuntimeError):
    """A checkpoint cannot be written; the message names the last one that was finished."""


class TrainingInterruptedError(LoraKernelsError):
    """SIGTERM or Ctrl-C stopped a training after a step; the message says where to go on from."""
