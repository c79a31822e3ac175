"""Conversations: the loss is on the answers and on nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_llama

from lora_kernels.errors import DataError
from lora_kernels.training.data.chat import encode, from_prompt, prompt_text, read_messages

transformers = pytest.importorskip("transformers")

TALK = [
    {"role": "user", "content": "where is anna ?"},
    {"role": "assistant", "content": "in rome ."},
    {"role": "user", "content": "where is bert ?"},
    {"role": "assistant", "content": "in oslo ."},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_llama(tmp_path_factory.mktemp("chat"), chat=True)
    return transformers.AutoTokenizer.from_pretrained(folder)


def learnt(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    ids, labels = encode(messages, tokenizer)
    assert len(ids) == len(labels)
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    return tokenizer.decode([label for label in labels if label != -100])


def test_every_answer_is_learnt_with_its_end_and_nothing_else(tokenizer: Any) -> None:
    assert learnt(tokenizer, TALK) == "in rome . <|end|> in oslo . <|end|>"
    ids, _ = encode(TALK, tokenizer)
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert ids == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_negative_control_learning_the_prompt_would_show(tokenizer: Any) -> None:
    swapped = [{**m, "role": "assistant" if m["role"] == "user" else "user"} for m in TALK]
    assert "where is bert" in learnt(tokenizer, swapped)
    assert "where" not in learnt(tokenizer, TALK)


def test_a_greeting_is_context(tokenizer: Any) -> None:
    greeting = {"role": "assistant", "content": "who is in town ?"}
    assert learnt(tokenizer, [greeting, *TALK[:2]]) == "in rome . <|end|>"


def test_what_is_asked_is_encoded_as_it_was_learnt(tokenizer: Any) -> None:
    ids, labels = encode(TALK[:2], tokenizer)
    asked = tokenizer(prompt_text(TALK[:1], tokenizer), add_special_tokens=False)["input_ids"]
    assert ids[: len(asked)] == asked
    assert labels[: len(asked)] == [-100] * len(asked) and labels[len(asked)] != -100


def test_without_a_template_lines_and_end_marks(tokenizer: Any, tmp_path: Path) -> None:
    plain = transformers.AutoTokenizer.from_pretrained(write_llama(tmp_path))
    assert plain.chat_template is None
    assert learnt(plain, TALK[:2]) == "in rome . </s>"
    assert prompt_text(TALK[:1], plain) == "where is anna ?\n"


def test_a_template_that_rewrites_earlier_messages_is_refused(tokenizer: Any) -> None:
    forgets = (
        "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}"
        "<|start|>{{ m['content'] }}{% endif %}{% endfor %}"
    )
    before = tokenizer.chat_template
    tokenizer.chat_template = forgets
    try:
        with pytest.raises(DataError, match="changes earlier messages"):
            encode(TALK, tokenizer)
        assert learnt(tokenizer, TALK[:2]) == "<|start|> in rome ."
    finally:
        tokenizer.chat_template = before


def test_a_template_that_refuses_is_told(tokenizer: Any) -> None:
    before = tokenizer.chat_template
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    try:
        with pytest.raises(DataError, match=r"row 3.*roles must alternate"):
            encode(TALK, tokenizer, "row 3")
    finally:
        tokenizer.chat_template = before


def test_shapes_of_messages() -> None:
    shared = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    expected = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert read_messages(shared, "here") == read_messages(expected, "here") == expected
    assert read_messages(json.dumps(expected), "here") == expected
    assert from_prompt("sum up", "a text", "b")[0]["content"] == "sum up\n\na text"


@pytest.mark.parametrize(
    ("value", "fragment"),
    [
        ("hello", "not JSON"),
        ({"role": "user"}, "a dict"),
        (["hello"], "is no message"),
        ([{"role": "user", "content": None}], "is no message"),
        ([{"role": "user", "content": "a"}], "no message of the assistant"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}],
            "no message of the assistant",
        ),
    ],
)
def test_bad_messages(value: Any, fragment: str) -> None:
    with pytest.raises(DataError, match=fragment) as caught:
        read_messages(value, "file.jsonl, row 7")
    assert "row 7" in str(caught.value)
