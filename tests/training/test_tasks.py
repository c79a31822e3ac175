"""Every task with every method that makes sense for it: learn, write, read back, answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    task_config,
    write_bert,
    write_data,
    write_gpt2,
    write_llama,
    write_t5,
)

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("sacrebleu")

from lora_kernels.training import Predictor, finetune  # noqa: E402

MODELS: dict[str, Callable[[Path], Path]] = {
    "causal-lm": write_llama,
    "chat": lambda folder: write_llama(folder, chat=True),
    "masked-lm": write_bert,
    "seq2seq": write_t5,
    "question-answering": write_bert,
    "token-classification": write_bert,
    "classification": write_bert,
}
ASKED: dict[str, Any] = {
    "causal-lm": "anna likes rome .",
    "chat": "anna likes rome . where is anna ?",
    "masked-lm": "anna likes [MASK] .",
    "seq2seq": "anna likes rome",
    "question-answering": ("where is anna ?", "anna likes rome today"),
    "token-classification": "anna likes rome .",
    "classification": "anna likes rome",
}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Model and data of a task, made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(task: str) -> tuple[Path, Path]:
        if task not in made:
            folder = tmp_path_factory.mktemp(task)
            made[task] = MODELS[task](folder / "model"), write_data(task, folder)
        return made[task]

    return get


def train(given: Any, task: str, output: Path, steps: int = 2, **top: Any) -> Any:
    model, data = given(task)
    config = task_config(task, model, data, output, max_steps=steps)
    for key, value in top.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    return finetune(config, quiet=True)


CASES = [
    *((task, "lora") for task in MODELS),
    ("causal-lm", "qlora"), ("chat", "dora"), ("seq2seq", "freeze"), ("masked-lm", "bitfit"),
    ("token-classification", "full"),
    *(
        pytest.param(task, method, marks=pytest.mark.slow)
        for task in MODELS
        for method in ("qlora", "dora", "freeze", "bitfit", "full")
        if method != "bitfit" or MODELS[task] is write_bert
    ),
]  # fmt: skip


@pytest.mark.parametrize(("task", "method"), CASES)
def test_run_is_written_and_answers_as_it_was_scored(
    given: Any, tmp_path: Path, task: str, method: str
) -> None:
    result = train(given, task, tmp_path / "run", method=method)
    report = json.loads((result.output / "report.json").read_text())
    assert report["method"] == method and report["steps"] == 2
    assert report["metric"] in report["metrics"] and report["metric"] in report["metrics_before"]
    assert report["after"] == report["metrics"][report["metric"]]
    assert 0 < report["trained_parameters"] <= report["parameters"]
    assert report["tokens_per_second"] > 0 and report["peak_memory"]["bytes"] > 0
    names = {p.name for p in result.output.iterdir()}
    assert {"adapter", "report.json", "report.md", "log.jsonl", "loss.png"} <= names
    assert ("confusion.png" in names) == (task in ("classification", "token-classification"))
    predictor = Predictor(result.output)
    answer = predictor([ASKED[task]])[0]
    json.dumps(answer)
    assert isinstance(predictor.task.show(answer), str)


@pytest.mark.slow
@pytest.mark.parametrize("task", list(MODELS))
def test_tasks_are_learnt(given: Any, tmp_path: Path, task: str) -> None:
    report = train(given, task, tmp_path / "run", steps=60, method="full", kernels=True).report
    before, after = report["before"], report["after"]
    better = after > before if report["more_is_better"] else after < before / 3
    assert better, (before, after)


def test_words_in_pieces_are_labelled_once(given: Any) -> None:
    from transformers import AutoTokenizer

    from lora_kernels.training.tasks.token_classification import TokenClassification

    model, _ = given("token-classification")
    tokenizer = AutoTokenizer.from_pretrained(model)
    words, tags = ["anna", "likes", "rome", "."], ["B-PER", "O", "B-LOC", "O"]
    for everywhere, expected in (
        (False, [-100, 1, 2, 0, -100, 2, -100]),
        (True, [-100, 1, 2, 0, 0, 2, -100]),
    ):
        task = TokenClassification(
            splits={"train": [(words, tags)], "test": [(words, tags)]},
            labels=["B-LOC", "B-PER", "O"], all_pieces=everywhere,
        )  # fmt: skip
        # [CLS] anna likes ro ##me . [SEP]
        assert task.dataset("train", tokenizer)[0]["labels"] == expected
        assert task.dataset("test", tokenizer)[0]["labels"] == [-100, 1, 2, 0, -100, 2, -100]


def test_words_beyond_the_length_are_counted(given: Any) -> None:
    from transformers import AutoTokenizer

    from lora_kernels.training.tasks.token_classification import TokenClassification

    tokenizer = AutoTokenizer.from_pretrained(given("token-classification")[0])
    task = TokenClassification(
        max_length=5, splits={"train": [(["anna", "likes", "rome", "."], ["O"] * 4)]},
        labels=["O", "X"],
    )  # fmt: skip
    rows = task.dataset("train", tokenizer)
    assert len(rows[0]["input_ids"]) == 5
    assert any("1 words lie beyond 5 tokens" in note for note in task.notes)


def test_gaps_of_the_test_are_the_same_every_time(given: Any) -> None:
    from transformers import AutoTokenizer

    from lora_kernels.training.tasks.masked_lm import MaskedLM

    tokenizer = AutoTokenizer.from_pretrained(given("masked-lm")[0])
    texts = ["anna likes rome . anna is in rome ."] * 6
    task = MaskedLM(max_length=32, splits={"train": texts, "test": texts}, probability=0.4)
    rows, again = task.dataset("test", tokenizer), task.dataset("test", tokenizer)
    assert rows == again and any(label != -100 for row in rows for label in row["labels"])
    for row in rows:
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            assert label != -100 or token != tokenizer.mask_token_id
    collate = task.collator(tokenizer)
    train = task.dataset("train", tokenizer)
    torch.manual_seed(0)
    first, second = (collate(train)["input_ids"] for _ in range(2))
    assert not torch.equal(first, second), "training draws new gaps in each epoch"


def test_a_batch_without_a_gap_gets_one(given: Any) -> None:
    """The mean loss over nothing is not a number; small last batches of an epoch run into it."""
    from transformers import AutoTokenizer

    from lora_kernels.training.tasks.masked_lm import MaskedLM

    tokenizer = AutoTokenizer.from_pretrained(given("masked-lm")[0])
    task = MaskedLM(splits={"train": ["anna ."], "test": ["anna ."] * 40}, probability=0.01)
    collate, rows = task.collator(tokenizer), task.dataset("train", tokenizer)
    for _ in range(50):
        batch = collate(rows)
        place = batch["labels"][0] != -100
        assert place.sum() == 1 and not place[0] and not place[-1]
        assert batch["labels"][0][place] == torch.tensor(rows[0]["input_ids"])[place]
    assert all(any(x != -100 for x in row["labels"]) for row in task.dataset("test", tokenizer))


def test_questions_see_where_the_question_ends(given: Any, tmp_path: Path) -> None:
    """token_type_ids reach BERT through the adapter's wrapper: it changes no logit at the start."""
    from transformers import AutoTokenizer

    from lora_kernels.training.config_reader import read_config
    from lora_kernels.training.loading import load_base
    from lora_kernels.training.methods.adapters import prepare
    from lora_kernels.training.tasks import task_class

    model, data = given("question-answering")
    config = read_config(task_config("question-answering", model, data, tmp_path / "run"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    task = task_class(config.task).from_config(config)
    base = load_base(task, str(model), torch.float32, tokenizer, {})
    batch = task.collator(tokenizer)(task.dataset("train", tokenizer)[:2])
    with torch.no_grad():
        expected = base.model.eval()(**batch).start_logits
        without = base.model(
            **{k: v for k, v in batch.items() if k != "token_type_ids"}
        ).start_logits
        wrapped = prepare(base, task, config).eval()(**batch).start_logits
    assert torch.equal(wrapped, expected) and not torch.equal(without, expected)


def test_conv1d_layers_get_adapters(tmp_path: Path) -> None:
    model, data = write_gpt2(tmp_path / "model"), write_data("causal-lm", tmp_path)
    result = finetune(task_config("causal-lm", model, data, tmp_path / "run"), quiet=True)
    # attention in and out, two of the MLP, per layer
    assert result.report["total_layers"] == 8
    assert Predictor(result.output)(["anna likes"])[0]["answer"] is not None


def test_new_modules_of_a_head_are_saved_with_the_adapter(given: Any, tmp_path: Path) -> None:
    """A checkpoint without the language-modelling head: its new layers must not stay random."""
    from safetensors.torch import load_file

    result = train(given, "masked-lm", tmp_path / "run")
    tensors = load_file(result.adapter / "adapter_model.safetensors")
    assert any("cls.predictions.transform.dense.weight" in key for key in tensors)
    answers = [Predictor(result.output)([ASKED["masked-lm"]]) for _ in range(2)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    "packing",
    ["stream", *(pytest.param(p, marks=pytest.mark.slow) for p in ("documents", "none"))],
)
def test_packing_changes_the_rows_and_not_the_texts(
    given: Any, tmp_path: Path, packing: str
) -> None:
    result = train(given, "causal-lm", tmp_path / "run", data={"packing": packing})
    notes = " ".join(result.report["notes"])
    assert {"documents": "kept apart by position ids", "stream": "see those before them",
            "none": "padding"}[packing] in notes  # fmt: skip


def test_perplexity_does_not_depend_on_the_packing(given: Any, tmp_path: Path) -> None:
    packed, padded = (
        train(given, "causal-lm", tmp_path / name, data={"packing": name}).report["metrics_before"]
        for name in ("documents", "none")
    )
    assert packed["tokens"] == padded["tokens"]
    assert packed["perplexity"] == pytest.approx(padded["perplexity"])


def test_summaries_are_scored_by_rouge(given: Any, tmp_path: Path) -> None:
    model, data = given("seq2seq")
    renamed = tmp_path / "summaries.jsonl"
    renamed.write_text(
        data.read_text().replace('"target"', '"summary"').replace("source", "article")
    )
    config = task_config("seq2seq", model, renamed, tmp_path / "run", max_steps=1)
    report = finetune(config, quiet=True).report
    assert report["metric"] == "rougeL"
    assert "source='article', target='summary'" in " ".join(report["notes"])
    assert set(report["samples"][0]) == {"source", "target", "answer"}


def test_one_long_text_holds_its_end_out(given: Any, tmp_path: Path) -> None:
    model, _ = given("causal-lm")
    text = tmp_path / "book.txt"
    text.write_text("\n".join(f"anna likes rome . line {i}" for i in range(60)))
    config = task_config("causal-lm", model, text, tmp_path / "run", max_steps=1)
    config["data"] |= {"documents": "file", "packing": "stream"}
    report = finetune(config, quiet=True).report
    assert report["examples"] == {"train": 1, "validation": 1, "test": 1}
    assert "its last lines are held out" in " ".join(report["notes"])
