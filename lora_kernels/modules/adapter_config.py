"""adapter_config.json: what of PEFT's LoRA configuration this package reads and writes.

Keys that change nothing in the arithmetic of a linear layer are ignored, known or not. Keys that
do change it and are not implemented are refused: an adapter is never loaded as something else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from lora_kernels.errors import AdapterFileError, InvalidArgumentError
from lora_kernels.modules.eligibility import check_hyperparameters
from lora_kernels.modules.targets import is_all_linear, matcher

# Value that PEFT gives the key when the feature is off, and what the feature would do.
_OFF: dict[str, tuple[tuple[Any, ...], str]] = {
    "bias": (("none",), "the adapter was trained with biases of the base model"),
    "lora_bias": ((False, None), "lora_B has a bias"),
    "layer_replication": ((None, []), "layers of the base model are repeated"),
    "alora_invocation_tokens": ((None, []), "the adapter is active on a part of the tokens"),
    "target_parameters": ((None, []), "parameters are adapted that are not linear layers"),
    "trainable_token_indices": ((None, [], {}), "rows of the embeddings are trained"),
    "ensure_weight_tying": ((False, None), "adapters of tied layers are tied"),
    "use_qalora": ((False, None), "inputs are pooled before lora_A"),
    "use_bdlora": ((None, False), "the factors are block-diagonal"),
    "arrow_config": ((None,), "adapters are routed per token"),
    "kasa_config": ((None,), "the base weights were changed"),
    "velora_config": ((None,), "training uses another gradient"),
    "monteclora_config": ((None,), "the factors are sampled"),
    "megatron_config": ((None,), "the layers are Megatron's"),
}
# How a pattern of the file is used in an expression.
_SAVED = r"(^|.*\.){}($|\..*)"
_LAYERS = r"(?:^|.*?\.){}\.(\d+)\."
_ENDING = r"(.*\.)?({})$"
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_INITS_ON_OTHER_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS",
              "FEATURE_EXTRACTION")  # fmt: skip


@dataclass(frozen=True)
class AdapterConfig:
    """One adapter's hyperparameters and the layers it is for; patterns as PEFT reads them."""

    r: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] = field(default_factory=list)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: list[int] = field(default_factory=list)
    layers_pattern: list[str] = field(default_factory=list)
    base_model_name_or_path: str | None = None
    task_type: str | None = None

    def rank_of(self, name: str) -> int:
        return _by_pattern(self.rank_pattern, name, self.r)

    def alpha_of(self, name: str) -> float:
        return _by_pattern(self.alpha_pattern, name, self.alpha)

    def is_target(self, name: str) -> bool | None:
        """Whether the adapter is for layer `name`; None when the file leaves that open."""
        if _matches(self.exclude_modules, name):
            return False
        if any(re.match(_SAVED.format(m), name) for m in self.modules_to_save):
            return False
        targets = self.target_modules
        if targets is None or is_all_linear(targets):
            return None
        if not _matches(targets, name):
            return False
        if isinstance(targets, str) or name in targets or not self.layers_to_transform:
            return True
        return self._layer_index(name) in self.layers_to_transform

    def _layer_index(self, name: str) -> int | None:
        """The first number after a list of layers in `name`."""
        patterns = [_LAYERS.format(p) for p in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]:
            found = re.match(pattern, name)
            if found:
                return int(found.group(1))
        return None

    def is_saved(self, module_name: str) -> bool:
        """Whether modules_to_save names this module, by PEFT's rule: a textual ending."""
        return any(module_name.endswith(name) for name in self.modules_to_save)

    def to_json(self) -> bytes:
        content = {
            "alpha_pattern": {k: _integral(v) for k, v in self.alpha_pattern.items()},
            "auto_mapping": None,
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": "none",
            "exclude_modules": self.exclude_modules,
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "layers_pattern": self.layers_pattern or None,
            "layers_to_transform": self.layers_to_transform or None,
            "lora_alpha": _integral(self.alpha),
            "lora_dropout": self.dropout,
            "modules_to_save": self.modules_to_save or None,
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": self.rank_pattern,
            "revision": None,
            "target_modules": self.target_modules,
            "task_type": self.task_type,
            "use_dora": self.dora,
            "use_rslora": self.rslora,
        }
        return json.dumps(content, indent=2, sort_keys=True).encode("utf-8")


def parse(raw: bytes, path: object) -> AdapterConfig:
    """The configuration in the bytes of adapter_config.json; `path` is for messages.

    Raises:
        AdapterFileError: not a JSON object, a value of the wrong kind, or a feature that changes
            the arithmetic and is not implemented.
    """
    try:
        content = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise AdapterFileError(f"{path}: not valid JSON: {reason}") from None
    if not isinstance(content, dict):
        _reject(path, f"a JSON {type(content).__name__}; accepted: an object")
    for key in ("peft_type", "r", "lora_alpha"):
        if key not in content:
            _reject(path, f"the key {key!r} is missing")
    _refuse_features(content, path)
    reader = _Reader(content, path)
    config = AdapterConfig(
        r=content["r"],
        alpha=content["lora_alpha"],
        dropout=content.get("lora_dropout", 0.0),
        rslora=reader.flag("use_rslora"),
        dora=reader.flag("use_dora"),
        target_modules=reader.patterns("target_modules"),
        exclude_modules=reader.patterns("exclude_modules"),
        modules_to_save=reader.texts("modules_to_save"),
        rank_pattern=reader.table("rank_pattern"),
        alpha_pattern=reader.table("alpha_pattern"),
        layers_to_transform=reader.integers("layers_to_transform"),
        layers_pattern=reader.texts("layers_pattern"),
        base_model_name_or_path=reader.text("base_model_name_or_path"),
        task_type=reader.text("task_type"),
    )
    try:
        check_hyperparameters(config.r, config.alpha, config.dropout)
        for rank in config.rank_pattern.values():
            check_hyperparameters(rank, config.alpha, config.dropout)
        for alpha in config.alpha_pattern.values():
            check_hyperparameters(config.r, alpha, config.dropout)
    except InvalidArgumentError as error:
        _reject(path, str(error))
    return config


def _refuse_features(content: Mapping[str, Any], path: object) -> None:
    if content["peft_type"] != "LORA":
        _reject(path, f"peft_type={content['peft_type']!r}; accepted: 'LORA'")
    for key, (off, effect) in _OFF.items():
        if key in content and not any(content[key] is v or content[key] == v for v in off):
            _reject(path, f"{key}={content[key]!r} is not supported: {effect}")
    init = content.get("init_lora_weights", True)
    if init in _INITS:
        return
    if isinstance(init, str) and init.lower().startswith(_INITS_ON_OTHER_WEIGHTS):
        _reject(
            path,
            f"init_lora_weights={init!r} is not supported: the adapter belongs to base weights "
            "that this initialisation changed; convert it to a plain LoRA with PEFT first",
        )
    _reject(path, f"init_lora_weights={init!r}; accepted: true, false, gaussian, eva, orthogonal")


class _Reader:
    """Typed access to a JSON object; a value of another kind is an error that names the key."""

    def __init__(self, content: Mapping[str, Any], path: object) -> None:
        self.content, self.path = content, path

    def _fail(self, key: str, accepted: str) -> NoReturn:
        _reject(self.path, f"{key}={self.content[key]!r}; accepted: {accepted}")

    def flag(self, key: str) -> bool:
        value = self.content.get(key, False)
        if value is not None and not isinstance(value, bool):
            self._fail(key, "true or false")
        return bool(value)

    def text(self, key: str) -> str | None:
        value = self.content.get(key)
        if value is not None and not isinstance(value, str):
            self._fail(key, "text or null")
        return value

    def texts(self, key: str) -> list[str]:
        value = self.content.get(key)
        value = [value] if isinstance(value, str) else value or []
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            self._fail(key, "a list of names")
        for name in value:
            self._check_expression(key, name, _SAVED if key == "modules_to_save" else _LAYERS)
        return value

    def patterns(self, key: str) -> str | list[str] | None:
        value = self.content.get(key)
        if value is None:
            return None
        if isinstance(value, str):
            self._check_expression(key, value, "{}")
            return value
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            self._fail(key, "a list of names or a regular expression")
        return value

    def table(self, key: str) -> dict[str, Any]:
        value = self.content.get(key) or {}
        if not isinstance(value, dict):
            self._fail(key, "an object of name patterns and numbers")
        for pattern in value:
            self._check_expression(key, pattern, _ENDING)
        return value

    def integers(self, key: str) -> list[int]:
        value = self.content.get(key)
        value = [value] if type(value) is int else value or []
        if not isinstance(value, list) or not all(type(v) is int for v in value):
            self._fail(key, "a list of integers")
        return value

    def _check_expression(self, key: str, pattern: str, use: str) -> None:
        try:
            re.compile(use.format(pattern))
        except re.error as error:
            _reject(self.path, f"{key}: {pattern!r} is not a regular expression: {error}")


def _reject(path: object, problem: str) -> NoReturn:
    raise AdapterFileError(f"{path}: {problem}")


def _matches(patterns: str | list[str] | None, name: str) -> bool:
    return matcher(patterns, "target_modules")(name) if patterns else False


def _by_pattern(table: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that ends `name`."""
    for pattern, value in table.items():
        if re.match(_ENDING.format(pattern), name):
            return value
    return default


def _integral(value: float) -> float:
    return int(value) if value == int(value) else float(value)
