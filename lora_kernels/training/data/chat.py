"""Conversations: from the columns of a file to messages, from messages to tokens and labels."""

from __future__ import annotations

import json
from typing import Any

from lora_kernels.errors import DataError
from lora_kernels.training.metrics.language import IGNORED

Message = dict[str, str]
ASSISTANT = "assistant"
_ROLES = {
    "assistant": ASSISTANT, "gpt": ASSISTANT, "model": ASSISTANT, "bot": ASSISTANT,
    "chatgpt": ASSISTANT, "user": "user", "human": "user", "prompter": "user",
    "system": "system", "tool": "tool", "function": "tool",
}  # fmt: skip


def read_messages(value: Any, where: str) -> list[Message]:
    """Messages with the keys ``role`` and ``content``, from lists (or their JSON) in either of the
    usual shapes: ``role``/``content`` and ``from``/``value``.

    Raises:
        DataError: another shape, or no message of the assistant.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise DataError(f"{where}: the messages are a text that is not JSON") from None
    if not isinstance(value, list):
        raise DataError(f"{where}: the messages are a {type(value).__name__}; accepted: a list")
    messages = []
    for item in value:
        role = item.get("role", item.get("from")) if isinstance(item, dict) else None
        content = item.get("content", item.get("value")) if isinstance(item, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(
                f"{where}: {item!r:.60} is no message; accepted: an object with role and content "
                "(or from and value)"
            )
        messages.append({"role": _ROLES.get(role.lower(), role), "content": content})
    if not any(m["role"] == ASSISTANT and m["content"].strip() for m in messages[1:]):
        raise DataError(
            f"{where}: no message of the assistant after another one; there is nothing to learn"
        )
    return messages


def from_prompt(prompt: str, more: str, response: str) -> list[Message]:
    """An instruction, with what it is about below it, and its answer."""
    asked = f"{prompt}\n\n{more}" if more else prompt
    return [{"role": "user", "content": asked}, {"role": ASSISTANT, "content": response}]


def encode(
    messages: list[Message], tokenizer: Any, where: str = "a conversation"
) -> tuple[list[int], list[int]]:
    """Tokens, and labels that are -100 everywhere but in the assistant's messages.

    A conversation may open with the assistant; what it says before it is asked is not learnt.
    The text is cut where an answer begins and ends, and each piece becomes tokens by itself: what
    stands before an answer is then encoded exactly as it is when the model is asked. The mark that
    ends an answer belongs to it.

    Raises:
        DataError: the chat template rewrites what it was given before, so no answer can be found.
    """
    ids: list[int] = []
    labels: list[int] = []
    for text, learnt in _pieces(messages, tokenizer, where):
        piece = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        ids += piece
        labels += piece if learnt else [IGNORED] * len(piece)
    return ids, labels


def prompt_text(messages: list[Message], tokenizer: Any) -> str:
    """What the model is given to answer the last of `messages`."""
    if tokenizer.chat_template:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return text
    return "".join(_plain(m, tokenizer) for m in messages)


def _pieces(messages: list[Message], tokenizer: Any, where: str) -> list[tuple[str, bool]]:
    """The text of a conversation in order, each piece with whether it is learnt."""
    if not tokenizer.chat_template:
        return [
            (_plain(m, tokenizer), m["role"] == ASSISTANT and i > 0) for i, m in enumerate(messages)
        ]
    try:
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        pieces, end = [], 0
        for i, message in enumerate(messages):
            if message["role"] != ASSISTANT or i == 0:
                continue  # a greeting before anything was asked is no answer
            before = prompt_text(messages[:i], tokenizer)
            upto = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
            if not (whole.startswith(upto) and upto.startswith(before)) or len(before) < end:
                raise DataError(
                    f"{where}: the tokenizer's chat template changes earlier messages, so the "
                    "answers cannot be told from the rest; give conversations of one answer each"
                )
            pieces += [(whole[end : len(before)], False), (upto[len(before) :], True)]
            end = len(upto)
    except DataError:
        raise
    except Exception as e:
        # Templates raise errors of their own, for roles in an order that they do not take.
        raise DataError(
            f"{where}: the tokenizer's chat template refuses it: {' '.join(str(e).split())}"
        ) from None
    # What a template adds behind the last answer is neither asked nor answered.
    return pieces


def _plain(message: Message, tokenizer: Any) -> str:
    """Without a template: a line per message, the end mark behind an answer."""
    end = (tokenizer.eos_token or "\n") if message["role"] == ASSISTANT else "\n"
    return message["content"].strip() + end
