"""torch.compile with fullgraph traces fused layers where it traces stock ones."""

from __future__ import annotations

import logging

import pytest
import torch
from peft_models import CASES, as_fp64, layer, mlp, run
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.testing import assert_within_budget


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch.compiler.reset()


class _Recorder:
    """A backend that runs the graph as it is and keeps it."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, example: list[Tensor]) -> object:
        self.graphs.append(graph)
        return graph.forward

    def count(self, op: str) -> int:
        bodies = [
            m for g in self.graphs for m in g.modules() if isinstance(m, torch.fx.GraphModule)
        ]
        return sum(op in str(node.target) for body in bodies for node in body.graph.nodes)


@pytest.mark.parametrize(
    "family",
    ["gpt2", *(pytest.param(f, marks=pytest.mark.slow) for f in ("llama", "bert", "t5"))],
)
def test_fullgraph(family: str) -> None:
    case = CASES[family]
    model, inputs = case.peft_model(), case.inputs()
    if family != "t5":  # which makes the decoder's input of them
        del inputs["labels"]
    reference, stock = as_fp64(model)(**inputs).logits, model(**inputs).logits
    report = lk.apply(model)
    saved = sum(len(g["members"]) - 1 for g in report.groups)
    recorder = _Recorder()
    fused = torch.compile(model, fullgraph=True, backend=recorder)(**inputs).logits
    assert len(recorder.graphs) == 1
    assert recorder.count("lora_linear_fwd") == case.layers - saved
    assert_within_budget(fused, reference, stock, "logits")


def _gradients(call: nn.Module, owner: nn.Module, x: Tensor) -> dict[str, Tensor]:
    owner.zero_grad(set_to_none=True)
    call(x).square().sum().backward()
    return {n: p.grad.clone() for n, p in owner.named_parameters() if p.grad is not None}


def test_gradients_of_a_dynamic_number_of_rows() -> None:
    stock = mlp()
    fused, reference = mlp(), as_fp64(stock)
    lk.apply(fused)
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9, 17):
        x = torch.randn(rows, 20)
        want = _gradients(reference, reference, x.double())
        low = _gradients(stock, stock, x)
        got = _gradients(compiled, fused, x)
        assert got.keys() == want.keys()
        for name, value in got.items():
            assert_within_budget(value, want[name], low[name], name)


def test_new_scaling_is_seen() -> None:
    model, x = mlp(target_modules=["up"]), torch.randn(5, 20)
    up = layer(model, "up")
    lk.apply(model)
    compiled = torch.compile(up, fullgraph=True, backend="aot_eager")
    compiled(x)
    for scale in (2.0, 3.0, 4.0):
        up.set_scale("default", scale)
        y = compiled(x)
        lk.unapply(model)
        assert_within_budget(y, as_fp64(up)(x.double()), up(x), f"scale {scale}")
        lk.apply(model)


def test_dropout_is_traced_and_replayed() -> None:
    model, x = mlp(lora_dropout=0.3).train(), torch.randn(5, 20)
    lk.apply(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(compiled(x))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    torch.manual_seed(1)
    assert torch.equal(model(x), outputs[0])


def test_fallback_is_warned_of_and_keeps_the_graph_whole(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = mlp(), torch.randn(5, 20)
    up = layer(model, "up")
    stock = up(x)
    lk.apply(model)
    up.lora_B["default"].register_forward_hook(lambda m, i, o: None)
    with caplog.at_level(logging.WARNING, "lora_kernels"):
        fused = torch.compile(up, fullgraph=True, backend="eager")(x)
    assert torch.equal(fused, stock)
    messages = [r.getMessage() for r in caplog.records if r.name == "lora_kernels"]
    assert len(messages) == 1 and "lora_B has hooks" in messages[0]
    torch.compiler.reset()
    monkeypatch.setenv("LORA_KERNELS_STRICT", "1")
    with pytest.raises(Exception, match="lora_B has hooks"):
        torch.compile(up, fullgraph=True, backend="eager")(x)


@pytest.mark.slow
def test_inductor() -> None:
    case = CASES["llama"]
    model, inputs = case.peft_model(), case.inputs() | {"use_cache": False}
    reference, stock = run(as_fp64(model), inputs), run(model, inputs)
    lk.apply(model)
    fused = run(torch.compile(model, fullgraph=True), inputs)
    assert_within_budget(fused["logits"], reference["logits"], stock["logits"], "logits")
    assert len(fused) == len(stock)
    for name, value in fused.items():
        plain = name.removeprefix("_orig_mod.")
        assert_within_budget(value, reference[plain], stock[plain], name)
