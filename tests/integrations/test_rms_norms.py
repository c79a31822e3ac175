"""Norms of a model on the op: every class of the table, whole families, and what is left alone."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
from typing import Any

import pytest
import torch
from families import FAMILIES, _causal, oracle, run
from test_families import assert_same
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels._backends import cpu as library_loader
from lora_kernels.errors import InvalidArgumentError
from lora_kernels.integrations.transformers import rms_norm_classes, rms_norms
from lora_kernels.integrations.transformers.rms_norms import FusedRmsNorm, fuse_norms, to_stock
from lora_kernels.testing import BudgetExceededError, assert_within_budget

library, reason = library_loader.load()
if library is not None and not hasattr(library, "rms_norm_bwd"):
    library, reason = None, "lora_kernels._C was built without rms_norm"
pytestmark = pytest.mark.skipif(library is None, reason=reason)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MORE = {
    "gemma": _causal("Gemma"),
    "granite": _causal("Granite"),
    "olmo2": _causal("Olmo2"),
}
# Norms of two layers and the last one; q_norm and k_norm; before and after each half.
COUNTS = {
    "llama": 5, "mistral": 5, "qwen2": 5, "qwen3": 9, "gemma": 5, "gemma2": 9, "gemma3": 13,
    "smollm3": 5, "phi3": 5, "granite": 5, "olmo2": 9, "gpt_oss": 5, "t5": 7, "t5_gated": 7,
}  # fmt: skip
ONE_OF_EACH = ("llama", "gemma3", "olmo2", "t5")
FEATURES = 40


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a norm ran on the op."""
    count, op, shortcut = [0], rms_norms.rms_norm, rms_norms._eager

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        count[0] += 1
        return op(*args, **kwargs)

    def counted_shortcut(*args: Any) -> Tensor | None:
        y = shortcut(*args)
        count[0] += y is not None
        return y

    monkeypatch.setattr(rms_norms, "rms_norm", counted)
    monkeypatch.setattr(rms_norms, "_eager", counted_shortcut)
    return count


def made(module: str, name: str) -> nn.Module:
    """A norm of this class with a weight that shows, near 1 in effect."""
    cls = getattr(pytest.importorskip(module), name)
    norm = cls(FEATURES)
    row = rms_norm_classes.row_of(cls)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(1.0 - row.offset + 0.5 * torch.randn(FEATURES, generator=generator))
    setattr(norm, row.eps, 0.1)
    return norm


def formula(norm: Any, x: Tensor) -> Tensor:
    row = rms_norm_classes.row_of(rms_norms._stock_of(type(norm)))
    eps = getattr(norm, row.eps)
    n = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps)
    return n * (row.offset + norm.weight.double())


def gradients(y: Tensor, norm: nn.Module, x: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    dx, dweight = torch.autograd.grad(y, (x, norm.weight), dy.to(torch.bfloat16).to(y.dtype))
    return {"y": y.detach(), "dx": dx, "dweight": dweight}


def check_class(module: str, name: str, calls: list[int]) -> None:
    """Against the class's own forward, in every pair of dtypes of x and weight."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for weight_dtype in (torch.float32, torch.bfloat16):
            norm = made(module, name).to(weight_dtype)
            generator = torch.Generator().manual_seed(1)
            x = torch.randn(3, 5, FEATURES, generator=generator).to(dtype).requires_grad_()
            low = gradients(norm(x), norm, x)
            double = copy.deepcopy(norm).double(), x.detach().double().requires_grad_()
            exact = gradients(formula(*double), *double)
            _, changed = fuse_norms(norm)
            assert changed == [norm] and isinstance(norm, FusedRmsNorm)
            calls[0] = 0
            got = gradients(norm(x), norm, x)
            assert calls == [1], (dtype, weight_dtype)
            for key, value in got.items():
                assert value.dtype == low[key].dtype, (key, dtype, weight_dtype)
                # A weight in fp32 over x in bf16 has a gradient of products of bf16.
                coarse = low[key].to(dtype) if key == "dweight" else low[key]
                label = f"{name} {dtype} {weight_dtype} {key}"
                assert_within_budget(value, exact[key], coarse, label)


SMALL = [
    (module, name)
    for module, name in rms_norm_classes.rows()
    if name in ("LlamaRMSNorm", "GemmaRMSNorm", "Olmo2RMSNorm", "T5LayerNorm", "RMSNorm")
]


@pytest.mark.parametrize(("module", "name"), SMALL)
def test_one_class_of_each_kind(module: str, name: str, calls: list[int]) -> None:
    check_class(module, name, calls)


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name"), sorted(rms_norm_classes.rows()))
def test_every_class(module: str, name: str, calls: list[int]) -> None:
    check_class(module, name, calls)


def test_the_table_names_classes_that_exist() -> None:
    """Without importing them: the source says so."""
    for module, name in rms_norm_classes.rows():
        spec = importlib.util.find_spec(module)  # imports packages alone
        assert spec is not None and spec.origin is not None, module
        with open(spec.origin, encoding="utf-8") as file:
            assert f"class {name}(" in file.read(), (module, name)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((f, "bf16") for f in COUNTS), *((f, "fp32") for f in (*ONE_OF_EACH, "qwen3"))],
)
def test_families(family: str, dtype: str, calls: list[int]) -> None:
    """Norms alone against stock, trained as well, and all undone."""
    spec = {**FAMILIES, **MORE}[family]
    model, inputs = spec.peft_model(DTYPES[dtype]), spec.inputs()
    norms = [m for m in model.modules() if rms_norm_classes.row_of(type(m))]
    generator = torch.Generator().manual_seed(3)
    for norm in norms:
        norm.weight.requires_grad_()
        with torch.no_grad():
            norm.weight.add_(0.3 * torch.randn(norm.weight.shape, generator=generator))
    exact, low = oracle(model, inputs), run(model, inputs)
    assert sum(name.endswith("norm.weight") or "layer_norm" in name for name in low) == len(norms)
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    entries, changed = fuse_norms(model)
    assert len(changed) == len(entries) == COUNTS[family]
    assert {(e["kind"], e["status"], e["backend"]) for e in entries} == {
        ("rms_norm", "fused", "cpu")
    }
    assert_same(run(model, inputs), low, exact)
    assert calls == [COUNTS[family]] and list(model.state_dict()) == keys
    assert all(to_stock(m) for m in changed)
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_apply_and_its_switch(family: str, calls: list[int]) -> None:
    spec = {**FAMILIES, **MORE}[family]
    model, inputs = spec.peft_model(torch.bfloat16), spec.inputs()
    classes = [type(m) for m in model.modules()]
    report = lk.apply(model)
    assert len(report.norms) == COUNTS[family] and not report.stock
    assert report.to_dict()["norms"] == report.norms
    layers = len(report.layers)
    assert str(report).endswith(f"{layers} of {layers} LoRA layers fused")
    assert "normalized on cpu" in str(report)
    model(**inputs)
    assert calls == [COUNTS[family]]
    with lk.applied(model, fused_norms=False) as report:
        assert not report.norms and "normalized" not in str(report)
        model(**inputs)
        assert calls == [COUNTS[family]]
    model(**inputs)
    assert calls == [2 * COUNTS[family]]
    lk.unapply(model)
    assert [type(m) for m in model.modules()] == classes
    with lk.applied(model):
        model(**inputs)
    assert calls == [3 * COUNTS[family]]
    assert [type(m) for m in model.modules()] == classes


def test_a_planted_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for family, wrong in (("gemma2", {"offset": 0.0}), ("qwen3", {"eps": 0.05})):
        spec = FAMILIES[family]
        model, inputs = spec.peft_model(torch.bfloat16), spec.inputs()
        exact, low = oracle(model, inputs), run(model, inputs)
        op = rms_norms.rms_norm

        def planted(x: Tensor, w: Tensor, eps: float, offset: float, wrong=wrong, op=op) -> Tensor:
            return op(x, w, **{"eps": eps, "offset": offset, **wrong})

        with monkeypatch.context() as patch:
            patch.setattr(rms_norms, "rms_norm", planted)
            fuse_norms(model)
            with pytest.raises(BudgetExceededError):
                assert_same(run(model, inputs), low, exact)


def small_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8))
    lk.replace_modules(model, r=2, alpha=4)
    return model


def test_models_without_peft_and_without_adapters() -> None:
    model = small_model()
    report = lk.apply(model)
    assert [n["name"] for n in report.norms] == ["1"] and isinstance(model[1], FusedRmsNorm)
    assert "1 RMS norms: normalized on cpu" in str(report)
    plain = nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8))
    assert not lk.apply(plain).norms and type(plain[1]) is nn.RMSNorm


def test_unloading_leaves_norms_to_unapply(calls: list[int]) -> None:
    spec = FAMILIES["llama"]
    model, inputs = spec.peft_model(torch.float32), spec.inputs()
    lk.apply(model)
    unloaded = model.merge_and_unload()
    unloaded(**inputs)
    assert calls == [5]
    lk.unapply(unloaded)
    assert not any(isinstance(m, FusedRmsNorm) for m in unloaded.modules())


def test_a_model_of_stock_layers_keeps_its_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = FAMILIES["llama"]
    model, other, inputs = (*(spec.peft_model(torch.float32) for _ in "12"), spec.inputs())
    stock = run(model, inputs)
    assert len(lk.apply(other).norms) == 5
    monkeypatch.setenv("LORA_KERNELS_DISABLE", "lora_linear,rope")
    assert not lk.apply(model).norms and not lk.apply(other).norms
    assert not any(isinstance(m, FusedRmsNorm) for m in (*model.modules(), *other.modules()))
    assert all(torch.equal(t, stock[n]) for n, t in run(model, inputs).items())


def test_copies_and_pickles() -> None:
    model = small_model()
    lk.apply(model)
    x = torch.randn(3, 8)
    want = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert isinstance(other[1], FusedRmsNorm) and type(other[1]).__name__ == "RMSNorm"
        assert torch.equal(other(x), want)
        lk.unapply(other)
        assert type(other[1]) is nn.RMSNorm
    assert repr(model[1]) == repr(nn.RMSNorm(8))


def test_what_runs_the_norms_own_forward(calls: list[int]) -> None:
    """Tracing, transforms, forward mode, fp64, other shapes, autocast of torch's norm."""
    norm = nn.RMSNorm(8)
    fuse_norms(norm)
    x = torch.randn(3, 8)
    want = nn.RMSNorm(8)(x)
    torch.func.vmap(norm)(x)
    torch.func.jvp(norm, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        norm(torch.autograd.forward_ad.make_dual(x, x))
    norm(x.double())
    norm.double()(x.double())
    norm.float()
    with torch.autocast("cpu", torch.bfloat16):
        norm(x)
    traced = torch.jit.trace(norm, x, check_trace=False)
    compiled = torch.compile(norm, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), want) and torch.equal(traced(x), want)
    with pytest.raises(RuntimeError):
        norm(torch.randn(3, 7))
    two = nn.RMSNorm((3, 8))
    assert fuse_norms(two)[0][0]["reason"] == "it normalizes over 2 axes"
    assert type(two) is nn.RMSNorm
    assert calls == [0]
    assert norm(x).shape == x.shape and calls == [1]


def test_hooks_run(calls: list[int]) -> None:
    norm = nn.RMSNorm(8)
    fuse_norms(norm)
    seen = []
    norm.register_forward_hook(lambda _m, args, y: seen.append((args[0].shape, y.shape)))
    norm.register_forward_pre_hook(lambda _m, args: (args[0] * 2,))
    x = torch.randn(2, 8)
    assert_within_budget(norm(x), nn.RMSNorm(8).double()(2 * x.double()), nn.RMSNorm(8)(2 * x))
    assert seen == [((2, 8), (2, 8))] and calls == [1]


def test_forwards_on_the_instance(calls: list[int]) -> None:
    """One that is there is kept; one that wraps ours follows the class."""
    norm = nn.RMSNorm(8)
    norm.forward = lambda x: x
    assert fuse_norms(norm)[0][0]["reason"].startswith("the norm has a forward of its own")
    assert type(norm) is nn.RMSNorm
    norm = nn.RMSNorm(8)
    fuse_norms(norm)
    norm._old_forward = norm.forward
    to_stock(norm)
    x = torch.randn(2, 8)
    assert torch.equal(norm._old_forward(x), nn.RMSNorm(8)(x)) and calls == [0]


def test_switched_off_by_the_environment(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    for disabled in ("rms_norm", "apply", "rms_norm:cpu"):
        norm = nn.RMSNorm(8)
        with monkeypatch.context() as patch:
            patch.setenv("LORA_KERNELS_DISABLE", disabled)
            (entry,), changed = fuse_norms(norm)
            assert entry["status"] == "stock" and "LORA_KERNELS_DISABLE" in entry["reason"]
            assert not changed and type(norm) is nn.RMSNorm
        fuse_norms(norm)
        with monkeypatch.context() as patch:
            patch.setenv("LORA_KERNELS_DISABLE", disabled)
            norm(torch.ones(2, 8))
            assert calls == [0]
            assert fuse_norms(norm)[1] == [norm] and type(norm) is nn.RMSNorm
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "aten")  # asked for by name: no matter how quick
    fuse_norms(norm)
    norm(torch.ones(2, 8))
    assert calls == [1]


def test_a_class_of_ones_own() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.small = nn.Parameter(torch.ones(8)), 1e-3

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.small)

    norm, x = Mine(), torch.randn(2, 8)
    want, exact = norm(x), copy.deepcopy(norm).double()(x.double())
    assert fuse_norms(norm) == ([], [])
    rms_norm_classes.register_norm(Mine, eps="small")
    try:
        with pytest.raises(InvalidArgumentError, match="replace=True"):
            rms_norm_classes.register_norm(Mine, eps="small")
        fuse_norms(norm)
        assert isinstance(norm, FusedRmsNorm)
        assert_within_budget(norm(x), exact, want)
    finally:
        del rms_norm_classes._rows[Mine.__module__, Mine.__qualname__]
    with pytest.raises(InvalidArgumentError, match="result='same'"):
        rms_norm_classes.register_norm(Mine, result="same")
    with pytest.raises(InvalidArgumentError, match="subclass of"):
        rms_norm_classes.register_norm(3)
