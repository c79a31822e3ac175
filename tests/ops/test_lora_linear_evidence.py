"""What `auto` needs before it picks a GPU backend: synthetic ledgers, no GPU."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lora_kernels as lk
from lora_kernels.ops import _evidence, _ledger
from lora_kernels.ops.lora_linear import problem

H100 = _ledger.Device("NVIDIA H100 80GB HBM3", "sm_90")
H200 = _ledger.Device("NVIDIA H200", "sm_90")
A100 = _ledger.Device("NVIDIA A100-SXM4-80GB", "sm_80")
DIGESTS = {"triton": "a1", "cuda": "b2"}


def entry(ms: dict[str, float], **changes: Any) -> dict[str, Any]:
    """`changes`: of the direction, or of sizes."""
    sizes = {"M": 8192, "K": 4096, "N": 4096, "rank": 16}
    kind = {"members": 1, "dtype": "bfloat16", "adapter_dtype": "bfloat16", "dropout": False}
    direction = changes.pop("direction", "fwd")
    return {"sizes": sizes | changes, "kind": kind, "direction": direction, "ms": ms}


def table(**changes: Any) -> dict[str, Any]:
    both = {"aten": 1.0, "triton": 0.9, "cuda": 0.8}
    return {
        "schema": 2, "op": "lora_linear",
        "device": {"type": "cuda", "name": H100.name, "architecture": H100.architecture},
        "date": "2026-11-22T10:00:00+00:00", "commit": "0123456789ab",
        "backends": {b: {"verdict": "passed", "digest": d} for b, d in DIGESTS.items()},
        "entries": [entry(both), entry(both, direction="bwd")],
        **changes,
    }  # fmt: skip


def shapes(**changes: Any) -> dict[str, Any]:
    return {"M": 8192, "K": 4096, "N": 4096, "dtype": "bfloat16", "device": "cuda", **changes}


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    """Write tables, then ask; every backend claims to be able."""
    monkeypatch.setattr(_ledger, "folder", lambda op: tmp_path)
    monkeypatch.setattr(_ledger, "source_digest", lambda op, backend: DIGESTS[backend])
    monkeypatch.setattr(_ledger, "device", lambda index: H100)
    able = SimpleNamespace(supports=lambda p: (True, "kernels"))
    monkeypatch.setattr(problem, "backend_module", lambda name: (able, ""))

    def forget() -> None:
        _evidence.forget()

    def write(name: str, content: Any) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text)
        forget()

    forget()
    yield write
    forget()


def explain(**changes: Any) -> tuple[str, str]:
    answer = lk.explain("lora_linear", **shapes(**changes))
    return answer["backend"], answer["reason"]


def test_nothing_is_picked_without_a_result(ledger):
    backend, reason = explain()
    assert backend == "aten"
    for name in ("cuda", "triton"):
        assert f"{name}: never run on hardware of this kind (NVIDIA H100 80GB HBM3" in reason


def test_the_quickest_is_picked(ledger):
    ledger("h100.json", table())
    backend, reason = explain()
    assert backend == "cuda"
    assert "0.80 of the time of aten" in reason
    assert "commit 0123456789ab" in reason
    slow = {"aten": 1.0, "triton": 0.9, "cuda": 0.95}
    ledger("h100.json", table(entries=[entry(slow), entry(slow, direction="bwd")]))
    assert explain()[0] == "triton"


def test_a_tie_is_enough_and_a_loss_is_not(ledger):
    for ratio, want in ((1.0, "triton"), (1.01, "aten")):
        ms = {"aten": 2.0, "triton": 2.0 * ratio}
        ledger("t.json", table(entries=[entry(ms), entry(ms, direction="bwd")]))
        assert explain()[0] == want
    assert "1.01 of the time of aten" in explain()[1]


def test_directions_are_chosen_apart(ledger):
    slow = entry({"aten": 1.0, "cuda": 1.5}, direction="bwd")
    ledger("t.json", table(entries=[entry({"aten": 1.0, "cuda": 0.8}), slow]))
    backend, reason = explain()
    assert backend == "cuda"
    assert "backward: aten (cuda: 1.50 of the time of aten" in reason


@pytest.mark.parametrize(
    ("verdict", "says"), [("failed", "failed its checks"), ("not run", "never run on hardware")]
)
def test_a_wrong_kernel_is_never_picked(ledger, verdict, says):
    wrong = table()
    wrong["backends"]["cuda"]["verdict"] = verdict
    ledger("t.json", wrong)
    backend, _ = explain()
    assert backend == "triton"
    wrong["backends"]["triton"]["verdict"] = verdict
    ledger("t.json", wrong)
    backend, reason = explain()
    assert backend == "aten"
    assert reason.count(says) >= 2


def test_changed_sources_lose_their_evidence(ledger, monkeypatch):
    ledger("t.json", table())
    monkeypatch.setitem(DIGESTS, "cuda", "changed")
    _evidence.forget()
    backend, _ = explain()
    assert backend == "triton"
    monkeypatch.setitem(DIGESTS, "triton", "changed")
    _evidence.forget()
    backend, reason = explain()
    assert backend == "aten"
    assert "its sources changed since they were measured" in reason


def test_the_same_architecture_counts_and_another_does_not(ledger, monkeypatch):
    ledger("h100.json", table())
    for device, want in ((H200, "cuda"), (A100, "aten")):
        monkeypatch.setattr(_ledger, "device", lambda index, device=device: device)
        _evidence.forget()
        assert explain()[0] == want
    assert "never run on hardware of this kind (NVIDIA A100-SXM4-80GB, sm_80)" in explain()[1]


def test_the_device_itself_comes_before_its_architecture(ledger):
    other = table(date="2026-12-01T00:00:00+00:00")
    other["device"] = {"type": "cuda", "name": H200.name, "architecture": "sm_90"}
    lost = {"aten": 1.0, "cuda": 3.0, "triton": 3.0}
    other["entries"] = [entry(lost), entry(lost, direction="bwd")]
    ledger("h200.json", other)
    ledger("h100.json", table())
    assert explain()[0] == "cuda"


def test_no_gpu_here(ledger, monkeypatch):
    ledger("t.json", table())
    monkeypatch.setattr(_ledger, "device", lambda index: None)
    _evidence.forget()
    backend, reason = explain()
    assert backend == "aten"
    assert "torch sees no GPU 0 here" in reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_question_about_gpus_is_answered_without_one():
    """With whatever backends are installed here."""
    backend, reason = explain()
    assert backend == "aten"
    for name in _evidence.BACKENDS:
        assert f"{name}: torch sees no GPU 0 here" in reason


@pytest.mark.parametrize(
    "changes",
    [
        {"M": 1024}, {"M": 65536}, {"K": 1024}, {"N": 16384}, {"rank": 64}, {"dtype": "float16"},
        {"adapter_dtype": "float32"}, {"dropout_p": 0.1}, {"N": (4096, 1024, 1024)},
    ],
    ids=str,
)  # fmt: skip
def test_a_measurement_speaks_for_its_surroundings_only(ledger, changes):
    ledger("t.json", table())
    backend, reason = explain(**changes)
    assert backend == "aten"
    assert "no measurement near this problem" in reason
    assert explain(M=16384, K=5120, N=5120)[0] == "cuda"


def test_the_nearest_measurement_decides(ledger):
    good, bad = {"aten": 1.0, "cuda": 0.5}, {"aten": 1.0, "cuda": 2.0}
    both = [(good, {}), (bad, {"M": 4096}), (good, {"M": 2048})]
    entries = [entry(ms, direction=d, **c) for d in ("fwd", "bwd") for ms, c in both]
    ledger("t.json", table(entries=entries))
    assert [explain(M=m)[0] for m in (8192, 4096, 4000, 2048, 7000)] == [
        "cuda", "aten", "aten", "cuda", "cuda",
    ]  # fmt: skip


def test_of_equally_near_measurements_the_worst_counts(ledger):
    ms = [{"aten": 1.0, "cuda": 0.5}, {"aten": 1.0, "cuda": 1.2}, {"aten": 1.0, "cuda": 0.7}]
    ledger("t.json", table(entries=[entry(m, direction=d) for d in ("fwd", "bwd") for m in ms]))
    assert explain()[0] == "aten"


BROKEN = {
    "not JSON": "{",
    "a list": "[]",
    "another schema": table(schema=99),
    "another op": table(op="attention"),
    "no device": {k: v for k, v in table().items() if k != "device"},
    "no digest": table(backends={"cuda": {"verdict": "passed"}}),
    "unknown verdict": table(backends={"cuda": {"verdict": "fine", "digest": "b2"}}),
    "negative time": table(entries=[entry({"aten": 1.0, "cuda": -1.0})]),
    "time that is no number": table(entries=[entry({"aten": 1.0, "cuda": float("nan")})]),
    "text for a time": table(entries=[entry({"aten": 1.0, "cuda": "0.1"})]),
    "zero rows": table(entries=[entry({"aten": 1.0, "cuda": 0.1}, M=0)]),
    "text for a size": table(entries=[entry({"aten": 1.0, "cuda": 0.1}, rank="16")]),
    "no sizes": table(entries=[{**entry({"aten": 1.0, "cuda": 0.1}), "sizes": {}}]),
    "unknown direction": table(entries=[entry({"aten": 1.0, "cuda": 0.1}, direction="both")]),
    "entries missing": {k: v for k, v in table().items() if k != "entries"},
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_no_evidence_and_says_why(ledger, content):
    ledger("broken.json", copy.deepcopy(content))
    backend, reason = explain()
    assert backend == "aten"
    assert "tuned/broken.json is not usable: " in reason
    assert "\n" not in reason
    ledger("good.json", table())
    assert explain()[0] == "cuda"


def test_disabled_backends_stay_disabled(ledger, monkeypatch):
    ledger("t.json", table())
    monkeypatch.setenv("LORA_KERNELS_DISABLE", "cuda,lora_linear:triton")
    assert explain()[0] == "aten"


def test_a_request_by_name_needs_no_evidence(ledger):
    answer = lk.explain("lora_linear", backend="triton", **shapes())
    assert (answer["backend"], answer["reason"]) == ("triton", "requested")


def test_committed_tables_are_whole():
    where = _ledger.PACKAGE / "ops" / "lora_linear" / "tuned"
    assert _ledger.read(where, "lora_linear")[1] == ()


def test_digest_follows_names_and_contents(tmp_path):
    first, second = tmp_path / "a.py", tmp_path / "b.py"
    first.write_bytes(b"x = 1\n")
    second.write_bytes(b"y = 2\n")
    base = _ledger.digest_of([first, second])
    assert base == _ledger.digest_of([second, first])
    first.write_bytes(b"x = 1\r\n")
    assert base == _ledger.digest_of([first, second])
    first.write_bytes(b"x = 2\n")
    changed = _ledger.digest_of([first, second])
    first.write_bytes(b"x = 1\n")
    first.rename(tmp_path / "c.py")
    assert len({base, changed, _ledger.digest_of([tmp_path / "c.py", second])}) == 3


@pytest.mark.parametrize("backend", _evidence.BACKENDS)
def test_backends_have_a_digest(backend):
    assert _ledger.source_digest("lora_linear", backend)


def test_a_library_is_known_by_the_sources_it_was_built_from(monkeypatch, tmp_path):
    """Built again from the same sources elsewhere, it keeps its evidence."""
    file = tmp_path / "_cuda.so"
    told = {"info": "nvcc 13.0; sm_80; sources lora_linear:00ff other:11aa"}
    library = SimpleNamespace(build_info=lambda: told["info"])
    monkeypatch.setattr(_ledger.cuda_library, "load", lambda: (library, ""))
    monkeypatch.setattr(_ledger.cuda_library, "path", lambda: file)

    def digest() -> str:
        _ledger.source_digest.cache_clear()
        return _ledger.source_digest("lora_linear", "cuda").split("-")[1]

    file.write_bytes(b"one build")
    assert digest() == "00ff"
    told["info"] = "nvcc 13.0; sm_80"  # it does not say: its bytes count
    first = digest()
    file.write_bytes(b"another build")
    assert digest() != first
    monkeypatch.setattr(_ledger.cuda_library, "load", lambda: (None, "not built"))
    assert digest() == "absent"
    _ledger.source_digest.cache_clear()


def test_env_tells_what_auto_takes_on_a_gpu(ledger, monkeypatch):
    from lora_kernels import environment

    monkeypatch.setattr(environment.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(environment, "self_check", lambda op, backend: "ok")
    problems: list[str] = []
    told = environment._op("lora_linear", ("aten", "triton", "cuda"), problems)
    assert problems == []
    on_gpu = told["auto"]["bfloat16 on the GPU"]
    assert on_gpu["backend"] == "aten"
    assert "never run on hardware" in on_gpu["reason"]
    assert told["backends"]["triton"] == {
        "available": True, "reason": "kernels", "self_check": "ok",
    }  # fmt: skip
