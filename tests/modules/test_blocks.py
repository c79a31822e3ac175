"""LoRAQKV, LoRAMLP and LoRAAttention against plain PyTorch in fp64."""

from __future__ import annotations

import copy

import pytest
import torch
from block_cases import (
    fill,
    gradients,
    in_fp64,
    plain_attention,
    plain_linear,
    plain_mlp,
    plain_qkv,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels.errors import InvalidArgumentError
from lora_kernels.modules import layer_group, lora_mlp, mlp_function, projections
from lora_kernels.modules.lora_mlp import ACTIVATIONS
from lora_kernels.modules.lora_transposed_linear import LoRATransposedLinear
from lora_kernels.testing import BudgetExceededError, assert_within_budget

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def check(module, plain, x, *, run=None, factor=2.0) -> None:
    """`plain(module, x)` in fp64 is the truth, in the dtype of x the yardstick."""
    double = in_fp64(module)
    exact = gradients(lambda t: plain(double, t), double, x.double())
    low = gradients(lambda t: plain(module, t), module, x)
    got = gradients(run or module, module, x)
    assert got.keys() == exact.keys() == low.keys()
    for name, t in got.items():
        assert t.dtype == low[name].dtype, name
        assert_within_budget(t, exact[name], low[name].to(x.dtype), name, factor)


def tables(length: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(length, width // 2, generator=torch.Generator().manual_seed(3)) * 6.0
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each grouped call had."""
    sizes, op = [], layer_group.grouped_lora_linear

    def recorded(x, weights, *args, **kwargs):
        sizes.append(len(weights))
        return op(x, weights, *args, **kwargs)

    monkeypatch.setattr(layer_group, "grouped_lora_linear", recorded)
    return sizes


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call of a LoRAMLP, whether it was one autograd node."""
    found, fused = [], lora_mlp.fused_mlp

    def recorded(*args, **kwargs):
        y = fused(*args, **kwargs)
        found.append(y is not None)
        return y

    monkeypatch.setattr(lora_mlp, "fused_mlp", recorded)
    return found


@DTYPES
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp(activation, gated, dtype, calls, nodes):
    if (activation, dtype) == ("relu", torch.bfloat16):
        pytest.skip("its derivative jumps where the rounding of the input differs")
    torch.manual_seed(0)
    m = fill(lk.LoRAMLP(24, 40, activation, gated=gated, bias=not gated, r=5, alpha=9, dtype=dtype))
    x = torch.randn(3, 11, 24).to(dtype)
    check(m, plain_mlp, x)
    assert nodes == [True] and calls == []
    m.down_proj.register_forward_hook(lambda *_: None)  # then layer by layer
    check(m, plain_mlp, x)
    assert nodes == [True, False] and calls == ([2] if gated else [])


RANKS = [
    {"gate_proj": 3, "up_proj": 7, "down_proj": 2},
    {"up_proj": 4},
    {"gate_proj": 4, "down_proj": 0},
    {"down_proj": 4},
]


@pytest.mark.parametrize("quant", [None, "nf4", "int8"])
@pytest.mark.parametrize("ranks", RANKS, ids=lambda r: "-".join(r))
def test_mlp_with_any_mix_of_adapters(ranks, quant, nodes):
    torch.manual_seed(0)
    alpha = {"gate_proj": 3, "up_proj": 8}
    m = fill(lk.LoRAMLP(32, 64, r=ranks, alpha=alpha, quant=quant, bias=True))
    adapted = {n.split(".")[0] for n, p in m.named_parameters() if p.requires_grad}
    assert adapted == {name for name, r in ranks.items() if r}
    check(m, plain_mlp, torch.randn(9, 32))
    assert nodes == [quant is None and len(ranks) == 3]


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("frozen", ["none", "x", "lora_A", "lora_B", "down", "first"])
def test_mlp_gradients_that_are_not_needed(frozen, products, monkeypatch, nodes):
    """What is frozen gets none, the others what they get anyway, dS and dB given or not."""
    monkeypatch.setattr(
        mlp_function, "_PRODUCTS", {("cpu", torch.float32)} if products else frozenset()
    )
    torch.manual_seed(0)
    m = fill(lk.LoRAMLP(24, 40, "gelu_tanh", r=4, bias=True))
    for bias in (m.gate_proj.bias, m.down_proj.bias):
        bias.requires_grad_()
    for name, p in m.named_parameters():
        hit = frozen in name or (frozen == "first" and "down" not in name)
        p.requires_grad_(p.requires_grad and not hit)
    x = torch.randn(9, 24)
    if frozen == "x":
        wanted = gradients(m, m, x)
        m.zero_grad()
        m(x).backward(torch.randn(9, 24, generator=torch.Generator().manual_seed(1)).double()
                      .float())  # fmt: skip
        assert all(wanted[n].shape == p.grad.shape for n, p in m.named_parameters()
                   if p.requires_grad)  # fmt: skip
    else:
        check(m, plain_mlp, x)
    assert all(nodes)


def test_mlp_without_gradients_gives_the_same_bits(nodes):
    m = fill(lk.LoRAMLP(24, 40, r=4))
    x = torch.randn(9, 24)
    with torch.no_grad():
        y = m(x)
    assert torch.equal(y, m(x)) and nodes == [True, True]


def test_second_derivatives_of_an_mlp_are_refused():
    m, x = fill(lk.LoRAMLP(8, 8, r=2)), torch.randn(3, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        dx.sum().backward()


@DTYPES
@pytest.mark.parametrize("joint", [False, True], ids=["q-k-v", "qkv"])
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def test_qkv(joint, norm, dtype, calls):
    torch.manual_seed(0)
    m = lk.LoRAQKV(
        24, 4, 2, 10, fused_qkv=joint, qk_norm=norm, bias=True, r=4, alpha=8, dtype=dtype
    )
    cos, sin = tables(7, 10)
    check(
        fill(m), lambda mod, t: plain_qkv(mod, t, cos, sin), torch.randn(3, 7, 24).to(dtype),
        run=lambda t: m(t, cos, sin),
    )  # fmt: skip
    # Without norms the rotation is part of the call: test_lora_qkv_module.py.
    assert calls == ([3] if norm and not joint else [])
    check(m, plain_qkv, torch.randn(3, 7, 24).to(dtype))


@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize(
    "ranks",
    [{"q_proj": 2, "k_proj": 5, "v_proj": 3}, {"q_proj": 4, "v_proj": 8}, {"k_proj": 1}, {}],
    ids=lambda r: "-".join(r) or "none",
)
def test_qkv_with_any_mix_of_adapters(ranks, quant, calls):
    torch.manual_seed(0)
    m = fill(lk.LoRAQKV(32, 4, 2, r=ranks, alpha=8, quant=quant))
    check(m, plain_qkv, torch.randn(2, 5, 32))
    assert calls == ([len(ranks)] if quant is None and len(ranks) > 1 else [])


def test_frozen_layers_beside_adapted_ones_are_part_of_their_call(calls):
    """In bf16, where that pays; each adapter still drops its own elements of x."""
    torch.manual_seed(0)
    m = fill(lk.LoRAQKV(32, 4, 2, r={"q_proj": 4, "v_proj": 3}, bias=True, dtype=torch.bfloat16))
    check(m, plain_qkv, torch.randn(2, 5, 32).bfloat16())
    mlp = fill(lk.LoRAMLP(32, 64, r={"up_proj": 4}, dtype=torch.bfloat16))
    check(mlp, plain_mlp, torch.randn(7, 32).bfloat16())
    assert calls == [3, 2]
    m.k_proj.weight.requires_grad_()
    check(m, plain_qkv, torch.randn(2, 5, 32).bfloat16())
    m.k_proj.requires_grad_(False).register_forward_hook(lambda *_: None)
    check(m, plain_qkv, torch.randn(2, 5, 32).bfloat16())
    assert calls[2:] == [2, 2]


@DTYPES
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": False}, {"window": (2, 0), "softcap": 3.0}, {"sinks": True, "scale": 0.2},
     {"fused_qkv": True, "qk_norm": True, "output_bias": True}],
    ids=lambda o: "-".join(o) or "causal",
)  # fmt: skip
def test_attention(options, dtype):
    torch.manual_seed(0)
    m = fill(lk.LoRAAttention(24, 4, 2, 8, r=4, alpha=8, dtype=dtype, **options))
    cos, sin = tables(9, 8)
    check(
        m, lambda mod, t: plain_attention(mod, t, cos, sin), torch.randn(2, 9, 24).to(dtype),
        run=lambda t: m(t, cos, sin), factor=3.0,  # FlashAttention's own for gradients
    )  # fmt: skip


def test_attention_decodes_with_its_past():
    m = fill(lk.LoRAAttention(24, 4, 2, qk_norm=True)).eval()
    cos, sin = tables(9, 6)
    x = torch.randn(2, 9, 24)
    with torch.no_grad():
        double = in_fp64(m)
        exact = plain_attention(double, x.double(), cos, sin)
        low = plain_attention(m, x, cos, sin)
        past, steps = None, []
        for a, b in ((0, 4), (4, 8), (8, 9)):
            y, past = m(x[:, a:b], cos[a:b], sin[a:b], past=past, return_kv=True)
            steps.append(y)
    assert_within_budget(torch.cat(steps, 1), exact, low)
    assert past[0].shape == (2, 9, 2, 6)


def test_attention_of_packed_sequences():
    m = fill(lk.LoRAAttention(24, 4)).eval()
    x, cu = torch.randn(9, 24), torch.tensor([0, 4, 9])
    with torch.no_grad():
        parts = [plain_attention(in_fp64(m), x[None, a:b].double())[0] for a, b in ((0, 4), (4, 9))]
        low = [plain_attention(m, x[None, a:b])[0] for a, b in ((0, 4), (4, 9))]
        assert_within_budget(m(x, cu_seqlens=cu), torch.cat(parts), torch.cat(low))


def test_layers_that_exist_are_shared():
    linears = [nn.Linear(24, n) for n in (40, 40)]
    down = LoRATransposedLinear(nn.Parameter(torch.randn(40, 24)), r=3)
    gate = lk.LoRALinear.from_linear(linears[0], r=3)
    m = fill(lk.LoRAMLP.from_layers(gate, linears[1], down, "gelu"))
    assert m.gate_proj is gate and m.up_proj is linears[1] and m.down_proj is down
    check(m, plain_mlp, torch.randn(5, 24))
    layers = [lk.LoRALinear(24, n, r=2) for n in (32, 16, 16)]
    output = nn.Linear(32, 24)
    a = fill(lk.LoRAAttention.from_layers(*layers, output, num_heads=4, num_kv_heads=2))
    assert a.q_proj is layers[0] and a.o_proj is output and a.head_dim == 8
    check(a, plain_attention, torch.randn(2, 5, 24), factor=3.0)


def test_a_planted_fault_is_found(monkeypatch):
    m = fill(lk.LoRAMLP(24, 40, r=4))
    x = torch.randn(7, 24)
    with monkeypatch.context() as planted:
        planted.setattr(type(m.up_proj), "scaling", property(lambda self: 1.0))
        double, low = in_fp64(m), None
        exact = gradients(lambda t: plain_mlp(double, t), double, x.double())
        low = gradients(lambda t: plain_mlp(m, t), m, x)
    got = gradients(m, m, x)
    for name in ("y0", "dx", "gate_proj.lora_B"):
        with pytest.raises(BudgetExceededError):
            assert_within_budget(got[name], exact[name], low[name])


def test_each_adapter_drops_its_own_elements(calls):
    m = lk.LoRAQKV(16, 2, r=16, dropout=0.5).train()
    with torch.no_grad():
        for layer in (m.q_proj, m.k_proj, m.v_proj):
            layer.weight.zero_()
            layer.lora_A.copy_(torch.eye(16))
            layer.lora_B.copy_(torch.eye(16))
    q, k, v = m(torch.ones(64, 16))
    assert calls == [3]
    masks = [t.flatten(-2) != 0 for t in (q, k, v)]
    assert all(0.4 < mask.float().mean() < 0.6 for mask in masks)
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])
    q, _, _ = m.eval()(torch.ones(64, 16))
    assert (q != 0).all()


def test_different_dropout_is_obeyed(calls):
    m = lk.LoRAMLP(16, 16, r=16, dropout={"gate_proj": 1.0})
    with torch.no_grad():
        for layer in (m.gate_proj, m.up_proj):
            layer.weight.zero_()
            layer.lora_A.copy_(torch.eye(16))
            layer.lora_B.copy_(torch.eye(16))
    gate, up = projections.project((m.gate_proj, m.up_proj), torch.ones(4, 16))
    assert calls == [] and (gate == 0).all() and (up != 0).all()


def saved_bytes(module: nn.Module, x: torch.Tensor) -> int:
    """Of activations: distinct storages that are neither parameters nor x."""
    known = {p.untyped_storage().data_ptr() for p in module.parameters()}
    seen: dict[int, int] = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known | {x.untyped_storage().data_ptr()}:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x)
    del y
    return sum(seen.values())


def test_what_is_kept_for_the_backward():
    """gate, up and the S of each adapter. Under hooks of others the activation is kept as well."""
    m = fill(lk.LoRAMLP(32, 64, r=4))
    x = torch.randn(50, 32, requires_grad=True)
    assert saved_bytes(m, x) == 4 * 50 * (3 * 64 + 8 + 4)


@pytest.mark.parametrize("gated", [True, False])
def test_recomputing_changes_no_bit(gated, monkeypatch):
    m = fill(lk.LoRAMLP(32, 64, "gelu", gated=gated, r=4, dropout=0.3)).train()
    count, ops = [0], mlp_function._ops

    class Counted:
        def __getattr__(self, name):
            count[0] += name == "gated_activation_fwd"
            return getattr(ops, name)

    monkeypatch.setattr(mlp_function, "_ops", Counted())
    x, found, computed = torch.randn(50, 32), [], []
    for recompute in (True, False):
        m.recompute, count[0] = recompute, 0
        torch.manual_seed(3)
        found.append(gradients(m, m, x))
        computed.append(count[0])
    assert computed == [2, 1]
    assert all(torch.equal(a, b) for a, b in zip(*(f.values() for f in found), strict=True))


def test_an_input_changed_in_place_is_noticed():
    m = fill(lk.LoRAMLP(16, 16, "relu", gated=False, r=2))
    outputs = []
    m.up_proj.register_forward_hook(lambda _m, _i, y: outputs.append(y))
    y = m(torch.randn(3, 16, requires_grad=True))
    with torch.no_grad():
        outputs[0].mul_(2.0)
    with pytest.raises(RuntimeError, match="in place"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    m = fill(lk.LoRAMLP(16, 24, r=2, dropout=0.4)).train()
    x, found = torch.randn(9, 16), []
    for run in (m, lambda t: checkpoint(m, t, use_reentrant=reentrant)):
        torch.manual_seed(0)
        found.append(gradients(run, m, x))
    assert all(torch.equal(a, b) for a, b in zip(*(f.values() for f in found), strict=True))


def test_autocast():
    for m, plain in (
        (fill(lk.LoRAMLP(24, 40, r=4)), plain_mlp),
        (fill(lk.LoRAQKV(24, 4, r=4)), plain_qkv),
    ):
        x = torch.randn(2, 5, 24)
        double = in_fp64(m)
        exact = gradients(lambda t, p=plain, d=double: p(d, t), double, x.double())
        with torch.autocast("cpu", torch.bfloat16):
            low = gradients(lambda t, p=plain, o=m: p(o, t), m, x)
            got = gradients(m, m, x)
        assert got["y0"].dtype == torch.bfloat16
        for name, t in got.items():
            assert_within_budget(t, exact[name], low[name].bfloat16(), name)


@pytest.mark.parametrize("kind", ["mlp", "qkv", "attention"])
def test_compiled(kind):
    torch.compiler.reset()
    m = fill(
        {"mlp": lambda: lk.LoRAMLP(16, 24, r=2), "qkv": lambda: lk.LoRAQKV(16, 2, r=2),
         "attention": lambda: lk.LoRAAttention(16, 2, r=2)}[kind]()
    )  # fmt: skip
    x = torch.randn(2, 5, 16)
    want = gradients(m, m, x)
    got = gradients(torch.compile(m, fullgraph=True, backend="aot_eager"), m, x)
    for name, t in got.items():
        assert_within_budget(t, want[name].double(), want[name], name)


def test_adapter_files_round_trip(tmp_path):
    m = nn.Sequential(fill(lk.LoRAAttention(16, 2, r=2, alpha=4)))
    lk.save_adapter(m, tmp_path / "a")
    other = nn.Sequential(lk.LoRAAttention(16, 2, r=2, alpha=4))
    other.load_state_dict(
        {n: t for n, t in m.state_dict().items() if "lora" not in n}, strict=False
    )
    lk.load_adapter(other, tmp_path / "a")
    x = torch.randn(1, 4, 16)
    assert torch.equal(m(x), other(x))
    lk.merge(m)
    merged = m(x)
    assert_within_budget(merged, other.double()(x.double()), other.float()(x))


def test_disabled_merged_and_hooked_layers_run_by_themselves(calls):
    m = fill(lk.LoRAQKV(16, 2, r=2))
    x = torch.randn(3, 16)
    m.k_proj.adapter_enabled = False
    k = m(x)[1]
    assert calls == [2] and torch.equal(k.flatten(-2), nn.functional.linear(x, m.k_proj.weight))
    m.k_proj.adapter_enabled = True
    seen = []
    m.q_proj.register_forward_hook(lambda *_: seen.append(1))
    m(x)
    assert calls == [2, 2] and seen == [1]
    assert_within_budget(
        m(x)[0].flatten(-2), plain_linear(in_fp64(m.q_proj), x.double()), plain_linear(m.q_proj, x)
    )


def test_copies_and_moves():
    m = fill(lk.LoRAAttention(16, 2, r=2, sinks=True))
    x = torch.randn(1, 4, 16)
    assert torch.equal(copy.deepcopy(m)(x), m(x))
    keys = {"q_proj.weight", "q_proj.lora_A", "o_proj.lora_B", "sinks"}
    assert keys <= set(m.state_dict())
    assert m.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lk.LoRAMLP(8, 8, "swish"), "activation='swish'"),
        (lambda: lk.LoRAMLP(8, 8, r={"q_proj": 2}), "r has a value for 'q_proj'"),
        (lambda: lk.LoRAMLP(8, 8, gated=False, r={"gate_proj": 2}), "'gate_proj'"),
        (lambda: lk.LoRAMLP(8, 8, r=-1), "r=-1"),
        (lambda: lk.LoRAMLP(8, 8, dropout=1.5), "dropout"),
        (lambda: lk.LoRAMLP.from_layers(None, nn.Linear(8, 9), nn.Linear(8, 8)), "down has in_f"),
        (lambda: lk.LoRAMLP.from_layers(*(nn.Linear(8, n) for n in (7, 9, 8))), "differ"),
        (lambda: lk.LoRAMLP.from_layers(None, nn.Conv1d(8, 9, 1), nn.Linear(9, 8)), "a Conv1d"),
        (lambda: lk.LoRAQKV(10, 4), "no multiple"),
        (lambda: lk.LoRAQKV(12, 4, 3), "does not divide"),
        (lambda: lk.LoRAQKV(12, 0), "num_heads=0"),
        (lambda: lk.LoRAQKV(12, 4, fused_qkv=True, r={"q_proj": 2}), "'q_proj'"),
        (lambda: lk.LoRAQKV.from_layers(nn.Linear(8, 8), num_heads=2), "out_features=8"),
        (lambda: lk.LoRAQKV.from_layers(*[nn.Linear(8, 9)] * 3, num_heads=2), "out_features=9"),
        (lambda: lk.LoRAQKV.from_layers(*[nn.Linear(8, 8)] * 2, num_heads=2), "2 layers"),
        (lambda: lk.LoRAAttention(8, 2, attention_dropout=2.0), "attention_dropout"),
        (lambda: lk.LoRAAttention.from_layers(nn.Linear(8, 8), num_heads=2), "1 layers"),
        (lambda: lk.LoRAQKV(8, 2)(torch.zeros(2, 8), torch.zeros(2, 4)), "give both or none"),
        (lambda: lk.LoRAAttention(8, 2)(
            torch.zeros(2, 8), cu_seqlens=torch.tensor([0, 2]), past=(torch.zeros(1),) * 2
        ), "past cannot be used"),
    ],
)  # fmt: skip
def test_messages(make, message):
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
