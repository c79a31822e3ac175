"""Adapters of PEFT, loralib and torchtune: the same function, and back without a lost bit."""

from __future__ import annotations

import json

import pytest
import torch

from lora_kernels.errors import AdapterFileError, InvalidArgumentError
from lora_kernels.modules import safetensors_file
from lora_kernels.modules.adapter_formats import Heads, read_adapter, write_adapter
from lora_kernels.testing import assert_within_budget

PREFIX = "base_model.model."
HEADS = Heads(query=4, key=2, width=6)


def peft_folder(folder, layers, saved=(), dora=False, dtype=torch.float32, **config):
    """A PEFT adapter on disk; `layers` maps a name to (r, K, N)."""
    tensors = {}
    for name, (r, k, n) in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(r, k).to(dtype)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(n, r).to(dtype)
        if dora:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = torch.rand(n).to(dtype)
    for name in saved:
        tensors[PREFIX + name] = torch.randn(3, 2)
    folder.mkdir()
    with open(folder / "adapter_model.safetensors", "wb") as file:
        safetensors_file.write(file, tensors, {"format": "pt"})
    content = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": dora, "something_new": [1],
        "target_modules": sorted({n.rpartition(".")[2] for n in layers}),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(content | config))
    return tensors


LLAMA = {
    "model.layers.0.self_attn.q_proj": (4, 20, 24),
    "model.layers.0.self_attn.k_proj": (4, 20, 12),
    "model.layers.11.self_attn.o_proj": (4, 24, 20),
    "model.layers.11.mlp.gate_proj": (4, 20, 33),
    "lm_head": (4, 20, 50),
}


def assert_same(folder, tensors, config):
    got, _ = safetensors_file.read_file(folder / "adapter_model.safetensors")
    assert got.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert got[key].dtype == tensor.dtype and torch.equal(got[key], tensor), key
    assert json.loads((folder / "adapter_config.json").read_text()) == config


@pytest.mark.parametrize("file", ["lora.bin", "lora.safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loralib_and_back(tmp_path, dtype, file):
    layers = {"encoder.layer.0.query": (4, 20, 7), "encoder.layer.1.query": (2, 20, 7)}
    tensors = peft_folder(
        tmp_path / "a", layers, saved=["classifier.dense.weight"], dtype=dtype,
        modules_to_save=["classifier"], rank_pattern={"layer.1.query": 2}, use_rslora=True,
    )  # fmt: skip
    adapter, found = read_adapter(tmp_path / "a")
    assert found == "peft"
    write_adapter(adapter, tmp_path / file, "loralib")
    assert "build 1 loralib layers with r=4, lora_alpha=16" in adapter.notes
    if file.endswith(".bin"):
        state = torch.load(tmp_path / file, weights_only=True)
        assert set(state) == {
            "encoder.layer.0.query.lora_A", "encoder.layer.0.query.lora_B",
            "encoder.layer.1.query.lora_A", "encoder.layer.1.query.lora_B",
            "classifier.dense.weight",
        }  # fmt: skip
    adapter, found = read_adapter(tmp_path / file)
    assert found == "loralib"
    write_adapter(adapter, tmp_path / "b", "peft")
    assert_same(
        tmp_path / "b", tensors, json.loads((tmp_path / "a/adapter_config.json").read_text())
    )


def test_loralib_without_its_configuration_needs_alpha(tmp_path):
    a, b = torch.randn(8, 20), torch.randn(7, 8)
    state = {"module.roberta.encoder.query.lora_A": a, "module.roberta.encoder.query.lora_B": b,
             "module.classifier.dense.weight": torch.randn(2, 2)}  # fmt: skip
    torch.save(state, tmp_path / "x.bin")
    with pytest.raises(AdapterFileError, match="alpha"):
        read_adapter(tmp_path / "x.bin")
    adapter, _ = read_adapter(tmp_path / "x.bin", alpha=16)
    assert adapter.config["r"] == 8 and adapter.config["lora_alpha"] == 16
    assert adapter.config["target_modules"] == ["roberta.encoder.query"]
    assert adapter.config["modules_to_save"] == ["classifier"]
    assert adapter.scaling_of("roberta.encoder.query", 8) == 2.0
    assert torch.equal(adapter.tensors[f"{PREFIX}roberta.encoder.query.lora_B.weight"], b)
    assert f"{PREFIX}classifier.dense.weight" in adapter.tensors


def merged_linear(x, a, b, enabled, scaling):
    """loralib's MergedLinear, part by part."""
    groups, r = sum(enabled), b.shape[1]
    part = b.shape[0] // groups
    out, block = x.new_zeros(len(x), part * len(enabled)), 0
    for position, on in enumerate(enabled):
        if on:
            inner = x @ a[block * r : (block + 1) * r].t()
            out[:, position * part : (position + 1) * part] = (
                inner @ b[block * part : (block + 1) * part].t() * scaling
            )
            block += 1
    return out


@pytest.mark.parametrize("enabled", [[True, False, True], [False, True], [True, True, True]])
def test_merged_layers_become_block_diagonal_and_come_back(tmp_path, enabled):
    groups, r, part, k = sum(enabled), 3, 5, 11
    a = torch.randn(groups * r, k, dtype=torch.float64)
    b = torch.randn(groups * part, r, dtype=torch.float64)
    torch.save({"h.0.attn.c_attn.lora_A": a, "h.0.attn.c_attn.lora_B": b}, tmp_path / "gpt2.bin")
    if groups > 1:
        with pytest.raises(AdapterFileError, match="--enable-lora"):
            read_adapter(tmp_path / "gpt2.bin", alpha=6)
        adapter, _ = read_adapter(tmp_path / "gpt2.bin", alpha=6, enabled=enabled)
        key = f"{PREFIX}h.0.attn.c_attn."
        a_wide = adapter.tensors[key + "lora_A.weight"]
        b_wide = adapter.tensors[key + "lora_B.weight"]
        x = torch.randn(4, k, dtype=torch.float64)
        scaling = adapter.scaling_of("h.0.attn.c_attn", a_wide.shape[0])
        got = x @ a_wide.t() @ b_wide.t() * scaling
        want = merged_linear(x, a, b, enabled, 6 / r)
        assert_within_budget(got, want, want)
        write_adapter(adapter, tmp_path / "back.bin", "loralib", enabled=enabled)
        back = torch.load(tmp_path / "back.bin", weights_only=True)
        assert torch.equal(back["h.0.attn.c_attn.lora_A"], a)
        assert torch.equal(back["h.0.attn.c_attn.lora_B"], b)
        assert f"build 1 loralib layers with r={r}, lora_alpha=6" in adapter.notes
        again, _ = read_adapter(tmp_path / "back.bin")  # enable_lora lies beside the file
        assert torch.equal(again.tensors[key + "lora_B.weight"], b_wide)


def test_folding_refuses_what_is_not_block_diagonal(tmp_path):
    peft_folder(tmp_path / "a", {"c_attn": (4, 9, 12)})
    adapter, _ = read_adapter(tmp_path / "a")
    with pytest.raises(AdapterFileError, match="not block-diagonal"):
        write_adapter(adapter, tmp_path / "x.bin", "loralib", enabled=[True, False, True])
    assert not (tmp_path / "x.bin").exists()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("heads", [HEADS, None])
def test_torchtune_and_back(tmp_path, heads, dora):
    tensors = peft_folder(tmp_path / "a", LLAMA, dora=dora)
    adapter, _ = read_adapter(tmp_path / "a")
    write_adapter(adapter, tmp_path / "adapter_model.pt", "torchtune", heads=heads)
    state = torch.load(tmp_path / "adapter_model.pt", weights_only=True)
    names = {"layers.0.attn.q_proj", "layers.0.attn.k_proj", "layers.11.attn.output_proj",
             "layers.11.mlp.w1", "output"}  # fmt: skip
    kinds = [".lora_a.weight", ".lora_b.weight", *([".magnitude"] if dora else [])]
    assert set(state) == {n + k for n in names for k in kinds}
    adapter, found = read_adapter(tmp_path / "adapter_model.pt", heads=heads)
    assert found == "torchtune"
    write_adapter(adapter, tmp_path / "b", "peft")
    assert_same(
        tmp_path / "b", tensors, json.loads((tmp_path / "a/adapter_config.json").read_text())
    )


def test_rows_of_query_and_key_go_by_pairs(tmp_path):
    """Row 2 q + p of a head in torchtune is row p width/2 + q of it in transformers."""
    tensors = peft_folder(tmp_path / "a", LLAMA)
    adapter, _ = read_adapter(tmp_path / "a")
    write_adapter(adapter, tmp_path / "t.pt", "torchtune", heads=HEADS)
    state = torch.load(tmp_path / "t.pt", weights_only=True)
    for kind, count in (("q_proj", 4), ("k_proj", 2)):
        ours = tensors[f"{PREFIX}model.layers.0.self_attn.{kind}.lora_B.weight"]
        theirs = state[f"layers.0.attn.{kind}.lora_b.weight"]
        for head in range(count):
            for pair in range(3):
                for p in range(2):
                    assert torch.equal(
                        theirs[head * 6 + 2 * pair + p], ours[head * 6 + p * 3 + pair]
                    )
    same = f"{PREFIX}model.layers.11.self_attn.o_proj.lora_B.weight"
    assert torch.equal(state["layers.11.attn.output_proj.lora_b.weight"], tensors[same])


def test_torchtune_own_configuration_is_read(tmp_path):
    state = {"layers.0.attn.output_proj.lora_a.weight": torch.randn(4, 24),
             "layers.0.attn.output_proj.lora_b.weight": torch.randn(20, 4)}  # fmt: skip
    torch.save(state, tmp_path / "adapter_0.pt")
    with pytest.raises(AdapterFileError, match="alpha"):
        read_adapter(tmp_path / "adapter_0.pt")
    own = {"r": 4, "lora_alpha": 12, "target_modules": ["output_proj"], "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(own))
    adapter, _ = read_adapter(tmp_path / "adapter_0.pt")
    assert adapter.config["target_modules"] == ["model.layers.0.self_attn.o_proj"]
    assert adapter.scaling_of("model.layers.0.self_attn.o_proj", 4) == 3.0


def test_peft_loads_a_converted_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(20, 7), torch.nn.Linear(7, 3))
    a, b = torch.randn(4, 20), torch.randn(7, 4)
    torch.save({"0.lora_A": a, "0.lora_B": b}, tmp_path / "x.bin")
    adapter, _ = read_adapter(tmp_path / "x.bin", alpha=8)
    write_adapter(adapter, tmp_path / "peft", "peft")
    x = torch.randn(5, 20)
    want = model[1](model[0](x) + 2.0 * (x @ a.t() @ b.t()))
    exact = model.double()
    want64 = exact[1](exact[0](x.double()) + 2.0 * (x.double() @ a.double().t() @ b.double().t()))
    loaded = peft.PeftModel.from_pretrained(model.float(), str(tmp_path / "peft"))
    assert_within_budget(loaded(x), want64, want)


@pytest.mark.parametrize(
    ("state", "fragment"),
    [
        ({"q.lora_A": torch.zeros(2, 3)}, "has no lora_B"),
        ({"q.lora_A": torch.zeros(2, 3), "q.lora_B": torch.zeros(4, 3)}, "lora_B [4, 3]"),
        ({"q.lora_A": torch.zeros(2, 3), "q.lora_C": torch.zeros(4, 2)}, "'q.lora_C'"),
        ({"q.lora_A": torch.zeros(2, 3), "q.lora_B": torch.zeros(4, 2), "q.bias": torch.zeros(4)},
         "bias of the base model"),
        ({"q.weight": torch.zeros(2, 3)}, "are not an adapter's"),
        ({}, "no tensor at all"),
        ({"q": 3}, "no state dict"),
        ([torch.zeros(2)], "no state dict"),
        ({"layers.0.attn.qkv.lora_a.weight": torch.zeros(2, 3)}, "no counterpart"),
        ({f"{PREFIX}q.lora_A.weight": torch.zeros(2, 3)}, "give its folder"),
    ],
)  # fmt: skip
def test_files_outside_the_formats(tmp_path, state, fragment):
    torch.save(state, tmp_path / "x.bin")
    with pytest.raises(AdapterFileError) as caught:
        read_adapter(tmp_path / "x.bin", alpha=4)
    assert fragment in str(caught.value) and "\n" not in str(caught.value)


class Harmful:
    def __reduce__(self):
        return (open, ("was-run", "w"))


def test_pickled_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"q.lora_A": Harmful()}, "x.bin")
    with pytest.raises(AdapterFileError, match="cannot be read"):
        read_adapter("x.bin", alpha=4)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04garbage"])
def test_damaged_files(tmp_path, content):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(AdapterFileError, match="cannot be read"):
        read_adapter(tmp_path / "x.bin", alpha=4)


def test_what_a_format_cannot_hold(tmp_path):
    peft_folder(tmp_path / "dora", {"model.layers.0.mlp.up_proj": (4, 6, 8)}, dora=True)
    adapter, _ = read_adapter(tmp_path / "dora")
    with pytest.raises(AdapterFileError, match="DoRA"):
        write_adapter(adapter, tmp_path / "x.bin", "loralib")
    peft_folder(
        tmp_path / "saved", {"model.layers.0.mlp.up_proj": (4, 6, 8)}, saved=["head.weight"]
    )
    adapter, _ = read_adapter(tmp_path / "saved")
    with pytest.raises(AdapterFileError, match=r"head\.weight"):
        write_adapter(adapter, tmp_path / "x.pt", "torchtune")
    with pytest.raises(InvalidArgumentError, match="accepted: peft"):
        write_adapter(adapter, tmp_path / "x.pt", "onnx")
    peft_folder(tmp_path / "wide", {"model.layers.0.self_attn.q_proj": (4, 6, 8)})
    adapter, _ = read_adapter(tmp_path / "wide")
    with pytest.raises(AdapterFileError, match="8 rows, not 4 heads of 6"):
        write_adapter(adapter, tmp_path / "x.pt", "torchtune", heads=HEADS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dora", "saved", "wide"]
