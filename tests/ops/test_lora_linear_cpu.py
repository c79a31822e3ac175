"""The compiled CPU backend: every instruction set of this machine, threads, packed weights."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from lora_kernels._backends import cpu
from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops import grouped_lora_linear
from lora_kernels.ops.lora_linear import packing
from lora_kernels.ops.lora_linear.problem import LoraLinearProblem, choose_for
from lora_kernels.testing import (
    LAYOUTS,
    assert_within_budget,
    check_lora_linear,
    compare,
    lora_linear_inputs,
    lora_linear_op,
    lora_linear_results,
    poisoned_empty,
    yardstick,
)

library, reason = cpu.load()
pytestmark = pytest.mark.skipif(library is None, reason=reason)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = library.machine_isas() if library is not None else ["none"]


@pytest.fixture(autouse=True)
def _no_copies() -> Iterator[None]:
    packing.set_pack_policy(None)
    yield
    packing.set_pack_policy(None)


def check(*args, **kwargs) -> None:
    with poisoned_empty():
        check_lora_linear(lora_linear_inputs(*args, **kwargs), "cpu", "xab")


@pytest.mark.parametrize("rows", [513, 545, 1057, 4097])
def test_threads_with_unequal_rows(isa, threads, rows):
    """One strip of rows more can change the number of chunks, of that thread alone."""
    torch.set_num_threads(2)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = lora_linear_inputs(rows, 96, 72, 16, dtype, dropout_p=0.1)
        check_lora_linear(inputs, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "k", "n", "r"),
    [(1, 1, 1, 1), (3, 31, 33, 3), (33, 64, 128, 16), (129, 130, 67, 12), (70, 520, 257, 100)],
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_every_isa(isa, dtype, m, k, n, r, dropout_p):
    assert library.isa() == isa
    check(m, k, n, r, dtype, dropout_p=dropout_p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_on_every_isa(isa, dtype, layout):
    check((3, 11), 70, (45, 18), (12, 5), dtype, layout=layout, adapter_dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [20, 301])
def test_given_products_on_every_isa(isa, threads, dtype, m):
    """S as the library saves it gives the same bits, also where threads share out the columns; dS
    stays within the budget."""
    torch.set_num_threads(2)
    i = lora_linear_inputs(m, 300, (400, 90), (16, 5), dtype, scaling=(0.7, -1.3))
    packed = [
        [packing.packed_weight(w, dtype, dgrad) for w in i.weights] for dgrad in (False, True)
    ]
    args = [i.x, packed[0], [400, 90], i.lora_as, i.lora_bs, i.biases, i.scalings, 0.0, None]
    ys, s = library.lora_linear_fwd(*args)
    again, _ = library.lora_linear_fwd(*args, s)
    assert all(torch.equal(p, q) for p, q in zip(again, ys, strict=True))
    ds = torch.cat([c * (d @ b) for d, b, c in zip(i.dys, i.lora_bs, i.scalings, strict=True)], 1)
    dx, das, dbs = library.lora_linear_bwd(
        i.dys, i.x, packed[1], i.lora_as, i.lora_bs, s, i.scalings, 0.0, None, True, True, False, ds
    )
    oracle = lora_linear_results(i, torch.float64, needs="xab")
    part = replace(oracle, ys=[], dbs=[], dws=[], dbiases=[], dx=dx, das=das)
    compare(part, oracle, yardstick(i, oracle, "xab"))
    assert not dbs


def test_given_products_that_do_not_fit_are_refused():
    i = lora_linear_inputs(9, 20, 33, 4, torch.bfloat16)
    args = [i.x, [packing.packed_weight(i.weights[0], torch.bfloat16, False)], [33], i.lora_as]
    args += [i.lora_bs, i.biases, i.scalings, 0.0, None]
    s = i.x @ i.lora_as[0].t()
    for wrong in (s[:, :3], s[:8], s.float(), s[0]):
        with pytest.raises(RuntimeError, match=r"shrunk is .*; accepted: BFloat16 "):
            library.lora_linear_fwd(*args, wrong)
    args[-2:] = [0.5, torch.tensor(3)]
    with pytest.raises(RuntimeError, match="shrunk is given with dropout"):
        library.lora_linear_fwd(*args, s)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 2, 129, 600])
def test_threads(threads, dtype, m):
    """More threads than rows; the work splits differently, the answer must hold."""
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        check(m, 130, 96, 8, dtype, dropout_p=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_does_not_depend_on_threads(threads, dtype):
    inputs = lora_linear_inputs(517, 130, 96, 8, dtype, dropout_p=0.1)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(lora_linear_op(inputs, "cpu"))
    for other in results[1:]:
        assert torch.equal(results[0].ys[0], other.ys[0])
        assert torch.equal(results[0].dx, other.dx)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_sums_in_fp32(dtype):
    """Rounding must not grow with the length of a sum faster than in the library GEMMs."""
    check(8200, 33, 34, 4, dtype)
    check(5, 8200, 6, 4, dtype)
    check(5, 6, 8200, 4, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_policies_give_the_same_bits(dtype):
    inputs = lora_linear_inputs(70, 130, 96, 8, dtype)
    results = []
    for policy in packing.POLICIES:
        packing.set_pack_policy(policy)
        results += [lora_linear_op(inputs, "cpu", "xab").named() for _ in range(2)]
    for other in results[1:]:
        assert all(torch.equal(t, other[name]) for name, t in results[0].items())


def test_price_of_copies_is_reported_and_given_back():
    inputs = lora_linear_inputs(33, 256, 512, 8, torch.bfloat16)
    lora_linear_op(inputs, "cpu", "")
    forward = packing.packed_bytes()
    assert forward >= 2 * 256 * 512
    lora_linear_op(inputs, "cpu", "xab")
    assert packing.packed_bytes() >= forward + 2 * 256 * 512
    inputs.weights.clear()
    gc.collect()
    assert packing.packed_bytes() == 0


def test_never_keeps_nothing():
    packing.set_pack_policy("never")
    lora_linear_op(lora_linear_inputs(33, 256, 512, 8, torch.bfloat16), "cpu", "xab")
    assert packing.packed_bytes() == 0


def test_budget_is_kept(monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_PACK_BYTES", str(3 * 2 * 128 * 128))
    kept = [
        lora_linear_inputs(33, 128, 128, 8, torch.bfloat16, generator_seed=seed)
        for seed in range(6)
    ]
    for inputs in kept:
        check_lora_linear(inputs, "cpu", "xab")
    assert 0 < packing.packed_bytes() <= 3 * 2 * 128 * 128


def test_no_copies_where_memory_runs_out(monkeypatch, tmp_path):
    facts = tmp_path / "meminfo"
    monkeypatch.setattr(packing, "_MEMORY", facts)
    inputs = lora_linear_inputs(33, 128, 128, 8, torch.bfloat16)
    for available, kept in ((124, False), (126, False), (200, True)):
        facts.write_text(f"MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: {available} kB\n")
        check_lora_linear(inputs, "cpu", "")
        assert (packing.packed_bytes() > 0) is kept


def test_a_container_has_less_memory_than_its_machine(monkeypatch, tmp_path):
    own, groups = tmp_path / "own", tmp_path / "groups"
    (groups / "a" / "b").mkdir(parents=True)
    own.write_text("1:cpu:/x\n0::/a/b\n")
    (groups / "a" / "memory.max").write_text("4096\n")
    (groups / "a" / "b" / "memory.max").write_text("max\n")
    monkeypatch.setattr(packing, "_OWN_CGROUP", own)
    monkeypatch.setattr(packing, "_CGROUPS", groups)
    packing._memory_bytes.cache_clear()
    try:
        assert packing.budget_bytes() == 1024
    finally:
        packing._memory_bytes.cache_clear()


@pytest.mark.parametrize(
    ("variable", "value"), [("LORA_KERNELS_PACK", "often"), ("LORA_KERNELS_PACK_BYTES", "2GB")]
)
def test_bad_packing_variables_are_named(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidArgumentError, match=f"{variable}='{value}'") as caught:
        lora_linear_op(lora_linear_inputs(33, 128, 128, 8, torch.bfloat16), "cpu", "")
    assert "\n" not in str(caught.value)


def test_variable_lowers_the_isa():
    code = "from lora_kernels._backends.cpu import load; print(load()[0].isa())"
    for name in (ISAS[0], ISAS[-1]):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "LORA_KERNELS_CPU_ISA": name},
        )
        assert done.stdout.strip() == name, done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(521, 64, 1088), (521, 1088, 64)], ids=str)
def test_results_stored_past_the_cache(shape, dtype):
    """Y, or dX, of more than 1 MiB with rows of whole cache lines; ragged strips of both kinds."""
    inputs = lora_linear_inputs(*shape, 8, dtype)
    check_lora_linear(inputs, "cpu", "xab")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapter", [None, torch.float32], ids=["same", "fp32"])
def test_few_rows_of_any_number_have_the_same_bits(isa, dtype, adapter):
    """Weights as they are: odd sizes, a strided weight, a member without an adapter, S."""
    torch.manual_seed(0)
    for k, n, r in ((1, 1, 1), (37, 70, 3), (130, 67, 20)):
        x = torch.randn(4, k).to(dtype)
        weights = [torch.randn(n, 2 * k).to(dtype)[:, :k], torch.randn(5, k).to(dtype)]
        lora_as = [torch.randn(r, k).to(adapter or dtype), torch.randn(0, k).to(adapter or dtype)]
        lora_bs = [torch.randn(n, r).to(adapter or dtype), torch.randn(5, 0).to(adapter or dtype)]
        rest = (weights, lora_as, lora_bs, [torch.randn(n), None], [0.5, 2.0])
        ys, s = library.lora_linear_fwd_few(x, *rest)
        shrunk = x.double() @ lora_as[0].double().t()
        wanted = x.double() @ weights[0].double().t() + rest[3][0].double()
        wanted += 0.5 * shrunk @ lora_bs[0].double().t()
        plain = (
            torch.nn.functional.linear(x, weights[0], rest[3][0].to(dtype))
            + 0.5 * (x @ lora_as[0].to(dtype).t()) @ lora_bs[0].to(dtype).t()
        )
        assert_within_budget(ys[0], wanted, plain, "y")
        assert_within_budget(s, shrunk, x @ lora_as[0].to(dtype).t(), "s")
        for rows in (1, 2, 3):
            parts, part = library.lora_linear_fwd_few(x[:rows], *rest)
            assert all(torch.equal(a, b[:rows]) for a, b in zip(parts, ys, strict=True))
            assert torch.equal(part, s[:rows])
    with pytest.raises(RuntimeError, match="5 rows"):
        library.lora_linear_fwd_few(torch.randn(5, k).to(dtype), *rest)


def test_auto_reads_few_rows_without_packing(isa):
    packing.clear()
    inputs = lora_linear_inputs(1, 64, 48, 4, torch.float32)

    def chosen(weights: list[torch.Tensor], direction: str) -> bool:
        problem = LoraLinearProblem.of(inputs.x, weights, inputs.lora_as, 0.0)
        name, why = choose_for(problem, None, direction)
        return name == "cpu" and "as they are" in why

    assert chosen(inputs.weights, "fwd") == (isa != "baseline")
    assert not chosen([w.t().contiguous().t() for w in inputs.weights], "fwd")
    assert not chosen(inputs.weights, "bwd")
    grouped_lora_linear(
        inputs.x, inputs.weights, inputs.lora_as, inputs.lora_bs, inputs.scalings, backend="cpu"
    )
    assert (packing.packed_bytes() == 0) == (isa != "baseline")
