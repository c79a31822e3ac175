"""Text from a language model with or without an adapter, piece by piece."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_kernels.errors import ConfigError, DataError
from lora_kernels.training.adapted_model import (
    adapter_source,
    base_path,
    load_adapted,
    load_base,
    load_tokenizer,
)
from lora_kernels.training.adapter_choice import AdapterChoice


@dataclass(frozen=True)
class Sampling:
    """How the next token is picked; temperature 0 takes the most likely one."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("max_new_tokens", self.max_new_tokens, 1, 10**6),
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_p", self.top_p, 1e-6, 1.0),
            ("top_k", self.top_k, 0, 10**6),
            ("repetition_penalty", self.repetition_penalty, 0.01, 100.0),
            ("seed", self.seed, 0, 2**63 - 1),
        ):
            if not low <= value <= high:
                raise ConfigError(
                    f"{name}={value!r} is out of range; accepted: {low:g} to {high:g}"
                )

    def options(self) -> dict[str, Any]:
        """Keywords of ``generate``."""
        found: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        if self.temperature == 0.0:
            found |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        else:
            found |= {
                "do_sample": True,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": self.top_k,
            }
        if self.repetition_penalty != 1.0:
            found["repetition_penalty"] = self.repetition_penalty
        return found


class Generator:
    """A causal or sequence-to-sequence language model that continues or answers texts.

    Args:
        source: folder of an adapter or of a run; or a model without an adapter (a folder,
            ``package:NAME``, a name on the hub).
        base: the base model; None takes what the adapter names.
        kernels: fuse the adapters with :func:`lora_kernels.apply`.
        dtype: of the base's weights; None keeps that of the files.

    Raises:
        AdapterFileError: the adapter is damaged or for another model.
        ConfigError: the base model cannot be loaded or generates no text.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        base: str | None = None,
        kernels: bool = True,
        dtype: str | None = None,
    ) -> None:
        from lora_kernels.training.finetuning import SAVED
        from lora_kernels.training.predictor import Predictor
        from lora_kernels.training.quiet import quiet_libraries

        folder = Path(source)
        inner = (folder, folder / "adapter")
        adapted = base is not None or any((f / "adapter_config.json").is_file() for f in inner)
        of_run = base is None and dtype is None and any((f / SAVED).is_file() for f in inner)
        self.autocast, self.kernels = False, kernels
        with quiet_libraries():
            if of_run:
                # Whatever the method of the run was: quantized, frozen in part, all weights.
                run = Predictor(folder, kernels=kernels)
                self.model, self.tokenizer, self.autocast = run.model, run.tokenizer, run.autocast
                adapted = False
            elif adapted:
                found = adapter_source(folder, base)
                self.tokenizer = load_tokenizer(base_path(found.base))
                self.model = load_adapted(found, dtype)
            else:
                path = base_path(str(source))
                self.tokenizer = load_tokenizer(path)
                self.model = load_base(path, "", dtype, {})
        plain = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if not plain.can_generate():
            raise ConfigError(
                f"{source} is a {type(plain).__name__}, which generates no text; "
                "accepted: causal and sequence-to-sequence language models"
            )
        self.model.eval()
        if torch.cuda.is_available():
            self.model.to("cuda")
        if adapted and kernels:
            import lora_kernels as lk

            lk.apply(self.model)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def load_more(self, first: str | Path, others: list[str], base: str | None) -> AdapterChoice:
        """Adapters that take turns with `first`, this generator's own, over its base.

        Raises:
            AdapterFileError, ConfigError: as :class:`AdapterChoice`.
        """
        from lora_kernels.training.quiet import quiet_libraries

        with quiet_libraries():
            choice = AdapterChoice(self.model, first, base)
            for folder in others:
                choice.add(folder)
        if self.kernels:
            import lora_kernels as lk

            lk.apply(self.model)  # layers that only the later adapters have
        return choice

    def encode(self, prompt: str, chat: bool = False) -> Any:
        """The prompt's tokens ``{"input_ids", "attention_mask"}``; `chat` puts it into a dialogue.

        Raises:
            DataError: empty, longer than the model takes, or no chat template.
        """
        if not prompt.strip():
            raise DataError("the prompt is empty; accepted: a text")
        if chat:
            if not getattr(self.tokenizer, "chat_template", None):
                raise DataError("the model has no chat template; leave out --chat")
            encoded = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True,
                return_tensors="pt", return_dict=True,
            )  # fmt: skip
        else:
            encoded = self.tokenizer(prompt, return_tensors="pt")
        tokens, limit = encoded["input_ids"].shape[1], self.longest
        if tokens == 0:
            raise DataError("the prompt has no token; accepted: a text")
        if limit is not None and tokens >= limit:
            raise DataError(f"the prompt has {tokens} tokens; the model takes {limit - 1} at most")
        return encoded.to(self.model.device)

    @property
    def longest(self) -> int | None:
        """Positions that the model has, prompt and answer together."""
        config = self.model.config
        if getattr(config, "is_encoder_decoder", False):
            return None
        for key in ("max_position_embeddings", "n_positions"):
            value = getattr(config, key, None)
            if isinstance(value, int) and value > 0:
                return value
        return None

    def stream(self, prompt: str, sampling: Sampling, chat: bool = False) -> Iterator[str]:
        """Pieces of the continuation as they come; together they are the text.

        Closing the iterator early ends the generation after the token that runs.
        """
        from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

        encoded = self.encode(prompt, chat)
        options = self._options(encoded, sampling)
        stop, failure = threading.Event(), []

        class Stopped(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
                return torch.full((len(input_ids),), stop.is_set(), device=input_ids.device)

        decoder = getattr(self.model.config, "is_encoder_decoder", False)
        streamer = TextIteratorStreamer(
            self.tokenizer, skip_prompt=not decoder, skip_special_tokens=True
        )
        options["stopping_criteria"] = StoppingCriteriaList([Stopped()])
        state = torch.random.get_rng_state()

        def generate() -> None:
            try:
                # Threads share the generator; it is put back below.
                torch.manual_seed(sampling.seed)
                device = self.model.device.type
                with (
                    torch.inference_mode(),
                    torch.autocast(device, torch.bfloat16, enabled=self.autocast),
                ):
                    self.model.generate(**encoded, **options, streamer=streamer)
            except BaseException as e:
                failure.append(e)
                streamer.end()

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        try:
            for piece in streamer:
                if piece:
                    yield piece
        finally:
            stop.set()
            thread.join()
            torch.random.set_rng_state(state)
        if failure:
            raise failure[0]

    def __call__(
        self,
        prompt: str,
        sampling: Sampling,
        chat: bool = False,
        on_piece: Callable[[str], object] | None = None,
    ) -> dict[str, Any]:
        """``{"prompt", "text", "prompt_tokens", "seconds"}``; `on_piece` sees the text grow."""
        import time

        start, pieces = time.perf_counter(), []
        for piece in self.stream(prompt, sampling, chat):
            pieces.append(piece)
            if on_piece is not None:
                on_piece(piece)
        return {
            "prompt": prompt,
            "text": "".join(pieces),
            "prompt_tokens": self.encode(prompt, chat)["input_ids"].shape[1],
            "seconds": time.perf_counter() - start,
        }

    def _options(self, encoded: Any, sampling: Sampling) -> dict[str, Any]:
        options = sampling.options()
        limit = self.longest
        if limit is not None:
            room = limit - encoded["input_ids"].shape[1]
            options["max_new_tokens"] = min(options["max_new_tokens"], room)
        options["pad_token_id"] = self.tokenizer.pad_token_id
        return options
