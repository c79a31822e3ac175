"""The rows of make gpu-check: every GPU kernel has one, and each row does what it says.

Without a GPU the rows run on the CPU with `aten`; the tests marked gpu run the kernels.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_ops import ROWS
from benchmarks.gpu_ops.row import FLOOR, GPU_BACKENDS, GpuOp, Run, Work
from benchmarks.peers import UnavailableError
from benchmarks.timing import wall_clock
from lora_kernels.errors import BackendUnavailableError
from lora_kernels.ops import _evidence, _ledger, _registry
from lora_kernels.testing import BudgetExceededError, moved
from tests.test_gpu_check import TOP
from tools.gpu_check import bench_part, parts, small_shapes

SMALL = [(op, number) for op, row in ROWS.items() for number in range(len(row.small))]
KERNELS = [
    (op, backend, number)
    for op, row in ROWS.items()
    for backend in row.gpu_backends()
    for number in range(len(row.small))
]


def test_every_gpu_backend_is_covered():
    """A registered kernel that gpu-check does not run would never get evidence."""
    for spec in _registry.OPS:
        kernels = [b for b in GPU_BACKENDS if b in spec.backends]
        if not kernels:
            continue
        assert spec.name in ROWS, f"{spec.name} has {kernels} and no file in benchmarks/gpu_ops"
        row = ROWS[spec.name]
        assert set(row.gpu_backends()) == set(kernels)
        assert len(row.small) >= 3
        assert row.count() >= 3
        assert set(kernels) <= {p.removesuffix("-fp32") for p in row.providers()}
    assert set(parts.covered()) <= set(ROWS)
    assert {op.name for op, _ in bench_part.in_turn()} == set(parts.covered())


@pytest.mark.parametrize(("op", "number"), SMALL)
def test_a_small_problem_on_the_cpu(op, number):
    ROWS[op].check(ROWS[op].small[number], FLOOR, "cpu")


@pytest.mark.parametrize("op", ROWS)
def test_cases_are_problems_of_the_registry(op):
    """Their keywords are understood, shrunk to what can be made here at once."""
    row = ROWS[op]
    for label, keywords in row.cases.items():
        if not keywords:  # lora_linear's are those of benchmarks/gpu.py
            continue
        gate = row.gate(keywords)
        assert set(gate) >= set(keywords) - {"Sk"}, label
        assert label.endswith(str(keywords["dtype"]).removeprefix("torch.")), label


@pytest.mark.parametrize("op", ROWS)
def test_what_is_wrong_is_found(op, monkeypatch):
    """A kernel that is off by a part in a hundred does not pass its row."""
    row, real = ROWS[op], Work.results
    monkeypatch.setattr(Work, "results", lambda w: {n: 1.01 * t for n, t in real(w).items()})
    with pytest.raises(BudgetExceededError):
        row.check({**row.small[0], "dtype": torch.float32}, FLOOR, "cpu")


@pytest.mark.parametrize("op", [op for op in ROWS if op != "lora_linear"])
def test_rows_are_timed_on_the_cpu(op):
    row: GpuOp = replace(ROWS[op], cases={"small float32": ROWS[op].small[0]}, peers=("absent",))
    run = Run(TOP, wall_clock, 2, "cpu", count=())
    begun: list[Any] = []
    made = list(row.bench(0, (FLOOR, "triton", "cuda"), replace(run, announce=begun.append)))
    assert [r["mode"] for r in made] == [m for m in row.modes for _ in range(3)]
    for r in made:
        assert (r["skipped"] is None) == (r["provider"] == FLOOR), r
        assert r["op"] == op
        assert r["sizes"] and r["kind"]
    assert made[0]["ratio"] == 1.0
    assert made[0]["tflops"] > 0
    assert begun[-1] is None
    assert [b["provider"] for b in begun[:-1]] == [FLOOR, "triton", "cuda"]


def test_a_wrong_backend_is_not_timed(monkeypatch):
    real = Work.results
    monkeypatch.setattr(Work, "results", lambda w: {n: t + 0.1 for n, t in real(w).items()})
    row = replace(ROWS["rope"], cases={"small": ROWS["rope"].small[0]})
    made = list(row.bench(0, (FLOOR,), Run(TOP, wall_clock, 2, "cpu", count=())))
    assert all(r["skipped"].startswith("WRONG: ") for r in made)
    assert len(made) == 3


def test_peers_that_are_absent_say_so():
    for op, peer in (("attention", "flash-attn"), ("linear_cross_entropy", "cce")):
        row = ROWS[op]
        assert peer in row.peers
        inputs = row.inputs(**{**row.small[0], "dtype": torch.float32, "bias": False, "rank": 0}
                            if op != "attention" else row.small[0])  # fmt: skip
        with pytest.raises(UnavailableError, match="cannot be imported"):
            row.work(inputs, peer)


@pytest.mark.parametrize("op", ["attention", "linear_cross_entropy", "rope"])
def test_oracles_stay_on_the_device_of_their_inputs(op):
    """On the meta device: a tensor made on the CPU in between is an error there."""
    from lora_kernels.testing import attention, linear_cross_entropy, rope

    module = {
        "attention": attention, "linear_cross_entropy": linear_cross_entropy, "rope": rope
    }[op]  # fmt: skip
    for keywords in ROWS[op].small:
        if "lengths" in keywords:
            continue  # sequence ends are looked at
        made = module.results(moved(ROWS[op].inputs(**keywords), "meta"), torch.float64)
        assert {t.device.type for t in made.values()} == {"meta"}


def test_the_sanitizers_process(monkeypatch, capsys):
    assert small_shapes.main(["rope", FLOOR], "cpu") == 0
    assert small_shapes.main(["rope", "cuda"], "cpu") == 4
    assert "the kernels work on cuda tensors" in capsys.readouterr().out
    real = Work.results
    monkeypatch.setattr(Work, "results", lambda w: {n: t + 0.1 for n, t in real(w).items()})
    assert small_shapes.main(["rope", FLOOR], "cpu") == 1


@pytest.mark.parametrize("op", ROWS)
def test_the_key_of_a_problem_is_json(op):
    row = ROWS[op]
    inputs = row.inputs(**row.small[0])
    key = _evidence.key_of(_registry.find(op).problem(**row.problem(inputs), device="cuda"))
    assert json.loads(json.dumps(dict(key.kind))) == dict(key.kind)
    assert all(type(n) is int and n > 0 for n in key.sizes.values())
    assert "device" not in key.kind


def test_evidence_of_packed_weights_stays_with_its_kernels():
    """16 | 17 and 128 | 129 rows, and runs that do not fit the packed product: other kernels,
    whatever the distance of the sizes."""
    find = _registry.find("quant_linear")

    def key(M: int, **changes: Any) -> _evidence.Key:
        shapes = {"K": 4096, "N": 4096, "dtype": torch.bfloat16, "device": "cuda", **changes}
        return _evidence.key_of(find.problem(M=M, **shapes))

    def speaks(measured: _evidence.Key, asked: _evidence.Key) -> bool:
        entry = _ledger.Entry(dict(measured.sizes), dict(measured.kind), "fwd", {FLOOR: 1.0})
        return _evidence.distance(entry, asked, "fwd") is not None

    assert speaks(key(16), key(4)) and speaks(key(17), key(68)) and speaks(key(129), key(500))
    for one, other in ((16, 17), (128, 129), (0, 1)):
        assert not speaks(key(one), key(other)) and not speaks(key(other), key(one))
    assert speaks(key(8), key(8, K=4096 + 32)) and not speaks(key(8), key(8, K=4096 + 8))
    int4 = {"format": "int4", "block_size": 128}
    assert not speaks(key(8, **int4), key(8, act_order=True, **int4))


def test_the_key_of_a_packed_batch_is_that_of_the_op():
    """The op knows the number of sequences and of all rows, and not the longest."""
    from lora_kernels.ops.attention import contract

    row = ROWS["attention"]
    made = row.inputs(lengths=(5, 11, 1), H=2, D=64, causal=True, dtype=torch.bfloat16)
    own = contract.problem(
        made.q, made.k, made.v, None, None, made.cu_seqlens, None, (-1, 0), 0.0, 0.0
    )
    theirs = _registry.find("attention").problem(**row.problem(made), device="cpu")
    assert theirs == own
    find, counted = _registry.find("attention"), row.counted(made)
    pairs = [n * (n + 1) / 2 for n in (5, 11, 1)]
    flops = sum(find.flops(find.problem(**k, device="cpu"), "fwd") for k in counted)
    assert flops == 4 * 64 * 2 * sum(pairs)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def run_or_skip(op: str, backend: str, number: int) -> None:
    try:
        ROWS[op].check(ROWS[op].small[number], backend)
    except UnavailableError as error:
        pytest.skip(str(error))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("op", "backend", "number"), KERNELS)
def test_small_problems_on_the_device(op, backend, number):
    run_or_skip(op, backend, number)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("op", "backend"), sorted({(op, b) for op, b, _ in KERNELS}))
def test_on_another_stream(op, backend):
    """Work that is queued before on the same stream is seen, whatever the default stream does."""
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10_000_000)
        run_or_skip(op, backend, 0)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("op", "backend"), sorted({(op, b) for op, b, _ in KERNELS}))
def test_the_same_bits_from_run_to_run(op, backend):
    row = ROWS[op]
    inputs = moved(row.inputs(**row.small[0]), "cuda")
    able, why = row.able(inputs, backend, "cuda")
    if not able:
        pytest.skip(why)
    first, second = (row.work(inputs, backend).results() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("op", "backend"), sorted({(op, b) for op, b, _ in KERNELS}))
def test_forward_and_backward_in_a_graph(op, backend):
    """Captured once and replayed: nothing of it waits for the device."""
    row = ROWS[op]
    inputs = moved(row.inputs(**row.small[0]), "cuda")
    able, why = row.able(inputs, backend, "cuda")
    if not able:
        pytest.skip(why)
    work = row.work(inputs, backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work.fwdbwd()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = work.fwdbwd()
    for t in grads:
        t.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for replayed, plain in zip(grads, work.fwdbwd(), strict=True):
        assert torch.equal(replayed, plain)


@pytest.mark.parametrize("op", parts.covered())
def test_auto_on_a_gpu_asks_the_ledger(op, monkeypatch, tmp_path):
    """With a table that says a backend is twice as quick there, auto takes it; else aten."""
    from lora_kernels.ops import _ledger

    row = ROWS[op]
    backend = row.gpu_backends()[0]
    problem = _registry.find(op).problem(**row.problem(row.inputs(**row.small[0])), device="cuda")
    key = _evidence.key_of(problem)
    here = _ledger.Device("NVIDIA H100 80GB HBM3", "sm_90")
    monkeypatch.setattr(_ledger, "device", lambda index: here)
    monkeypatch.setattr(_ledger, "folder", lambda name: tmp_path)
    told = {"sizes": dict(key.sizes), "kind": dict(key.kind), "ms": {FLOOR: 1.0, backend: 0.5}}
    table = {
        "schema": _ledger.SCHEMA, "op": op, "date": "2026-11-22", "commit": "0",
        "device": {"type": "cuda", "name": here.name, "architecture": here.architecture},
        "backends": {backend: {"verdict": "passed", "digest": _ledger.source_digest(op, backend)}},
        "entries": [{**told, "direction": d} for d in _ledger.DIRECTIONS],
    }  # fmt: skip
    able = {b: lambda p: (True, "kernels") for b in GPU_BACKENDS}
    real = _evidence.choose

    def choose(name, backends, problem, direction, supports):
        asked.append(name)
        return real(name, backends, problem, direction, lambda b, p: able[b](p))

    asked: list[str] = []
    monkeypatch.setattr(_evidence, "choose", choose)
    _evidence.forget()
    assert _registry.find(op).choose(problem, None)[0] == FLOOR
    (tmp_path / "h100.json").write_text(json.dumps(table))
    _evidence.forget()
    chosen, why = _registry.find(op).choose(problem, None)
    assert chosen == backend
    assert "0.50 of the time of aten" in why
    assert set(asked) == {op}
    _evidence.forget()


# What says which problems can run, not what they give.
ABOUT = ("problem", "capabilities", "formats", "_dispatch", "_evidence", "_ledger", "tuned_tiles",
         "_tuned_tiles")  # fmt: skip


def _modules_of(op: str, backend: str) -> set[Path]:
    """The files of the op's folder and the shared ones of ops that a backend imports, however
    deep, its problem description apart: that says what can run, not what it gives."""
    root = _ledger_package()
    found: set[Path] = set()
    queue = [root / "ops" / op / f"{backend}.py"]
    while queue:
        path = queue.pop()
        if path in found or not path.exists() or path.stem in ABOUT:
            continue
        found.add(path)
        for name in re.findall(r"lora_kernels\.ops\.([\w.]+)", path.read_text()):
            queue.append(root / "ops" / f"{name.replace('.', '/')}.py")
        for lead, names in re.findall(
            r"^\s*from lora_kernels\.ops\.?([\w.]*) import \(?([\w, \n]+)", path.read_text(), re.M
        ):
            for name in re.findall(r"\w+", names):
                queue.append(root / "ops" / lead.replace(".", "/") / f"{name}.py")
    return found


def _ledger_package() -> Path:
    from lora_kernels.ops import _ledger

    return _ledger.PACKAGE


def _single_ops() -> list[tuple[str, str]]:
    from lora_kernels.ops import _ledger

    own = {op: backends for op, backends in parts.covered().items() if op not in _ledger.PAIRS}
    return sorted({(op, b) for op, backends in own.items() for b in backends[1:]})


@pytest.mark.parametrize(("op", "backend"), _single_ops())
def test_evidence_belongs_to_every_file_that_a_kernel_is_made_of(op, backend):
    """Else a changed kernel would keep the verdict of the one before."""
    from lora_kernels.ops import _ledger

    root = _ledger.PACKAGE
    hashed = {p for pattern in _ledger.SOURCES[backend] for p in root.glob(pattern.format(op=op))}
    own = {p for p in _modules_of(op, backend) if p.parent in (root / "ops", root / "ops" / op)}
    own = {p for p in own if p.name != "_philox.py"}  # a definition that tests hold fast
    assert (root / "ops" / op / f"{backend}.py") in own
    missing = sorted(str(p.relative_to(root)) for p in own - hashed)
    assert not missing, f"add to _ledger.SOURCES, or name the files so: {missing}"


def test_pairs_of_ops_are_those_of_the_ledger():
    from lora_kernels.ops._shrink_pairs import PAIRS

    assert {spec.name for spec in PAIRS} == set(_ledger.PAIRS) <= set(ROWS)
    assert all(_registry.find(op) for parts_of in _ledger.PAIRS.values() for op in parts_of)


@pytest.mark.parametrize("pair", _ledger.PAIRS)
@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_a_pair_hands_on_is_right(pair, number, backend):
    """The path that a GPU backend is timed on, on backends that run here."""
    row = ROWS[pair]
    inputs = row.inputs(**row.small[number])
    try:
        results = row.work(inputs, backend).results()
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    row.judge(inputs)(results, backend)


@pytest.mark.parametrize("changed", ["first triton", "first cuda", "behind triton", "behind cuda"])
@pytest.mark.parametrize("pair", _ledger.PAIRS)
def test_evidence_of_a_pair_belongs_to_the_kernels_of_both_ops(pair, changed, monkeypatch):
    part, backend = changed.split()
    op = _ledger.PAIRS[pair][part == "behind"]
    before = {b: _ledger.source_digest(pair, b) for b in GPU_BACKENDS}
    real = _ledger.source_digest

    def other(name: str, b: str) -> str:
        return "another" if (name, b) == (op, backend) else real.__wrapped__(name, b)

    monkeypatch.setattr(_ledger, "source_digest", other)
    after = {b: other(pair, b) for b in GPU_BACKENDS}
    touched = {backend} if part == "first" else set(GPU_BACKENDS)
    assert {b for b in GPU_BACKENDS if before[b] != after[b]} == touched


def test_a_pair_measured_beside_other_choices_says_nothing(monkeypatch):
    """What `auto` takes for the ops by themselves is part of the key."""
    find = _registry.find("norm_shrink")
    shapes = {"M": 4096, "K": 4096, "N": (4096, 1024, 1024), "device": "cuda"}
    measured = _evidence.key_of(find.problem(alone="aten/aten", layers="aten/aten", **shapes))
    entry = _ledger.Entry(dict(measured.sizes), dict(measured.kind), "fwd", {FLOOR: 1.0})
    for M, layers, near in ((2048, "aten/aten", True), (4096, "triton/aten", False)):
        asked = find.problem(alone="aten/aten", layers=layers, **(shapes | {"M": M}))
        assert (_evidence.distance(entry, _evidence.key_of(asked), "fwd") is not None) == near
