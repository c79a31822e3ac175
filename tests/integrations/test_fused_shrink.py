"""apply(fused_shrink=True): S made by norms and activations, where it is right to take it."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, NothingInFloat32, oracle, run
from test_families import assert_same
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels._backends import cpu as library_loader
from lora_kernels.errors import InvalidArgumentError
from lora_kernels.integrations.peft import shrink_links
from lora_kernels.integrations.transformers import rms_norms
from lora_kernels.modules import handed_shrink, producers
from lora_kernels.modules.layer_group import FEEDS, LayerGroup, fed_by
from lora_kernels.ops.gated_activation import cpu as activation_kernels
from lora_kernels.testing import BudgetExceededError

library, reason = library_loader.load()
pytestmark = pytest.mark.skipif(library is None, reason=reason)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many S of norms and of activations were taken by layers."""
    found, take = {"norm": 0, "activation": 0}, LayerGroup.take
    activate = activation_kernels.gated_activation_fwd

    def counted(self: LayerGroup, *args: Any) -> Tensor | None:
        s = take(self, *args)
        found["norm"] += s is not None
        return s

    def counted_activation(*args: Any) -> tuple[Tensor, Tensor]:
        found["activation"] += bool(args[3])
        return activate(*args)

    monkeypatch.setattr(LayerGroup, "take", counted)
    monkeypatch.setattr(activation_kernels, "gated_activation_fwd", counted_activation)
    return found


def groups(model: nn.Module) -> list[LayerGroup]:
    return [g for m in model.modules() if (g := fed_by(m)) is not None]


def left(model: nn.Module) -> list[LayerGroup]:
    """Groups that still hold an S."""
    return [g for g in groups(model) if g._offers]


def assert_near(got: Tensor, low: Tensor, stock: nn.Module, *args: Any, **inputs: Any) -> None:
    """Logits against those of a model that hands nothing on, in its own dtype and in fp64."""
    double = copy.deepcopy(stock).double()
    with torch.no_grad(), NothingInFloat32():
        exact = double(*(t.double() for t in args), **inputs)
    exact = exact if isinstance(exact, Tensor) else exact.logits
    assert_same({"logits": got}, {"logits": low}, {"logits": exact})


def tiny(dtype: torch.dtype = torch.float32, family: str = "llama", **options: Any) -> nn.Module:
    model = FAMILIES[family].peft_model(dtype)
    lk.apply(model, **{"fused_shrink": True} | options)
    return model


CASES = [
    *((f, torch.bfloat16) for f in ("llama", "qwen3", "gemma2", "gemma3", "mistral", "phi3")),
    *((f, torch.float32) for f in ("llama", "gemma3", "phi3", "t5_gated")),
]


@pytest.mark.parametrize(("family", "dtype"), CASES, ids=str)
def test_families(family: str, dtype: torch.dtype, taken: dict[str, int]) -> None:
    """Left padding, every adapter gradient, and nothing left behind or changed."""
    spec = FAMILIES[family]
    model, inputs = spec.peft_model(dtype), spec.inputs()
    exact, low = oracle(model, inputs), run(model, inputs)
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    report = lk.apply(model, fused_shrink=True)
    assert {(e["status"], e["reason"]) for e in report.shrinks} == {("fused", "")}
    kinds = [e["kind"] for e in report.shrinks]
    assert kinds.count("norm_shrink") == 4 and kinds.count("activation_shrink") == 2
    assert "S made by the norm in front" in str(report)
    assert_same(run(model, inputs), low, exact)
    assert taken["norm"] == 4 and taken["activation"] == 2
    assert not left(model) and list(model.state_dict()) == keys
    lk.unapply(model)
    assert not groups(model) and [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize("wrong", ["norm", "activation"])
def test_a_planted_fault_is_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = FAMILIES["llama"]
    model, inputs = spec.peft_model(torch.bfloat16), spec.inputs()
    exact, low = oracle(model, inputs), run(model, inputs)
    lk.apply(model, fused_shrink=True)
    if wrong == "norm":
        put = handed_shrink.Offers.put
        monkeypatch.setattr(
            handed_shrink.Offers, "put", lambda self, y, s, *rest: put(self, y, 1.2 * s, *rest)
        )
    else:
        activate = activation_kernels.gated_activation_fwd

        def planted(*args: Any) -> tuple[Tensor, Tensor]:
            h, s = activate(*args)
            return h, 1.5 * s

        monkeypatch.setattr(activation_kernels, "gated_activation_fwd", planted)
    with pytest.raises(BudgetExceededError):
        assert_same(run(model, inputs), low, exact)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(reentrant: bool, taken: dict[str, int]) -> None:
    model, inputs = tiny(torch.bfloat16), FAMILIES["llama"].inputs()
    plain = run(model, inputs)
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = run(model, inputs)
    assert taken["norm"] == 4 * 3
    assert all(torch.equal(t, plain[n]) for n, t in again.items())
    assert not left(model)


def _changed(module: nn.Module, args: Any, y: Tensor) -> None:
    with torch.no_grad():
        y.mul_(1.5)


NORM_HOOKS: dict[str, Callable[..., Any]] = {
    "replaced": lambda m, a, y: 1.5 * y,
    "a view": lambda m, a, y: y.view_as(y),
    "changed in place": _changed,
}


@pytest.mark.parametrize("what", NORM_HOOKS)
def test_what_hooks_do_to_the_norms_result(what: str, taken: dict[str, int]) -> None:
    """The layers then make S of what they get; an exact comparison, since nothing is handed on."""
    results = []
    for handed in (True, False):
        model = tiny(fused_shrink=handed, recompute_activations=False)
        lk_blocks = [m for m in model.modules() if shrink_links.SHRINK in m.__dict__]
        for block in lk_blocks:
            del block.__dict__[shrink_links.SHRINK]
        for name, module in model.named_modules():
            if name.endswith("layernorm"):
                module.register_forward_hook(NORM_HOOKS[what])
        with torch.no_grad():
            results.append(model(**FAMILIES["llama"].inputs()).logits)
        assert not left(model)
    assert torch.equal(*results)
    assert taken["norm"] == 0


def _merged(model: Any) -> None:
    model.merge_adapter()


def _dropping(model: Any) -> None:
    for module in model.modules():
        if (
            isinstance(module, nn.ModuleDict)
            and type(module._modules.get("default")) is nn.Identity
        ):
            module["default"] = nn.Dropout(0.5)
    model.train()


def _hooked(model: Any) -> None:
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "gate_proj")):
            module.register_forward_pre_hook(lambda *_: None)


CALLS: dict[str, Callable[[Any], None]] = {
    "merged": _merged, "dropout": _dropping, "hooks": _hooked,
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
}  # fmt: skip


@pytest.mark.parametrize("what", CALLS)
def test_calls_in_which_the_layers_make_it(what: str, taken: dict[str, int]) -> None:
    results = []
    for handed in (True, False):
        model = tiny(fused_shrink=handed)
        for block in (m for m in model.modules() if shrink_links.SHRINK in m.__dict__):
            block.__dict__[shrink_links.SHRINK] = False
        CALLS[what](model)
        torch.manual_seed(4)
        results.append(model(**FAMILIES["llama"].inputs()).logits)
        assert not left(model)
    assert torch.equal(*results)
    assert taken["norm"] == 0


def test_inference_mode_autocast_and_no_grad(taken: dict[str, int]) -> None:
    """Tensors of inference mode tell of no changes: nothing is handed on there."""
    inputs = FAMILIES["llama"].inputs()
    model, plain = tiny(), tiny(fused_shrink=False)
    with torch.inference_mode():
        model(**inputs)
    assert taken["norm"] == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(**inputs).logits).all()
    assert taken["norm"] == 0  # the norm's result is wider than what the layers multiply
    with torch.no_grad():
        got, want = model(**inputs).logits, plain(**inputs).logits
    assert taken["norm"] == 4
    assert_near(got, want, plain, **inputs)


def _group_of_two() -> tuple[nn.Module, LayerGroup, Tensor]:
    model = tiny()
    norm = next(m for m in model.modules() if FEEDS in m.__dict__)
    group = norm.__dict__[FEEDS]
    return norm, group, torch.randn(2, 5, 32)


@pytest.mark.parametrize("what", ["same", "adapter", "adapter changed", "grad mode", "x", "thread"])
def test_what_an_offer_is_good_for(what: str, taken: dict[str, int]) -> None:
    norm, group, x = _group_of_two()
    layer: Any = group.members[0]
    y = norm(x)
    assert bool(group._offers)
    if what == "adapter":
        a = layer.lora_A["default"]
        a.weight = nn.Parameter(a.weight.detach().clone())
    elif what == "adapter changed":
        with torch.no_grad():
            layer.lora_A["default"].weight.mul_(2.0)
    with torch.set_grad_enabled(what != "grad mode"):
        if what == "thread":
            other = threading.Thread(target=layer, args=(y,))
            other.start()
            other.join()
        else:
            layer(y.clone() if what == "x" else y)
    assert taken["norm"] == (what == "same")
    assert bool(group._offers) == (what == "thread")  # it is for the thread that made it


def test_an_offer_ends_with_its_tensor_or_the_next_call() -> None:
    norm, group, x = _group_of_two()
    y = norm(x)
    s = weakref.ref(next(iter(group._offers._held.values())).s)
    del y
    gc.collect()
    assert not group._offers and s() is None
    y = norm(x)
    first = weakref.ref(next(iter(group._offers._held.values())).s)
    z = norm(x)
    assert first() is None and len(group._offers._held) == 1
    group.members[0](y)
    assert not group._offers
    del z


def test_norms_whose_s_nobody_takes_stop(caplog: pytest.LogCaptureFixture) -> None:
    norm, group, x = _group_of_two()
    with caplog.at_level(logging.WARNING, "lora_kernels"):
        for _ in range(12):
            norm(x)
    assert FEEDS not in norm.__dict__ and group.producer is None
    assert "no longer made by the norm" in caplog.text


def test_threads_keep_their_own() -> None:
    model = tiny()
    inputs = [torch.randint(3, 61, (1, n)) for n in (4, 9)]
    with torch.no_grad():
        want = [model(input_ids=ids).logits for ids in inputs]
    got: list[list[Tensor]] = [[], []]

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                got[i].append(model(input_ids=inputs[i]).logits)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for outputs, wanted in zip(got, want, strict=True):
        assert len(outputs) == 5 and all(torch.equal(t, wanted) for t in outputs)


def test_generation_with_a_cache(taken: dict[str, int]) -> None:
    prompt = torch.tensor([[5, 9, 17, 3]])
    tokens = []
    for handed in (True, False):
        model = tiny(fused_shrink=handed)
        tokens.append(model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False))
    assert torch.equal(*tokens) and taken["norm"] == 4 * (tokens[0].shape[1] - prompt.shape[1])


def test_copies_and_pickles(taken: dict[str, int]) -> None:
    model, inputs = tiny(), FAMILIES["llama"].inputs()
    want = model(**inputs).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        mine, theirs = groups(model), groups(other)
        assert len(mine) == len(theirs) == 4 and not {map(id, mine)} & {map(id, theirs)}
        before = taken["norm"]
        assert torch.equal(other(**inputs).logits, want)
        assert taken["norm"] == before + 4


def test_mixed_batches(taken: dict[str, int]) -> None:
    """An adapter per row: PEFT's own forward, whatever the norm has made."""
    model, stock = (FAMILIES["llama"].peft_model(torch.float32) for _ in "12")
    for one in (model, stock):
        torch.manual_seed(7)
        one.add_adapter("other", one.peft_config["default"])
        one.eval()
    lk.apply(model, fused_shrink=True)
    ids = torch.randint(3, 61, (2, 6))
    names = ["default", "other"]
    with torch.no_grad():
        got = model(input_ids=ids, adapter_names=names).logits
        want = stock(input_ids=ids, adapter_names=names).logits
    assert taken["norm"] == 0 and not left(model)
    assert_near(got, want, stock, input_ids=ids, adapter_names=names)
    with torch.no_grad():
        model(input_ids=ids)
        model.set_adapter("other")
        model(input_ids=ids)
    assert taken["norm"] == 8


def test_auto_on_a_cpu_and_the_switch() -> None:
    model = FAMILIES["llama"].peft_model(torch.float32)
    report = lk.apply(model)
    assert {e["reason"] for e in report.shrinks} == {"measured to be slower on a CPU"}
    assert not groups(model) and not any(FEEDS in m.__dict__ for m in model.modules())
    assert "6 blocks whose layers make S themselves: measured to be slower" in str(report)
    assert lk.apply(model, fused_shrink=False).shrinks[0]["reason"] == "fused_shrink is False"
    with lk.applied(model, fused_shrink=True) as inner:
        assert inner.shrinks[0]["status"] == "fused" and len(groups(model)) == 4
    assert not groups(model)
    lk.apply(model, fused_shrink=True)
    with lk.applied(model):
        assert not groups(model)
    assert len(groups(model)) == 4
    with pytest.raises(InvalidArgumentError, match="fused_shrink='on'; accepted: True, False"):
        lk.apply(model, fused_shrink="on")


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    def reasons(model: nn.Module, **options: Any) -> set[str]:
        report = lk.apply(model, fused_shrink=True, **options)
        return {e["reason"] for e in report.shrinks}

    model = FAMILIES["llama"].peft_model(torch.float32)
    assert reasons(model, fused_norms=False) == {"fused_norms is False", ""}
    for module in model.modules():
        if type(module).__name__ == "LlamaMLP":
            module.up_proj.register_forward_hook(lambda *_: None)
    assert reasons(model) == {"", "up_proj: the layer has hooks"}
    dropped = FAMILIES["llama"].peft_model(torch.float32)
    _dropping(dropped)
    assert reasons(dropped) == {"in evaluation only, since the adapters have dropout"}
    monkeypatch.setenv("LORA_KERNELS_DISABLE", "norm_shrink")
    assert "disabled by LORA_KERNELS_DISABLE" in reasons(
        FAMILIES["llama"].peft_model(torch.float32)
    )


class Residual(nn.Module):
    """A class that the table does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.proj = nn.RMSNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(self.norm(x))


@pytest.fixture
def residual(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(producers, "_rows", producers.rows())
    producers.register_producer(Residual, ("norm", "proj"))
    torch.manual_seed(0)
    model = nn.Sequential(Residual(), Residual())
    lk.replace_modules(model, r=2, alpha=4, targets=["proj"])
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, lk.LoRALinear):
                module.lora_B.normal_()
    return model


def test_a_class_of_ones_own(residual: nn.Module, taken: dict[str, int]) -> None:
    with pytest.raises(InvalidArgumentError, match="has a row already"):
        producers.register_producer(Residual, ("norm", "proj"))
    with pytest.raises(InvalidArgumentError, match="two attribute names"):
        producers.register_producer(nn.Linear, ("norm",))
    x, stock = torch.randn(3, 16), copy.deepcopy(residual)
    with torch.no_grad():
        report = lk.apply(residual, fused_shrink=True)
        assert [e["members"] for e in report.shrinks] == [["proj"], ["proj"]]
        assert_near(residual(x), stock(x), stock, x)
    assert taken["norm"] == 2 and type(residual[0].proj) is not lk.LoRALinear
    lk.unapply(residual)
    assert type(residual[0].proj) is lk.LoRALinear


def test_traced_models_run_the_models_own_norms(residual: nn.Module, taken: dict[str, int]) -> None:
    x = torch.randn(3, 16)
    stock = copy.deepcopy(residual)
    lk.apply(residual, fused_shrink=True)
    with torch.no_grad():
        norm = residual[0].norm
        y = norm(x)  # an offer that is there while the model is traced stays out of it
        got = torch.compile(residual, backend="eager")(x)
        assert taken["norm"] == 0 and fed_by(norm)._offers
        assert_near(got, stock(x), stock, x)
        residual[0].proj(y)
    assert taken["norm"] == 1


def test_norms_that_would_not_pay_run_for_what_they_make(
    monkeypatch: pytest.MonkeyPatch, taken: dict[str, int]
) -> None:
    """Where no kernel beats the model's own norm, S in it may still pay: the norm is fused."""
    monkeypatch.setattr(rms_norms, "_choice", lambda *_: ("no kernel beats the model's own", ""))
    model = FAMILIES["llama"].peft_model(torch.float32)
    report = lk.apply(model, fused_shrink=True)
    assert [n["status"] for n in report.norms].count("fused") == 4
    with torch.no_grad():
        model(**FAMILIES["llama"].inputs())
    assert taken["norm"] == 4
    lk.apply(model)
    assert not any(isinstance(m, rms_norms.FusedRmsNorm) for m in model.modules())
