"""generate, merge, convert and inspect as a user meets them: output, exit codes, bad input."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
import torch
from adapter_files import write_adapter_for, write_language_model

from lora_kernels.cli import main
from lora_kernels.testing import assert_within_budget

pytest.importorskip("peft")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_language_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    return write_adapter_for(base, tmp_path_factory.mktemp("adapter"))


def ran(capsys, *words: object) -> str:
    code = main([str(w) for w in words])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def refused(capsys, *words: object) -> str:
    """The one line of an error; nothing on stdout."""
    code = main([str(w) for w in words])
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert code == 2 and captured.out == "" and len(lines) == 1, captured
    assert lines[0].startswith("lora-kernels: error: ")
    return lines[0]


def greedy(base: Path, adapter: Path | None, prompt: str, count: int) -> str:
    """Token by token with plain transformers and PEFT, without generate()."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(base))
    model = AutoModelForCausalLM.from_pretrained(str(base))
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, str(adapter))
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(count):
        with torch.no_grad():
            best = model(input_ids=ids).logits[0, -1].argmax()
        ids = torch.cat([ids, best.reshape(1, 1)], 1)
        if best == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_generate_continues_with_the_adapter(capsys, base, adapter):
    want = greedy(base, adapter, "the cat", 12)
    assert want != greedy(base, None, "the cat", 12), "the adapter must matter here"
    out = ran(capsys, "generate", adapter, "the cat", "--max-new-tokens", 12)
    assert out.split() == want.split()
    plain = ran(capsys, "generate", base, "the cat", "--max-new-tokens", 12)
    assert plain.split() == greedy(base, None, "the cat", 12).split()
    stock = ran(capsys, "generate", adapter, "the cat", "--max-new-tokens", 12, "--no-kernels")
    assert stock == out


def test_generate_takes_file_stdin_and_chat(capsys, monkeypatch, tmp_path, base, adapter):
    want = ran(capsys, "generate", adapter, "the cat", "--max-new-tokens", 5)
    (tmp_path / "p.txt").write_text("the cat\n")
    assert want == ran(
        capsys, "generate", adapter, "--file", tmp_path / "p.txt", "--max-new-tokens", 5
    )
    for word in ([], ["-"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n"))
        assert want == ran(capsys, "generate", adapter, *word, "--max-new-tokens", 5)
    chat = ran(capsys, "generate", adapter, "mat", "--chat", "--max-new-tokens", 5)
    assert chat.split() == greedy(base, adapter, "the mat cat", 5).split()


def test_generate_with_several_adapters(capsys, tmp_path, base, adapter):
    """Each answers as it does alone, on layers of its own too."""
    other = write_adapter_for(base, tmp_path / "other", targets=["v_proj", "lm_head"], seed=5)
    words = ("the cat", "--max-new-tokens", 9)
    alone = [ran(capsys, "generate", a, *words) for a in (adapter, other)]
    assert alone[0] != alone[1]
    both = ran(capsys, "generate", adapter, "--with", other, *words)
    assert both == f"== {adapter}\n{alone[0]}\n== {other}\n{alone[1]}"
    lines = ran(capsys, "generate", adapter, "--with", other, *words, "--json").splitlines()
    found = {d["adapter"]: d["text"] for d in map(json.loads, lines)}
    assert [found[str(a)].split() for a in (adapter, other)] == [a.split() for a in alone]
    # The order does not matter, and a third one either.
    third = write_adapter_for(base, tmp_path / "third", seed=6)
    out = ran(capsys, "generate", other, "--with", third, "--with", adapter, *words)
    assert out.endswith(f"== {adapter}\n{alone[0]}") and out.startswith(f"== {other}\n{alone[1]}")


def test_adapters_that_cannot_share_a_base(capsys, tmp_path, base, adapter):
    def told(*words):
        return refused(capsys, "generate", *words, "the cat")

    assert "given twice" in told(adapter, "--with", adapter)
    assert "no adapter" in told(adapter, "--with", tmp_path)
    assert "not PEFT's" in told(base, "--with", adapter)
    second = write_language_model(tmp_path / "second")
    foreign = write_adapter_for(second, tmp_path / "foreign")
    capsys.readouterr()
    assert "adapters of one base" in told(adapter, "--with", foreign)
    assert "== " in ran(
        capsys, "generate", adapter, "--with", foreign, "--base", base, "the cat",
        "--max-new-tokens", 2,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "freeze"])
def test_generate_from_a_run(capsys, tmp_path, base, method):
    from lora_kernels.training import finetune

    (tmp_path / "t.txt").write_text("the cat sat on the mat\n\n" * 30)
    config = {
        "task": "causal-lm", "method": method, "model": str(base), "precision": "fp32",
        "output": str(tmp_path / "run"), "lora": {"r": 2, "alpha": 4},
        "data": {"path": str(tmp_path / "t.txt"), "max_length": 16},
        "train": {"max_steps": 2, "batch_size": 2},
    }  # fmt: skip
    finetune(config, quiet=True)
    capsys.readouterr()
    out = ran(capsys, "generate", tmp_path / "run", "the cat", "--max-new-tokens", 6)
    assert 1 <= len(out.split()) <= 6


def test_a_prompt_may_follow_the_options(capsys, base, adapter):
    want = ran(capsys, "generate", adapter, "the cat", "--max-new-tokens", 4)
    assert want == ran(capsys, "generate", adapter, "--max-new-tokens", 4, "the cat")
    assert want == ran(capsys, "generate", "--max-new-tokens", 4, adapter, "the cat")
    for words in (("the cat", "--seed", 1, "sat"), ("--seed", 1, "the", "cat"), ("--sed", "x")):
        with pytest.raises(SystemExit, match="2"):
            main(["generate", str(adapter), *map(str, words)])
        assert "unrecognized arguments" in capsys.readouterr().err


def test_classifier_generates_nothing(capsys, tmp_path, base):
    import transformers

    config = transformers.AutoConfig.from_pretrained(str(base), num_labels=2)
    transformers.LlamaForSequenceClassification(config).save_pretrained(str(tmp_path))
    transformers.AutoTokenizer.from_pretrained(str(base)).save_pretrained(str(tmp_path))
    capsys.readouterr()
    assert "generates no text" in refused(capsys, "generate", tmp_path, "the cat")


def test_sampling_follows_the_seed(capsys, adapter):
    words = ("generate", adapter, "the cat", "--temperature", 1.5, "--max-new-tokens", 14)
    first = ran(capsys, *words, "--seed", 1)
    assert first == ran(capsys, *words, "--seed", 1)
    assert first != ran(capsys, *words, "--seed", 2)


def test_generation_stops_at_the_model_length(capsys, adapter):
    done = json.loads(
        ran(capsys, "generate", adapter, "the cat", "--max-new-tokens", 500, "--json",
            "--temperature", 1, "--repetition-penalty", 1.1)
    )  # fmt: skip
    assert done["prompt"] == "the cat" and done["prompt_tokens"] == 2
    assert len(done["text"].split()) <= 30


def test_merge_writes_a_model_that_gives_the_same(capsys, tmp_path, base, adapter):
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said = ran(capsys, "merge", adapter, tmp_path / "merged")
    assert str(tmp_path / "merged") in said and "14 tensors" in said
    merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"))
    AutoTokenizer.from_pretrained(str(tmp_path / "merged"))
    stock = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(str(base)), str(adapter)
    )
    ids = torch.arange(40, 46)[None]
    with torch.no_grad():
        low = stock(input_ids=ids).logits
        got = merged(input_ids=ids).logits
        exact = stock.double()(input_ids=ids).logits
    assert_within_budget(got, exact, low)
    assert not list(tmp_path.glob(".*"))


def test_merge_of_weights_alone(capsys, tmp_path, base, adapter):
    from safetensors.torch import load_file

    path = tmp_path / "new" / "changed.safetensors"
    done = json.loads(ran(capsys, "merge", adapter, path, "--weights-only", "--json",
                          "--dtype", "bfloat16"))  # fmt: skip
    changed, whole = load_file(path), load_file(base / "model.safetensors")
    assert done["layers"] == len(changed) == 14
    for name, tensor in changed.items():
        assert tensor.dtype == torch.bfloat16
        assert not torch.equal(tensor, whole[name].bfloat16()), name
    assert "model.norm.weight" not in changed


def test_convert_round_trip(capsys, tmp_path, base, adapter):
    from safetensors.torch import load_file

    want = load_file(adapter / "adapter_model.safetensors")
    for form, name in (("loralib", "lora.bin"), ("torchtune", "tune.pt")):
        said = ran(capsys, "convert", adapter, tmp_path / name, "--to", form)
        assert said.startswith(f"peft to {form}: 14 layers")
        back = tmp_path / f"{form}-back"
        ran(capsys, "convert", tmp_path / name, back, "--to", "peft", "--json")
        got = load_file(back / "adapter_model.safetensors")
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want)
    out = ran(capsys, "generate", tmp_path / "torchtune-back", "the cat", "--max-new-tokens", 8)
    assert out == ran(capsys, "generate", adapter, "the cat", "--max-new-tokens", 8)


def test_inspect_fits_the_terminal(capsys, base, adapter):
    out = ran(capsys, "inspect", adapter, "--base", base)
    assert max(len(line) for line in out.splitlines()) <= 80
    assert "14 layers, r=4, alpha=8" in out and "names below model.layers" in out
    assert out.count("%") >= 14
    facts = json.loads(ran(capsys, "inspect", adapter, "--base", base, "--json"))
    assert len(facts["layers"]) == 14 and facts["unmatched"] == []
    from safetensors.torch import load_file

    layer = facts["layers"][0]
    name = f"base_model.model.{layer['layer']}"
    tensors, weights = (
        load_file(adapter / "adapter_model.safetensors"),
        load_file(base / "model.safetensors"),
    )
    a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
    update = 2.0 * (b.double() @ a.double())
    share = torch.tensor(layer["share"], dtype=torch.float64)
    want = update.norm() / weights[f"{layer['layer']}.weight"].double().norm()
    assert_within_budget(share, want, want.float())


def test_inspect_draws(capsys, tmp_path, base, adapter):
    from matplotlib.image import imread

    path = tmp_path / "new" / "spectrum.png"
    assert f"drawn: {path}" in ran(capsys, "inspect", adapter, "--png", path)
    image = imread(path)
    assert image.shape[0] > 300 and image.shape[1] > 300 and image.std() > 0.05
    assert os.listdir(path.parent) == ["spectrum.png"]


@pytest.mark.parametrize("command", ["generate", "merge", "convert", "inspect"])
def test_help_has_examples(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and f"lora-kernels {command} " in text
    examples = text[text.index("examples:") :]
    assert max(len(line) for line in examples.splitlines()) <= 80


def test_generate_refuses(capsys, tmp_path, base, adapter):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    cases = [
        (("generate", tmp_path / "none", "x"), "no such folder"),
        (("generate", adapter, "x", "--base", tmp_path / "none"), "no such folder"),
        (("generate", adapter, " "), "prompt is empty"),
        (("generate", adapter, "x", "--file", tmp_path / "bytes"), "accepted: one of them"),
        (("generate", adapter, "--file", tmp_path / "bytes"), "not UTF-8"),
        (("generate", adapter, "--file", tmp_path / "absent"), "cannot be read"),
        (("generate", adapter, "cat " * 40), "40 tokens; the model takes 31"),
        (("generate", adapter, "x", "--temperature", -1), "temperature=-1.0 is out of range"),
        (("generate", adapter, "x", "--top-p", 0), "top_p"),
        (("generate", adapter, "x", "--max-new-tokens", 0), "max_new_tokens=0"),
    ]
    for words, fragment in cases:
        assert fragment in refused(capsys, *words)


def test_merge_refuses(capsys, tmp_path, base, adapter):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis").write_text("years of work")
    config = (adapter / "adapter_config.json").read_text()
    for name in ("half", "damaged"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(config)
    weights = tmp_path / "damaged" / "adapter_model.safetensors"
    weights.write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    out = tmp_path / "o"
    cases = [
        (("merge", tmp_path / "none", out), "no adapter"),
        (("merge", tmp_path / "half", out), "adapter_model.safetensors is missing"),
        (("merge", tmp_path / "damaged", out), "damaged or belongs to another model"),
        (("merge", adapter, tmp_path / "full"), "exists"),
        (("merge", adapter, out, "--weights-only"), ".safetensors file"),
        (("merge", adapter, out, "--base", tmp_path / "none"), "no such folder"),
    ]
    if Path("/proc/sys").is_dir():
        cases.append((("merge", adapter, "/proc/sys/o"), "cannot be written"))
    for words, fragment in cases:
        assert fragment in refused(capsys, *words)
    assert not out.exists()
    assert (tmp_path / "full" / "thesis").read_text() == "years of work"


def test_convert_and_inspect_refuse(capsys, tmp_path, base, adapter):
    (tmp_path / "taken.bin").write_text("x")
    torch.save({"q.lora_A": torch.ones(2, 2), "q.lora_B": torch.full((2, 2), torch.nan)},
               tmp_path / "nan.bin")  # fmt: skip
    out = tmp_path / "o.bin"
    cases = [
        (("convert", adapter, tmp_path / "taken.bin", "--to", "loralib"), "--force"),
        (("convert", adapter, tmp_path, "--to", "loralib", "--force"), "is a folder"),
        (("convert", tmp_path / "none", out, "--to", "loralib"), "no such file"),
        (("convert", adapter, out, "--to", "loralib", "--enable-lora", "x"), "--enable-lora 'x'"),
        (("convert", adapter, out, "--to", "torchtune", "--heads", "4"), "--heads '4'"),
        (("convert", adapter, out, "--to", "torchtune", "--base", adapter), "config.json"),
        (("inspect", tmp_path / "taken.bin"), "cannot be read"),
        (("inspect", tmp_path / "nan.bin", "--alpha", 2), "NaN"),
        (("inspect", adapter, "--png", "x.jpg"), ".png"),
        (("inspect", adapter, "--base", tmp_path), "holds no *.safetensors"),
        (("inspect", adapter, "--base", adapter), "no weight of the adapter's layers"),
    ]
    for words, fragment in cases:
        assert fragment in refused(capsys, *words)
    assert not out.exists() and (tmp_path / "taken.bin").read_text() == "x"
