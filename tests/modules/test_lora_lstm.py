"""LoRALSTM against torch's LSTM on written-out weights, in every form that nn.LSTM has."""

from __future__ import annotations

import copy
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.modules.lora_lstm import LoRALSTM
from lora_kernels.testing import BudgetExceededError, assert_within_budget

FORMS = [
    {"num_layers": layers, "bidirectional": both, "proj_size": proj, "batch_first": first}
    for layers, both, proj, first in itertools.product((1, 2), (False, True), (0, 3), (False, True))
]


def strengthen(lstm):
    """Updates as large as the weights."""
    with torch.no_grad():
        for name in lstm.adapted_names():
            a, b = lstm._pair(name)
            b.normal_()
            b.mul_(getattr(lstm, name).norm() / (lstm.scaling * (b @ a)).norm())
    return lstm


def make(adapt=("ih", "hh"), dtype=torch.float32, r=3, **form):
    torch.manual_seed(4)
    return strengthen(LoRALSTM(5, 7, r=r, alpha=6, adapt=adapt, dtype=dtype, **form))


def written_out(lstm, dtype):
    """nn.LSTM whose weights are leaves W + s B A; (lstm, {name: (a, b)} with gradients)."""
    plain = nn.LSTM(
        lstm.input_size, lstm.hidden_size, lstm.num_layers, bias=lstm.bias,
        batch_first=lstm.batch_first, bidirectional=lstm.bidirectional, proj_size=lstm.proj_size,
        dtype=dtype,
    )  # fmt: skip
    state = {n: t.to(dtype) for n, t in lstm.state_dict().items() if not n.startswith("lora_")}
    plain.load_state_dict(state)
    pairs, weights = {}, dict(plain.named_parameters())
    for name in lstm.adapted_names():
        a, b = (t.detach().to(dtype).requires_grad_() for t in lstm._pair(name))
        pairs[name] = (a, b)
        weights[name] = weights[name].detach() + lstm.scaling * (b @ a)
    return plain, weights, pairs


def results(lstm, x, hx=None, dtype=None):
    """Output, states and gradients of x and of the factors, as a flat dictionary."""
    x = x.detach().to(dtype or x.dtype).requires_grad_()
    hx = None if hx is None else tuple(h.to(x.dtype) for h in hx)
    if dtype is None:
        y, (h, c) = lstm(x, hx)
        pairs = {name: lstm._pair(name) for name in lstm.adapted_names()}
    else:
        plain, weights, pairs = written_out(lstm, dtype)
        y, (h, c) = torch.func.functional_call(plain, weights, (x, hx))
    generator = torch.Generator().manual_seed(8)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    for a, b in pairs.values():
        a.grad = b.grad = None
    ((y * dy).sum() + c.sum()).backward()
    found = {"y": y.detach(), "h": h.detach(), "c": c.detach(), "dx": x.grad}
    for name, (a, b) in pairs.items():
        found |= {f"dA {name}": a.grad, f"dB {name}": b.grad}
    return found


def check(lstm, x, hx=None):
    got = results(lstm, x, hx)
    exact, low = results(lstm, x, hx, torch.float64), results(lstm, x, hx, x.dtype)
    assert got.keys() == exact.keys() and len(got) > 4
    for name, t in got.items():
        assert_within_budget(t, exact[name], low[name], name)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(str(int(v)) for v in f.values()))
def test_equals_the_lstm_with_its_weights_written_out(form):
    lstm = make(**form)
    check(lstm, torch.randn(4, 6, 5))
    directions, out = 1 + form["bidirectional"], form["proj_size"] or 7
    batch = 4 if form["batch_first"] else 6
    layers = form["num_layers"] * directions
    check(lstm, torch.randn(4, 6, 5), (torch.randn(layers, batch, out),
                                       torch.randn(layers, batch, 7)))  # fmt: skip


@pytest.mark.parametrize(
    ("adapt", "kinds"), [("ih", {"ih"}), (("hh",), {"hh"}), (("hh", "ih"), {"ih", "hh"})]
)
def test_adapts_what_it_is_told(adapt, kinds):
    lstm = make(adapt, num_layers=2)
    assert {n.split("_")[1] for n in lstm.adapted_names()} == kinds
    check(lstm, torch.randn(3, 2, 5))


def test_unbatched_input_and_no_bias():
    check(make(bias=False), torch.randn(6, 5))


def test_packed_sequences():
    lstm = make(num_layers=2, bidirectional=True)
    x, lengths = torch.randn(6, 3, 5), torch.tensor([6, 2, 4])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    got, (h, _) = lstm(packed)
    assert isinstance(got, PackedSequence)
    plain, weights, _ = written_out(lstm, torch.float64)
    wide = PackedSequence(packed.data.double(), *packed[1:])
    want, (h64, _) = torch.func.functional_call(plain, weights, (wide,))
    plain32, weights32, _ = written_out(lstm, torch.float32)
    low, (h32, _) = torch.func.functional_call(plain32, weights32, (packed,))
    assert_within_budget(got.data, want.data, low.data)
    assert_within_budget(h, h64, h32)


def test_gradcheck():
    lstm = make(dtype=torch.float64, r=2, num_layers=1, bidirectional=True)
    names = list(lstm.factors())
    values = [lstm.factors()[n].detach().clone().requires_grad_() for n in names]
    keys = [n.removesuffix(".weight").replace(".", "_") for n in names]

    def run(x, *factors):
        return torch.func.functional_call(lstm, dict(zip(keys, factors, strict=True)), (x,))[0]

    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *values))


def test_new_adapter_changes_nothing_and_weights_are_shared():
    plain = nn.LSTM(5, 7, 2, bidirectional=True, dropout=0.5)
    lstm = LoRALSTM.from_lstm(plain.eval(), r=2)
    assert lstm.weight_ih_l0 is plain.weight_ih_l0 and not lstm.training
    assert lstm.dropout == 0.5
    x = torch.randn(4, 3, 5)
    assert torch.equal(lstm(x)[0], plain(x)[0])
    trainable = {n for n, p in lstm.named_parameters() if p.requires_grad}
    assert trainable and all(n.startswith("lora_") for n in trainable)
    assert set(plain.state_dict()) < set(lstm.state_dict())


def test_state_dict_of_a_plain_lstm_loads():
    plain, lstm = nn.LSTM(5, 7, 2), make(num_layers=2)
    missing, unexpected = lstm.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == [] and all(n.startswith("lora_") for n in missing)
    assert torch.equal(lstm.weight_hh_l1, plain.weight_hh_l1)
    check(lstm, torch.randn(3, 2, 5))


def test_dropped_update_is_noticed():
    lstm = make()
    x = torch.randn(4, 6, 5)
    exact, low = results(lstm, x, dtype=torch.float64), results(lstm, x, dtype=torch.float32)
    lstm.adapter_enabled = False
    with pytest.raises(BudgetExceededError):
        assert_within_budget(lstm(x)[0], exact["y"], low["y"])


@pytest.mark.parametrize("exact", [False, True])
def test_merge_and_unmerge(exact):
    lstm = make(num_layers=2, bidirectional=True)
    x, before = torch.randn(4, 6, 5), copy.deepcopy(lstm.state_dict())
    want, low = results(lstm, x, dtype=torch.float64), results(lstm, x, dtype=torch.float32)
    lstm.merge(exact=exact)
    assert lstm.merged
    assert_within_budget(lstm(x)[0], want["y"], low["y"])
    lstm.adapter_enabled = False
    with pytest.raises(InvalidArgumentError, match="merged"):
        lstm(x)
    lstm.adapter_enabled = True
    lstm.unmerge()
    for name, t in lstm.state_dict().items():
        if exact:
            assert torch.equal(t, before[name])
        else:
            assert_within_budget(t, before[name].double(), t * (1 + torch.finfo(t.dtype).eps))


def test_copies_pickles_and_moves():
    lstm = make()
    x = torch.randn(4, 6, 5)
    want = lstm(x)[0]
    for other in (copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm))):
        assert torch.equal(other(x)[0], want)
        with torch.no_grad():
            other.lora_B_hh_l0.zero_()
        assert not torch.equal(other(x)[0], want) and torch.equal(lstm(x)[0], want)
    lstm.double()
    assert lstm(x.double())[0].dtype == torch.float64
    with pytest.raises((RuntimeError, ValueError)):
        lstm(x)


def test_low_precision_base_has_an_fp32_adapter():
    lstm = LoRALSTM.from_lstm(nn.LSTM(5, 7).bfloat16(), r=2)
    assert lstm.lora_A_ih_l0.dtype == torch.float32
    y, _ = lstm(torch.randn(3, 2, 5).bfloat16())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and lstm.lora_B_hh_l0.grad.dtype == torch.float32


def test_threads_do_not_mix_their_graphs():
    lstm, x = make(), torch.randn(20, 6, 5)
    want = lstm(x)[0].detach()

    def once(n):
        with torch.set_grad_enabled(n % 2 == 0):
            y = lstm(x)[0]
        return y.requires_grad == (n % 2 == 0) and torch.equal(y, want)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(once, range(40)))


@pytest.mark.parametrize(
    ("options", "fragment"),
    [({"r": 0}, "r=0"), ({"alpha": -1}, "alpha=-1"), ({"adapt": ()}, "adapt="),
     ({"adapt": ("ho",)}, "'ih', 'hh' or both"), ({"adapter_dtype": torch.int8}, "adapter_dtype")],
)  # fmt: skip
def test_bad_arguments(options, fragment):
    with pytest.raises(InvalidArgumentError) as caught:
        LoRALSTM.from_lstm(nn.LSTM(5, 7), **options)
    assert fragment in str(caught.value)
    with pytest.raises(InvalidArgumentError, match="accepted: exactly"):
        LoRALSTM.from_lstm(nn.GRU(5, 7))
