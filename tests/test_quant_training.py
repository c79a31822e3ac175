"""The comparison of training over quantized bases, on a tiny random model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from benchmarks import quant_training, record  # noqa: E402
from benchmarks import quant_training_run as measured  # noqa: E402
from lora_kernels.testing import assert_within_budget  # noqa: E402

OPTIONS = {
    "steps": 6, "batch": 2, "length": 16, "heldout": 32, "every": 3, "rank": 4,
    "learning_rate": 1e-2, "seed": 0,
}  # fmt: skip


def write_model(folder: Path) -> None:
    """A tied bf16 Llama of two layers, and token ids that can be learnt: counting."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        initializer_range=0.1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    rows = (torch.arange(14)[:, None] * 3 + torch.arange(16)) % 40
    torch.save({"train": rows[:12], "heldout": rows[12:]}, folder / "tokens.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    write_model(made)
    return made


@pytest.mark.parametrize("name", sorted(measured.FORMATS))
def test_a_curve_falls_over_every_base(folder: Path, name: str) -> None:
    found = measured.curve(folder, name, OPTIONS)
    assert [point["step"] for point in found["curve"]] == [0, 3, 6]
    assert len(found["losses"]) == 6 and all(math.isfinite(loss) for loss in found["losses"])
    assert found["curve"][-1]["perplexity"] < found["curve"][0]["perplexity"]


def test_bases_differ_in_their_weights_alone(folder: Path) -> None:
    adapters, before = {}, {}
    ids = torch.load(folder / "tokens.pt")["heldout"]
    for name in measured.FORMATS:
        model = measured.load(folder, name)
        adapters[name] = measured.adapt(model, OPTIONS)
        before[name] = measured.perplexity(model, ids, 2)
    assert len(set(before.values())) == len(before)
    for trained in adapters.values():
        assert len(trained) == 28 and {p.dtype for p in trained} == {torch.float32}
        assert all(map(torch.equal, trained, adapters["bf16"]))


def test_perplexity_is_the_exponential_of_the_mean_loss(folder: Path) -> None:
    model = measured.load(folder, "bf16").float()
    ids = torch.load(folder / "tokens.pt")["train"]
    found = torch.tensor([measured.perplexity(model, ids, 5)])  # the last batch is a part of one
    with torch.no_grad():
        plain = model(input_ids=ids, labels=ids).loss.exp()[None]
        logits = model.double()(input_ids=ids).logits[:, :-1].flatten(0, 1)
        exact = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).exp()[None]
    assert_within_budget(found, exact, plain)


def test_sizes_are_those_of_the_formats(folder: Path) -> None:
    found = {name: measured.sizes(measured.load(folder, name)) for name in measured.FORMATS}
    # q and o, k and v, gate and up and down, of two layers
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    rows = 2 * (2 * 64 + 2 * 32 + 2 * 128 + 64)
    others = 40 * 64 + 5 * 64
    for size in found.values():
        assert (size["linear_weights"], size["parameters"]) == (weights, weights + others)
    assert found["bf16"]["linear_bytes"] == 2 * weights
    assert found["int8"]["linear_bytes"] == found["fp8"]["linear_bytes"] == weights + 4 * rows
    # codes and eight-bit scales; nested scales and tables are a few bytes a layer
    tables = found["nf4"]["linear_bytes"] - weights // 2 - weights // 64
    assert 0 < tables < 14 * 2048
    for size in found.values():
        dense = size["model_bytes"] - size["linear_bytes"]
        assert 2 * others <= dense < 4 * others  # and the frequencies of the rotation


@pytest.mark.slow
def test_a_run_writes_a_whole_record(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not tell its memory")
    monkeypatch.setattr(quant_training, "prepare", lambda folder, _: write_model(folder))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    out, chart = tmp_path / "record.json", tmp_path / "curves.png"
    words = ["--formats", "bf16,nf4", "--json", str(out), "--png", str(chart)]
    for key, value in OPTIONS.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    assert quant_training.main(words) == 0
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert "| nf4, double quant | " in capsys.readouterr().out
    made = json.loads(out.read_text())
    assert [row["format"] for row in made["rows"]] == ["bf16", "nf4"]
    for row in made["rows"]:
        assert row["step_peak_bytes"] >= row["loaded_bytes"] > 0
    text = (record.RESULTS / "README.md").read_text()
    for key in {*made, *made["rows"][0]}:
        assert f"`{key}`" in text, key


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--steps", "0"], "--steps"),
        (["--formats", "nf4,int3"], "'int3'"),
        (["--length", "1"], "--length"),
        (["--heldout", "64"], "--length"),
    ],
)
def test_bad_arguments_are_refused(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        quant_training.parse(words)
    assert caught.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]
