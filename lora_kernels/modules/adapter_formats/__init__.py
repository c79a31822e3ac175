"""Adapter files of other libraries: PEFT folders, loralib and torchtune state dicts.

In memory every adapter is what PEFT would have on disk: tensors under PEFT's names and the content
of adapter_config.json. The two other formats are a renaming of that, with two changes of content,
both of them reversible: loralib's merged layers keep the blocks of a block-diagonal B side by side,
and torchtune orders the rows of query and key by pairs of rotary dimensions.
"""

from __future__ import annotations

from lora_kernels.modules.adapter_formats.adapter import Adapter, Heads
from lora_kernels.modules.adapter_formats.files import FORMATS, read_adapter, write_adapter

__all__ = ["FORMATS", "Adapter", "Heads", "read_adapter", "write_adapter"]
