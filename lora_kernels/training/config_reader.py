"""From a YAML file, a dictionary or a Config, plus ``key=value`` overrides, to a checked Config."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_kernels.errors import ConfigError
from lora_kernels.training.config import Config
from lora_kernels.training.config_checks import check_together

_TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


def read_config(
    source: Config | Mapping[str, Any] | str | Path, overrides: Iterable[str] = ()
) -> Config:
    """A checked Config.

    Args:
        source: a Config, nested dictionaries, or the path of a YAML file.
        overrides: ``"key=value"`` or ``"section.key=value"``; the value is read as YAML.

    Raises:
        ConfigError: unreadable file, unknown key (the nearest valid one is named), wrong type,
            value out of range, missing key.
    """
    if isinstance(source, Config):
        raw = source.to_dict()
    elif isinstance(source, Mapping):
        raw = {k: dict(v) if isinstance(v, Mapping) else v for k, v in source.items()}
    else:
        raw = _read_yaml(Path(source))
    for override in overrides:
        _override(raw, override)
    config = _build(Config, raw, "")
    check_together(config)
    return config


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror or e}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        reason = " ".join(str(e).split())
        raise ConfigError(f"{path} is not a YAML file: {reason}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}; accepted: `key: value` lines")
    return raw


def _override(raw: dict[str, Any], override: str) -> None:
    import yaml

    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} is not an override; accepted: key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{key}={text!r} cannot be read as a YAML value") from None
    *sections, name = key.split(".")
    target = raw
    for section in sections:
        inner = target.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{key!r} is no key: {section!r} holds a value, not a section")
        target = inner
    target[name] = value


def _all_keys(cls: type, prefix: str) -> list[str]:
    keys = []
    for f in dataclasses.fields(cls):
        if f.default_factory is not dataclasses.MISSING and dataclasses.is_dataclass(
            f.default_factory
        ):
            keys += _all_keys(typing.cast(type, f.default_factory), f"{prefix}{f.name}.")
        keys.append(prefix + f.name)
    return keys


def _nearest(key: str) -> str:
    """The valid key that a mistyped one most likely meant; wrong section counts as a typo."""
    keys = _all_keys(Config, "")
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if not close:
        last = key.rpartition(".")[2]
        by_name = {k.rpartition(".")[2]: k for k in keys}
        close = [by_name[n] for n in difflib.get_close_matches(last, list(by_name), 1, 0.6)]
    if close:
        return f"did you mean {close[0]!r}?"
    return f"accepted: {', '.join(k for k in keys if '.' not in k)}"


def _build(cls: type, raw: Any, prefix: str) -> Any:
    if not isinstance(raw, Mapping):
        raise ConfigError(
            f"{prefix.rstrip('.')}={raw!r} is a {type(raw).__name__}; accepted: a section with "
            + ", ".join(f.name for f in dataclasses.fields(cls))
        )
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in raw:
        if key not in fields:
            name = f"{prefix}{key}"
            raise ConfigError(f"unknown key {name!r}; {_nearest(name)}")
    values = {}
    for name, f in fields.items():
        key = prefix + name
        if dataclasses.is_dataclass(hints[name]):
            values[name] = _build(typing.cast(type, hints[name]), raw.get(name, {}), key + ".")
        elif name in raw:
            values[name] = _convert(key, raw[name], hints[name])
            _check_range(key, values[name], f.metadata)
        if f.metadata.get("required") and not values.get(name):
            raise ConfigError(f"{key} is missing; accepted: {f.metadata['help']}")
    return cls(**values)


def _convert(key: str, value: Any, hint: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        for option in options:
            if option is not type(None) and _matches(value, option):
                return _convert(key, value, option)
        named = [_describe(o) for o in options if o is not type(None)]
        raise _wrong(key, value, " or ".join(named))
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise _wrong(key, value, _describe(hint))
        return value
    if origin is list and isinstance(value, str):
        value = [word.strip() for word in value.split(",") if word.strip()]
    if not _matches(value, hint):
        raise _wrong(key, value, _describe(hint))
    return float(value) if hint is float else value


def _matches(value: Any, hint: Any) -> bool:
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        # YAML 1.1 reads 5e-4 (no point) as a text; a number is meant.
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            return False
        try:
            return math.isfinite(float(value))
        except ValueError:
            return False
    if typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        return isinstance(value, list) and all(_matches(v, item) for v in value)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(str(v) for v in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return "a list of texts"
    return _TYPE_NAMES[hint]


def _wrong(key: str, value: Any, accepted: str) -> ConfigError:
    return ConfigError(f"{key}={value!r} is not valid; accepted: {accepted}")


def _check_range(key: str, value: Any, metadata: Mapping[str, Any]) -> None:
    low, high = metadata.get("low"), metadata.get("high")
    if value is None or (low is None and high is None):
        return
    if (low is not None and value < low) or (high is not None and value > high):
        accepted = f"{low:g} to {high:g}" if high is not None else f"{low:g} or more"
        raise ConfigError(f"{key}={value!r} is out of range; accepted: {accepted}")
