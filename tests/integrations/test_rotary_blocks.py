"""Attention blocks that rotate by the op: the same numbers, nobody else touched, all undone."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from families import FAMILIES, VOCABULARY, oracle, run
from test_families import assert_same
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels._backends import cpu as library_loader
from lora_kernels.integrations.peft import conversion, rotary_blocks
from lora_kernels.testing import BudgetExceededError

library, reason = library_loader.load()
if library is not None and not hasattr(library, "rope_rotate"):
    library, reason = None, "lora_kernels._C was built without rope"
pytestmark = pytest.mark.skipif(library is None, reason=reason)
ROTATING = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "smollm3", "phi3", "gpt_oss",
)  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Rotations:
    def __init__(self) -> None:
        self.count, self.backward = 0, 0

    def take(self) -> int:
        count, self.count = self.count, 0
        return count


@pytest.fixture
def rotations(monkeypatch: pytest.MonkeyPatch) -> Rotations:
    seen, op = Rotations(), rotary_blocks.rope

    def counted(*args: object, **kwargs: object) -> object:
        seen.count += kwargs.get("backend") is None  # what a function computes is found out by one
        return op(*args, **kwargs)

    monkeypatch.setattr(rotary_blocks, "rope", counted)
    return seen


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers stay stock, so that the rotation is all that differs; `apply` would leave a model of
    which no layer is fused as it is, but takes this one for one with layers of our own."""
    stock = "lora_linear,grouped_lora_linear,rms_norm,gated_activation"
    monkeypatch.setenv("LORA_KERNELS_DISABLE", stock)
    monkeypatch.setattr(conversion, "adapter_parameters", lambda module: [module])


def entries(report: object) -> list[dict[str, object]]:
    return [g for g in report.groups if g["kind"] == rotary_blocks.KIND]


def llama(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Tensor]]:
    spec = FAMILIES["llama"]
    return spec.peft_model(dtype), spec.inputs()


def attention_of(model: nn.Module, layer: int = 0) -> nn.Module:
    return model.get_submodule(f"base_model.model.model.layers.{layer}.self_attn")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ROTATING)
def test_numbers_and_undoing(family: str, dtype: str, rotations: Rotations, alone: None) -> None:
    spec = FAMILIES[family]
    model, inputs = spec.peft_model(DTYPES[dtype]), spec.inputs()
    exact, low = oracle(model, inputs), run(model, inputs)
    classes, keys, shown = [type(m) for m in model.modules()], list(model.state_dict()), str(model)
    with lk.applied(model) as report:
        assert [e["status"] for e in entries(report)] == ["fused", "fused"]
        assert "the rotation is one pass" in str(report)
        assert (list(model.state_dict()), str(model)) == (keys, shown)
        got = run(model, inputs)
        assert rotations.take() == 2
        assert_same(got, low, exact)
    assert [type(m) for m in model.modules()] == classes
    again = run(model, inputs)
    assert rotations.take() == 0 and all(torch.equal(t, again[n]) for n, t in low.items())


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_blocks_that_rotate_nothing_are_not_spoken_of(family: str) -> None:
    assert not entries(lk.apply(FAMILIES[family].peft_model(torch.float32)))


@pytest.mark.parametrize("wrong", ["sign", "keys"])
def test_a_planted_fault_is_found(wrong: str, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = llama(torch.bfloat16)
    exact, low = oracle(model, inputs), run(model, inputs)
    lk.apply(model)
    op = rotary_blocks.rope

    def faulty(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return op(q, k, cos, -sin) if wrong == "sign" else (op(q, k, cos, sin)[0], k)

    monkeypatch.setattr(rotary_blocks, "rope", faulty)
    if wrong == "sign":  # turning q and k the other way changes no product of them: turn one
        monkeypatch.setattr(
            rotary_blocks, "rope", lambda q, k, c, s: (op(q, None, c, -s)[0], op(k, None, c, s)[0])
        )
    with pytest.raises(BudgetExceededError):
        assert_same(run(model, inputs), low, exact)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_oss"])
def test_greedy_generation_with_a_cache(family: str, rotations: Rotations) -> None:
    model = FAMILIES[family].peft_model(torch.float32)
    ids = torch.randint(3, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(3))
    settings = {"max_new_tokens": 12, "do_sample": False, "use_cache": True, "min_new_tokens": 12}
    mask = torch.ones_like(ids)
    want = model.generate(input_ids=ids, attention_mask=mask, **settings)
    lk.apply(model)
    got = model.generate(input_ids=ids, attention_mask=mask, **settings)
    assert torch.equal(got, want) and rotations.take() == 2 * 12


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, rotations: Rotations) -> None:
    model, inputs = llama(torch.bfloat16)
    lk.apply(model)
    want = run(model, inputs)
    assert rotations.take() == 2
    model.config.use_cache = False
    model.train()
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    got = run(model, inputs)
    assert all(torch.equal(t, got[n]) for n, t in want.items()) and rotations.take() == 4


def test_compiled_models_rotate_by_their_own_code(rotations: Rotations, alone: None) -> None:
    model, inputs = llama()
    want = model(**inputs).logits
    lk.apply(model)
    model(**inputs)
    assert rotations.take() == 2
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(**inputs).logits, want) and rotations.take() == 0
    torch._dynamo.reset()


def test_other_models_of_the_process_are_left_alone(rotations: Rotations) -> None:
    model, inputs = llama()
    other = FAMILIES["llama"].peft_model(torch.float32)
    lk.apply(model)
    other(**inputs)
    assert rotations.take() == 0 and not isinstance(attention_of(other), rotary_blocks.RotaryBlock)


def test_copies_and_pickles(rotations: Rotations) -> None:
    model, inputs = llama()
    lk.apply(model)
    want = run(model, inputs)
    rotations.take()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for made in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        got = run(made, inputs)
        assert all(torch.equal(t, got[n]) for n, t in want.items())
        assert rotations.take() == 2 and type(attention_of(made)) is type(attention_of(model))
        assert lk.unapply(made) > 0
        run(made, inputs)
        assert rotations.take() == 0


def test_a_function_that_somebody_put_in_its_place_is_what_runs(
    rotations: Rotations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before apply, and after: the module's globals are followed."""
    from transformers.models.llama import modeling_llama as module

    model, inputs = llama()
    lk.apply(model)
    model(**inputs)
    assert rotations.take() == 2
    calls = []

    def nothing(q: Tensor, k: Tensor, *tables: Tensor) -> tuple[Tensor, Tensor]:
        calls.extend(
            [len(tables)] * (q.dtype == torch.float32)
        )  # what it computes is asked in fp64
        return q, k

    monkeypatch.setattr(module, "apply_rotary_pos_emb", nothing)
    model(**inputs)
    assert (calls, rotations.take()) == ([2, 2], 0)
    found = entries(lk.apply(model))
    assert {e["status"] for e in found} == {"stock"}
    assert "another rotation than the op's" in found[0]["reason"]
    assert not isinstance(attention_of(model), rotary_blocks.RotaryBlock)
    monkeypatch.undo()


def test_other_globals_are_followed(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama as module

    model, inputs = llama()
    lk.apply(model)
    model(**inputs)
    calls, stock = [], module.eager_attention_forward

    def watched(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return stock(*args, **kwargs)

    monkeypatch.setattr(module, "eager_attention_forward", watched)
    model(**inputs)
    assert calls == [1, 1]


def test_hooks_and_forwards_of_instances() -> None:
    model, inputs = llama()
    seen: list[int] = []
    attention_of(model).register_forward_hook(lambda *_: seen.append(0))
    own = attention_of(model, 1)
    stock_forward = own.forward
    own.forward = lambda *args, **kwargs: stock_forward(*args, **kwargs)
    found = entries(lk.apply(model))
    assert [e["status"] for e in found] == ["fused", "stock"]
    assert "forward of its own" in found[1]["reason"]
    model(**inputs)
    assert seen == [0]


def test_a_wrapped_forward_follows_the_class(rotations: Rotations) -> None:
    """Libraries keep the bound method that they wrap."""
    model, inputs = llama()
    lk.apply(model)
    block = attention_of(model)
    block._old_forward = block.forward
    block.forward = lambda *args, **kwargs: block._old_forward(*args, **kwargs)
    model(**inputs)
    assert rotations.take() == 2
    lk.unapply(model)
    model(**inputs)
    assert rotations.take() == 0 and type(block)._get_name(block) == "LlamaAttention"


def test_calls_that_are_not_known_are_the_models_own(rotations: Rotations) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as stock

    known = rotary_blocks.rotation_of(stock)
    assert known == (True, False, False, False)
    ours = rotary_blocks._rotate_with(stock, known)
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    cos, sin = torch.rand(2, 5, 8), torch.rand(2, 5, 8)
    again = [t.transpose(1, 2) for t in (q, k)]
    calls = [
        ((*again, cos, sin), {"unsqueeze_dim": 2}),
        ((*again, cos, sin, 2), {}),
        ((q.bfloat16(), k.bfloat16(), cos, sin), {}),
        ((q, k, cos.requires_grad_(), sin), {}),
        ((q[:0], k[:0], cos[:0].detach(), sin[:0]), {}),
    ]
    for args, kwargs in calls:
        for mine, theirs in zip(ours(*args, **kwargs), stock(*args, **kwargs), strict=True):
            assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype
    assert rotations.take() <= 1  # the empty one
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = (f(q, k, cos.detach(), sin)[0] for f in (ours, stock))
    assert mine.dtype == theirs.dtype and rotations.take() == 1


def test_switched_off(monkeypatch: pytest.MonkeyPatch, rotations: Rotations) -> None:
    model, inputs = llama()
    lk.apply(model)
    monkeypatch.setenv("LORA_KERNELS_DISABLE", "rope")
    model(**inputs)
    found = entries(lk.apply(model))
    assert {e["reason"] for e in found} == {"disabled by LORA_KERNELS_DISABLE"}
    model(**inputs)
    assert rotations.take() == 0
    monkeypatch.undo()
    lk.apply(model)
    assert isinstance(attention_of(model), rotary_blocks.RotaryBlock)
    assert not entries(lk.apply(model, fused_rope=False))
    assert not isinstance(attention_of(model), rotary_blocks.RotaryBlock)


def test_unloading_leaves_the_rotation_fused(rotations: Rotations) -> None:
    model, inputs = llama()
    lk.apply(model)
    unloaded = model.merge_and_unload()
    unloaded(**inputs)
    assert rotations.take() == 2
    lk.unapply(unloaded)
    assert not list(rotary_blocks.rotary_blocks(unloaded))
    unloaded(**inputs)
    assert rotations.take() == 0


def test_rotations_that_are_not_the_ops_are_told_apart() -> None:
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as phi3

    assert rotary_blocks.rotation_of(phi3) == (True, True, False, False)

    def backwards(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return phi3(q, k, cos, -sin)

    def slightly(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(t * (1 + 1e-9) for t in phi3(q, k, cos, sin))

    for function in (backwards, slightly, None, lambda *tables: tables[:2]):
        assert rotary_blocks.rotation_of(function) is None
