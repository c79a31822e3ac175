"""Training over models whose files are quantized already, in layouts that other tools read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import task_config, write_data, write_llama

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import lora_kernels as lk  # noqa: E402
from lora_kernels.errors import ConfigError  # noqa: E402
from lora_kernels.testing import BudgetExceededError, assert_within_budget  # noqa: E402
from lora_kernels.training import Predictor, finetune  # noqa: E402
from lora_kernels.training.quantized_base import method_of  # noqa: E402

# K of every layer is a multiple of the group.
SHAPE = {"hidden_size": 64, "intermediate_size": 128}
FORMATS = {
    "nf4": ({"format": "nf4"}, "bitsandbytes"),
    "int8": ({"format": "int8"}, "bitsandbytes"),
    "int4": ({"format": "int4", "block_size": 32}, "gptq"),
    "fp8_row": ({"format": "fp8_row"}, "lora_kernels"),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("dense"), **SHAPE)


@pytest.fixture(scope="module")
def quantized(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in each format, as `save_pretrained` writes it."""
    made = {}
    for name, (options, _) in FORMATS.items():
        folder = tmp_path_factory.mktemp(name)
        shutil.copytree(dense, folder, dirs_exist_ok=True)
        (folder / "model.safetensors").unlink()
        transformers.AutoModelForCausalLM.from_pretrained(
            dense, quantization_config=lk.QuantConfig(**options)
        ).save_pretrained(folder)
        made[name] = folder
    return made


def settings(model: Path, tmp_path: Path, method: str, **sections: Any) -> dict[str, Any]:
    data = write_data("causal-lm", tmp_path)
    made = task_config("causal-lm", model, data, tmp_path / "run", max_steps=3)
    return {**made, "method": method, **sections}


@pytest.mark.parametrize(
    ("name", "method"),
    [("nf4", "qlora"), ("nf4", "lora"), ("int8", "qlora"), ("int4", "qlora"), ("fp8_row", "qlora")],
)
def test_a_quantized_model_trains_as_it_is(
    quantized: dict[str, Path], tmp_path: Path, name: str, method: str
) -> None:
    folder = quantized[name]
    assert method_of(transformers.AutoConfig.from_pretrained(folder)) == FORMATS[name][1]
    result = finetune(settings(folder, tmp_path, method, lora={"r": 4}), quiet=True)
    assert result.report["steps"] == 3 and result.report["after"] < result.report["before"]

    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=lk.QuantConfig(), dtype=torch.float32
    )
    packed = {n: p for n, p in base.state_dict().items() if "_proj." in n}
    assert len(packed) >= 14
    run = Predictor(tmp_path / "run")
    layers = [m for m in run.model.modules() if isinstance(m, lk.QuantLinear)]
    assert len(layers) == 14
    held = {n.replace("base_model.model.", "").replace("base_layer.", ""): p
            for n, p in run.model.state_dict().items()}  # fmt: skip
    for key, tensor in packed.items():
        assert torch.equal(held[key], tensor), key

    from peft import PeftModel

    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        alone = base(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, result.adapter).eval()
        theirs = adapted(input_ids=ids).logits
        ours = run.model(input_ids=ids).logits
    moved = (theirs - alone).norm()
    assert moved > 0 and (ours - theirs).norm() < 1e-2 * moved


@pytest.mark.parametrize(
    ("method", "sections", "fragments"),
    [
        ("full", {}, ("method='full'", "quantized already (bitsandbytes)", "qlora")),
        ("dora", {}, ("method='dora'", "qlora")),
        ("freeze", {}, ("method='freeze'", "qlora")),
        ("qlora", {"quant": {"format": "int8"}}, ("quant.format='int8'", "leave it out")),
        ("qlora", {"quant": {"block_size": 32}}, ("quant.block_size=32", "leave it out")),
    ],
)
def test_what_a_quantized_model_cannot_honour_is_refused(
    quantized: dict[str, Path],
    tmp_path: Path,
    method: str,
    sections: dict[str, Any],
    fragments: tuple[str, ...],
) -> None:
    with pytest.raises(ConfigError) as caught:
        finetune(settings(quantized["nf4"], tmp_path, method, **sections), quiet=True)
    message = str(caught.value)
    assert "\n" not in message and all(f in message for f in fragments), message
    assert not (tmp_path / "run").exists()


def test_other_models_are_not_concerned(dense: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(dense)
    assert method_of(config) is None
    config.quantization_config = {"quant_method": "hqq"}
    assert method_of(config) is None


def test_a_merged_model_is_dense_and_computes_the_same(
    quantized: dict[str, Path], tmp_path: Path
) -> None:
    from lora_kernels.training.merging import merge_to_disk

    finetune(settings(quantized["nf4"], tmp_path, "qlora"), quiet=True)
    merge_to_disk(tmp_path / "run", tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert method_of(merged.config) is None
    assert not any(isinstance(m, lk.QuantLinear) for m in merged.modules())
    run = Predictor(tmp_path / "run").model
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        expected, found = run(input_ids=ids).logits, merged(input_ids=ids).logits
        for m in run.modules():
            if isinstance(m, lk.QuantLoRALinear):
                m.lora_B.zero_()
        without = run(input_ids=ids).logits
        exact = merged.double()(input_ids=ids).logits
    assert_within_budget(expected, exact, found, "logits")
    with pytest.raises(BudgetExceededError):
        assert_within_budget(without, exact, found, "logits without the adapter")
