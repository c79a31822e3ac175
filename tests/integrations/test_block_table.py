"""The table of block classes whose layers share an input."""

from __future__ import annotations

import inspect
import re

import pytest
from torch import nn

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.modules import blocks


def test_registering_checks_its_arguments(monkeypatch):
    monkeypatch.setattr(blocks, "_rows", blocks.rows())
    blocks.register_block(nn.Bilinear, ("first", "second"))
    for wrong in ((), (("one",),), (("a", "a"),), (["a", "b"],), ((1, 2),)):
        with pytest.raises(InvalidArgumentError):
            blocks.register_block(nn.Linear, *wrong)
    with pytest.raises(InvalidArgumentError, match=r"torch\.nn\.Module"):
        blocks.register_block(int, ("a", "b"))
    with pytest.raises(InvalidArgumentError, match="replace=True"):
        blocks.register_block(nn.Bilinear, ("a", "b"))
    blocks.register_block(nn.Bilinear, ("a", "b"), replace=True)
    with pytest.raises(InvalidArgumentError, match="gate, down and act"):
        blocks.register_block(nn.Bilinear, mlp=blocks.Mlp("a", "", "b", ""), replace=True)
    blocks.register_block(nn.Bilinear, mlp=blocks.Mlp("a", "", "b", "act"), replace=True)
    assert blocks.row_of(nn.Bilinear).mlp.down == "b"


def test_every_row_is_what_transformers_does():
    """The class exists, and its forward gives the layers of a group one and the same variable."""
    pytest.importorskip("transformers")
    for (module, name), row in blocks.rows().items():
        cls = getattr(__import__(module, fromlist=[name]), name)
        source = inspect.getsource(cls.forward)
        for groups in (row.groups, *(g for _, g in row.elsewhere)):
            for group in (g for g in groups if len(g) > 1):
                arguments = set()
                for member in group:
                    found = re.findall(rf"self\.{member}\((\w+)\)", source)
                    assert found, (name, member)
                    arguments |= set(found)
                # The decoder's attention names the tensor anew where it may be another one.
                assert len(arguments - {"current_states"}) <= 1, (name, group, arguments)
        if row.mlp is not None:
            for member in filter(None, (row.mlp.gate, row.mlp.up, row.mlp.down, row.mlp.act)):
                assert f"self.{member}(" in source, (name, member)
