"""Modules for models without PEFT: LoRALinear, replacement in a model, adapter files, merging."""

from __future__ import annotations
