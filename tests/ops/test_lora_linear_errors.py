"""Bad input: one line that names the argument, what was given and what is accepted."""

from __future__ import annotations

import inspect

import pytest
import torch

import lora_kernels as lk
from lora_kernels.errors import (
    BackendUnavailableError,
    InvalidArgumentError,
    LoraKernelsError,
)
from lora_kernels.ops import grouped_lora_linear, lora_linear

T = torch.zeros


def arguments(**changes) -> dict:
    """A valid call with some arguments replaced."""
    valid = {
        "x": T(2, 5, 20), "weight": T(33, 20), "lora_a": T(4, 20), "lora_b": T(33, 4),
        "scaling": 0.5, "bias": T(33), "dropout_p": 0.0, "seed": None, "backend": None,
    }  # fmt: skip
    return {**valid, **changes}


def test_the_unchanged_call_works():
    assert lora_linear(**arguments()).shape == (2, 5, 33)


BAD = [
    ({"x": T(())}, "x is a scalar", "in_features"),
    ({"x": T(5, 21)}, "weight has shape [33, 20]", "[out_features, 21]"),
    ({"x": [1.0]}, "x is a list", "torch.Tensor"),
    ({"x": None}, "x is a NoneType", "torch.Tensor"),
    ({"x": T(5, 20, dtype=torch.int64)}, "x has dtype torch.int64", "float32, bfloat16"),
    ({"x": T(5, 20, dtype=torch.complex64)}, "x has dtype torch.complex64", "float32"),
    ({"x": T(5, 20, dtype=torch.bfloat16)}, "weight is torch.float32", "torch.autocast"),
    ({"x": T(5, 20, device="meta")}, "weight is on cpu", "x is on meta"),
    ({"weight": T(33, 21)}, "weight has shape [33, 21]", "[out_features, 20]"),
    ({"weight": T(33)}, "weight has shape [33]", "[out_features, 20]"),
    ({"weight": None}, "weight is a NoneType", "torch.Tensor"),
    ({"weight": T(33, 20, dtype=torch.int8)}, "weight has dtype torch.int8", "float32"),
    ({"weight": T(33, 20, device="meta")}, "weight is on meta", "x is on cpu"),
    ({"lora_a": T(4, 21)}, "lora_a has shape [4, 21]", "[r >= 1, 20]"),
    ({"lora_a": T(0, 20), "lora_b": T(33, 0)}, "lora_a has shape [0, 20]", "r >= 1"),
    ({"lora_a": T(20)}, "lora_a has shape [20]", "[r >= 1, 20]"),
    ({"lora_a": T(4, 20, dtype=torch.int32)}, "lora_a has dtype torch.int32", "float32"),
    ({"lora_b": T(4, 33)}, "lora_b has shape [4, 33]", "[33, 4]"),
    ({"lora_b": T(33, 5)}, "lora_b has shape [33, 5]", "[33, 4]"),
    ({"lora_b": 3}, "lora_b is a int", "torch.Tensor"),
    ({"bias": T(34)}, "bias has shape [34]", "[33]"),
    ({"bias": T(1, 33)}, "bias has shape [1, 33]", "[33]"),
    ({"bias": T(33, dtype=torch.bool)}, "bias has dtype torch.bool", "float32"),
    ({"scaling": float("nan")}, "scaling=nan", "finite"),
    ({"scaling": float("inf")}, "scaling=inf", "finite"),
    ({"scaling": T(())}, "scaling is a tensor", "finite number"),
    ({"scaling": "2"}, "scaling='2'", "finite number"),
    ({"scaling": None}, "scaling=None", "finite number"),
    ({"dropout_p": -0.1}, "dropout_p=-0.1", "0 to 1"),
    ({"dropout_p": 1.1}, "dropout_p=1.1", "0 to 1"),
    ({"dropout_p": float("nan")}, "dropout_p=nan", "0 to 1"),
    ({"dropout_p": "0.5"}, "dropout_p='0.5'", "0 to 1"),
    ({"dropout_p": 0.5, "seed": 1.5}, "seed=1.5 is a float", "int64"),
    ({"dropout_p": 0.5, "seed": True}, "seed=True is a bool", "int64"),
    ({"dropout_p": 0.5, "seed": -1}, "seed=-1", "0 to 2**63 - 1"),
    ({"dropout_p": 0.5, "seed": 2**63}, f"seed={2**63}", "0 to 2**63 - 1"),
    ({"dropout_p": 0.5, "seed": torch.zeros(2, dtype=torch.int64)}, "seed is a", "one element"),
    ({"dropout_p": 0.5, "seed": torch.zeros(())}, "seed is a torch.float32", "int64"),
    ({"backend": "fast"}, "backend='fast'", "reference, aten, cpu"),
    ({"backend": 3}, "backend=3", "reference, aten, cpu"),
]


@pytest.mark.parametrize(("changes", "given", "accepted"), BAD, ids=[b[1] for b in BAD])
def test_message_names_the_argument(changes, given, accepted):
    with pytest.raises(InvalidArgumentError) as caught:
        lora_linear(**arguments(**changes))
    message = str(caught.value)
    assert "\n" not in message
    assert given in message
    assert accepted in message
    assert isinstance(caught.value, LoraKernelsError)
    assert isinstance(caught.value, ValueError)


def group(**changes) -> dict:
    valid = {
        "x": T(5, 20), "weights": [T(33, 20), T(6, 20)], "lora_as": [T(4, 20), T(2, 20)],
        "lora_bs": [T(33, 4), T(6, 2)], "scalings": [0.5, 1.0],
    }  # fmt: skip
    return {**valid, **changes}


BAD_GROUPS = [
    ({"weights": [T(33, 20)]}, "weights=1, lora_as=2"),
    ({"scalings": [0.5]}, "scalings=1"),
    ({"biases": [None]}, "biases=1"),
    ({"lora_as": [T(4, 20), T(2, 21)]}, "lora_a[1] has shape [2, 21]"),
    ({"lora_bs": [T(33, 4), T(5, 2)]}, "lora_b[1] has shape [5, 2]"),
    ({"weights": [T(33, 20), T(6, 20).bfloat16()]}, "weight[1] is torch.bfloat16"),
    ({"biases": [T(33), T(7)]}, "bias[1] has shape [7]"),
    ({"scalings": [0.5, float("nan")]}, "scaling"),
    ({"weights": [], "lora_as": [], "lora_bs": [], "scalings": []}, "at least one"),
]


@pytest.mark.parametrize(("changes", "given"), BAD_GROUPS, ids=[b[1] for b in BAD_GROUPS])
def test_message_names_the_member(changes, given):
    with pytest.raises(InvalidArgumentError) as caught:
        grouped_lora_linear(**group(**changes))
    assert given in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_an_unavailable_backend_never_falls_back(name):
    with pytest.raises(BackendUnavailableError) as caught:
        lora_linear(**arguments(backend=name))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_environment_variable_names_a_backend(monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "nonsense")
    with pytest.raises(InvalidArgumentError, match="LORA_KERNELS_BACKEND='nonsense'"):
        lora_linear(**arguments())
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "cuda")
    with pytest.raises(BackendUnavailableError):
        lora_linear(**arguments())
    lora_linear(**arguments(backend="aten"))  # an argument goes before the environment


def test_disabled_backends_are_passed_over(monkeypatch):
    problem = {"M": 2048, "K": 2048, "N": 2048, "dtype": "bfloat16"}
    for value in ("cpu", "lora_linear", "lora_linear:cpu", "x, cpu"):
        monkeypatch.setenv("LORA_KERNELS_DISABLE", value)
        answer = lk.explain("lora_linear", **problem)
        assert answer["backend"] == "aten"
        assert "LORA_KERNELS_DISABLE" in answer["reason"]


def test_explain_names_bad_arguments():
    for bad, word in (
        ({"M": 1, "K": 1}, "'N'"),
        ({"M": 1, "K": 1, "N": 1, "shape": 3}, "'shape'"),
        ({"M": 1, "K": 1, "N": 1, "dtype": "int8"}, "dtype"),
    ):
        with pytest.raises(InvalidArgumentError, match=word):
            lk.explain("lora_linear", **bad)
    with pytest.raises(InvalidArgumentError, match="op='softmax'"):
        lk.explain("softmax", M=1)


def test_explain_agrees_with_the_registry():
    answer = lk.explain("lora_linear", M=64, K=64, N=(64, 32), rank=4, dtype="float32")
    assert answer["backends"]["aten"]["supported"]
    assert answer["backend"] in answer["backends"]
    assert all(entry["reason"] for entry in answer["backends"].values())


def test_public_docstrings_state_shapes_and_errors():
    for function in (lora_linear, grouped_lora_linear, lk.explain):
        text = inspect.getdoc(function)
        assert text
        assert "Raises:" in text or "Args and errors as" in text
