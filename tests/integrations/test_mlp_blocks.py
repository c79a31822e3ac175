"""apply() on MLP blocks: one node where it can be, the layers one by one or stock where not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from families import FAMILIES, oracle, run
from test_families import assert_same

import lora_kernels as lk
from lora_kernels.integrations.peft import mlp_blocks


def entries(report: object) -> list[dict]:
    return [g for g in report.groups if g["kind"] == mlp_blocks.KIND]


def applied(dtype: torch.dtype = torch.float32):
    model = FAMILIES["llama"].peft_model(dtype)
    return model, lk.apply(model, fused_norms=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_one_node_and_a_hook_that_prevents_it(dtype, nodes):
    spec = FAMILIES["llama"]
    model, inputs = spec.peft_model(dtype), spec.inputs()
    exact, low = oracle(model, inputs), run(model, inputs)
    report = lk.apply(model, fused_norms=False)
    if entries(report)[0]["reason"]:
        pytest.skip(entries(report)[0]["reason"])
    assert_same(run(model, inputs), low, exact)
    assert nodes == [True, True]
    seen = []
    for module in model.modules():
        if type(module).__name__ == "LlamaMLP":
            module.down_proj.register_forward_hook(lambda *_: seen.append(1))
    assert_same(run(model, inputs), low, exact)
    assert nodes[2:] == [False, False] and len(seen) == 2


def test_dropout_of_adapters_trains_as_one_node(nodes):
    model, report = applied()
    if entries(report)[0]["reason"]:
        pytest.skip(entries(report)[0]["reason"])
    for module in model.modules():
        adapters = isinstance(module, torch.nn.ModuleDict) and "default" in module
        if adapters and isinstance(module["default"], torch.nn.Identity):
            module["default"] = torch.nn.Dropout(0.5)
    model.train()
    first, again = [], []
    for found in (first, again):
        torch.manual_seed(5)
        found.append(run(model, FAMILIES["llama"].inputs()))
    assert all(torch.equal(t, again[0][n]) for n, t in first[0].items())
    assert all(nodes) and len(nodes) == 4


def test_dropout_inside_of_t5_runs_the_blocks_own_forward(nodes):
    spec = FAMILIES["t5_gated"]
    model = spec.peft_model(torch.float32)
    lk.apply(model, fused_norms=False)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.train()
    run(model, spec.inputs())
    assert nodes == []


def test_copies_and_pickles_stay_fused():
    model, report = applied()
    inputs = FAMILIES["llama"].inputs()
    want = run(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        got = run(other, inputs)
        assert all(torch.equal(t, got[n]) for n, t in want.items())
        fused = [isinstance(m, mlp_blocks.FusedMlp) for m in other.modules()]
        assert sum(fused) == sum(e["status"] == "fused" for e in entries(report))
        lk.unapply(other)
        assert not any(isinstance(m, mlp_blocks.FusedMlp) for m in other.modules())


def test_what_gains_nothing_stays_stock(monkeypatch):
    model, report = applied(torch.float64)
    assert [e["status"] for e in entries(report)] == ["stock", "stock"]
    assert "no kernel beats" in entries(report)[0]["reason"]
    assert not any(isinstance(m, mlp_blocks.FusedMlp) for m in model.modules())
    monkeypatch.setenv("LORA_KERNELS_DISABLE", "gated_activation")
    model, report = applied()
    assert entries(report)[0]["reason"] == "disabled by LORA_KERNELS_DISABLE"
    assert not any(isinstance(m, mlp_blocks.FusedMlp) for m in model.modules())
