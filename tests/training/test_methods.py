"""What each method trains, and what it says where it can train nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import task_config, write_bert, write_data, write_llama, write_t5

pytest.importorskip("peft")
pytest.importorskip("transformers")

from lora_kernels.errors import ConfigError
from lora_kernels.training.config_reader import read_config
from lora_kernels.training.loading import load_base, load_tokenizer
from lora_kernels.training.methods import method_module
from lora_kernels.training.tasks import task_class
from lora_kernels.training.trainer import loraplus_groups


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bert")
    return write_bert(folder / "model"), write_data("classification", folder)


def prepared(
    pair: tuple[Path, Path], *overrides: str, task: str = "classification", dtype: Any = None
) -> Any:
    config = read_config(task_config(task, *pair, Path("unused")), overrides)
    chosen = task_class(config.task).from_config(config)
    path = str(pair[0])
    base = load_base(chosen, path, dtype or torch.float32, load_tokenizer(path), {})
    return method_module(config.method).prepare(base, chosen, config)


def trained(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_freeze_trains_the_last_layers_and_the_head(bert: Any) -> None:
    names = trained(prepared(bert, "method=freeze", "freeze.layers=1"))
    assert {n.split(".")[0] for n in names} == {"bert", "classifier"}
    assert {n.split(".")[3] for n in names if n.startswith("bert")} == {"1"}
    by_name = trained(prepared(bert, "method=freeze", "freeze.modules=[pooler, query]"))
    assert {n for n in by_name if "classifier" not in n} == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias",
        *(f"bert.encoder.layer.{i}.attention.self.query.{k}" for i in (0, 1)
          for k in ("weight", "bias")),
    }  # fmt: skip


def test_freeze_of_a_seq2seq_model_is_the_decoders(tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu")
    pair = write_t5(tmp_path / "model"), write_data("seq2seq", tmp_path)
    names = trained(prepared(pair, "method=freeze", "freeze.layers=1", task="seq2seq"))
    assert {n.rpartition(".layer.")[0].split(".layer")[0] for n in names} == {"decoder.block.1"}


def test_bitfit_trains_the_biases_and_the_head(bert: Any) -> None:
    names = trained(prepared(bert, "method=bitfit"))
    assert names == {n for n in names if n.endswith("bias")} | {"classifier.weight"}
    assert "bert.encoder.layer.0.output.dense.bias" in names


def test_full_trains_everything(bert: Any) -> None:
    model = prepared(bert, "method=full")
    assert trained(model) == {name for name, _ in model.named_parameters()}


def test_dora_has_magnitudes(bert: Any) -> None:
    assert any("lora_magnitude_vector" in n for n in trained(prepared(bert, "method=dora")))


def test_qlora_keeps_no_dense_weight_of_its_layers(bert: Any) -> None:
    import lora_kernels as lk

    model = prepared(bert, "method=qlora", "quant.format=nf4")
    layers = [m for m in model.modules() if isinstance(m, lk.QuantLoRALinear)]
    # query, key, value, output and two of the MLP per layer, and the pooler
    assert len(layers) == 13 and {m.format for m in layers} == {"nf4"}
    assert trained(model) >= {"classifier.weight", "classifier.bias"}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("method", ["lora", "qlora", "dora", "freeze", "bitfit"])
def test_what_trains_is_fp32_over_a_base_in_bf16(bert: Any, method: str) -> None:
    for precision, expected in (("bf16", torch.float32), ("bf16-weights", torch.bfloat16)):
        model = prepared(bert, f"method={method}", f"precision={precision}", dtype=torch.bfloat16)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}


def test_embeddings_train_in_fp32_over_a_base_in_bf16(bert: Any) -> None:
    model = prepared(
        bert, "precision=bf16", "lora.modules_to_save=[word_embeddings]", dtype=torch.bfloat16
    )
    tokens = torch.arange(6)[None]
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=tokens, labels=torch.tensor([0])).loss.backward()
    (table,) = (p for n, p in model.named_parameters() if "embeddings.modules_to_save" in n)
    assert table.dtype == table.grad.dtype == torch.float32
    assert table.grad[:6].abs().amax(1).count_nonzero() >= 5 and not table.grad[6:].any()


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (["lora.targets=[query, valeu]"], ("'valeu'", "query", "key", "value", "dense")),
        (["lora.targets=nothing.*"], ("'nothing.*'", "all-linear", "query")),
        (["lora.targets=[("], ("lora.targets",)),
        (["lora.targets=("], ("regular expression",)),
        (["lora.targets=[]"], ("matches no module", "query")),
        (["lora.r=33"], ("lora.r=33", "at most 32", "query")),
        (["lora.modules_to_save=[heda]"], ("lora.modules_to_save='heda'",)),
    ],
)
def test_adapters_that_fit_nothing(
    bert: Any, method: str, overrides: list[str], fragments: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        prepared(bert, f"method={method}", *overrides)
    message = str(caught.value)
    assert "\n" not in message and all(f in message for f in fragments), message


def test_excluded_layers_get_no_adapter(bert: Any) -> None:
    for method in ("lora", "qlora"):
        names = trained(prepared(bert, f"method={method}", "lora.exclude=[pooler.dense]"))
        assert any("lora_A" in n for n in names)
        assert not any("pooler" in n for n in names)


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (["method=freeze", "freeze.layers=3"], "accepted: 1 to 2"),
        (["method=freeze", "freeze.modules=[layre]"], "freeze.modules='layre'"),
        (["method=freeze", "freeze.layers=0"], "train nothing"),
        (["method=qlora", "quant.format=int3"], "int3"),
        (["method=qlora", "kernels=false"], "kernels=False"),
        (["method=full", "train.loraplus_ratio=4"], "needs an adapter"),
        (["method=freeze", "compare_stock=true"], "no stock twin"),
    ],
)
def test_methods_that_can_train_nothing(bert: Any, overrides: list[str], fragment: str) -> None:
    with pytest.raises(ConfigError, match=fragment):
        prepared(bert, *overrides)


def test_a_model_without_biases_has_no_bitfit(tmp_path: Path) -> None:
    pair = write_llama(tmp_path / "model"), write_data("causal-lm", tmp_path)
    with pytest.raises(ConfigError, match="has no biases"):
        prepared(pair, "method=bitfit", task="causal-lm")


def test_loraplus_gives_b_its_own_rate(bert: Any) -> None:
    model = prepared(bert)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {n for n in names.values() if n.endswith("weight")}
    groups = loraplus_groups(model, 1e-3, 16.0, 0.1, decayed)
    rates = {names[id(p)]: g["lr"] for g in groups for p in g["params"]}
    assert set(rates) == trained(model)
    assert {r for n, r in rates.items() if "lora_B" in n} == {1e-3 * 16.0}
    assert {r for n, r in rates.items() if "lora_B" not in n} == {1e-3}
    decay = {names[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}
    assert {n for n, d in decay.items() if d == 0.0} == {n for n in rates if n.endswith("bias")}


def test_loraplus_without_b_is_refused(bert: Any) -> None:
    with pytest.raises(ConfigError, match="lora_B"):
        loraplus_groups(prepared(bert, "method=full"), 1e-3, 4.0, 0.0, set())


@pytest.mark.parametrize(
    ("task", "overrides"),
    [
        ("classification", ["method=bitfit"]),
        ("classification", ["method=freeze", "freeze.modules=[word_embeddings]"]),
        ("classification", ["method=qlora", "lora.modules_to_save=[word_embeddings]"]),
        ("causal-lm", ["method=qlora", "lora.modules_to_save=[embed_tokens]"]),
        ("causal-lm", ["method=freeze", "freeze.modules=[embed_tokens]"]),
    ],
)  # fmt: skip
def test_parts_that_train_in_fp32_fit_into_a_model_of_bf16(
    tmp_path: Path, task: str, overrides: list[str]
) -> None:
    """Embeddings and norms, which autocast leaves alone; read back they answer the same."""
    from lora_kernels.training import Predictor, finetune

    write = write_llama if task == "causal-lm" else write_bert
    model, data = write(tmp_path / "model"), write_data(task, tmp_path)
    source = task_config(task, model, data, tmp_path / "run", max_steps=2)
    result = finetune(source, [*overrides, "precision=bf16"], quiet=True)
    before, after = result.report["metrics_before"]["loss"], result.report["metrics"]["loss"]
    assert after != before
    predictor = Predictor(tmp_path / "run")
    parameters = dict(predictor.model.named_parameters())
    assert {p.dtype for p in parameters.values() if p.is_floating_point()} == {
        torch.float32, torch.bfloat16,
    }  # fmt: skip
    assert predictor(["anna visits rome"])
