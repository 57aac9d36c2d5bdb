"""The machinery under config.py: fields with help and bounds, checked conversion, TOML in and out."""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

from . import untrusted
from .errors import UsageError


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    low: float = -math.inf,
    high: float = math.inf,
) -> Any:
    """A dataclass field with its line of help, its allowed words and its inclusive numeric bounds."""
    return field(default=default, metadata={"help": help, "choices": tuple(choices), "low": low, "high": high})


def parse_override(text: str) -> tuple[str, str, Any]:
    """Split ``section.key=value``; the value is read as TOML and, failing that, as the bare word."""
    name, eq, raw = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (eq and dot and section and key):
        raise UsageError(f"config: a setting must be section.key=value, got {text!r}")
    try:
        value = untrusted.parse_toml(f"v = {raw.strip()}")["v"]
    except ValueError:
        value = raw.strip()
    return section, key, value


def build(cls: type[Any], content: Mapping[str, Any], section: str) -> Any:
    """Make the dataclass ``cls`` from ``content``; names, types, words and bounds are checked."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, value in content.items():
        if key not in fields:
            raise UsageError(f"config: {section}.{key} is no setting{nearest(key, list(fields))}; see 'fastrex config'")
        values[key] = convert(value, hints[key], f"{section}.{key}", fields[key].metadata)
    return cls(**values)


def parse(text: str, origin: str) -> dict[str, Any]:
    """TOML text as nested mappings."""
    try:
        return untrusted.parse_toml(text)
    except ValueError as error:
        raise UsageError(f"config: {origin} must be TOML: {error}") from None


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint at the most similar known name, or nothing."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def convert(value: Any, kind: Any, name: str, meta: Mapping[str, Any]) -> Any:
    """Check one value against its type, words and bounds; ints are taken for floats and lists for tuples."""
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        if not isinstance(value, list | tuple) or len(value) != len(parts):
            raise UsageError(f"config: {name} must be a list of {len(parts)} numbers, got {value!r}")
        return tuple(convert(v, k, name, meta) for v, k in zip(value, parts, strict=True))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UsageError(f"config: {name} must be {_KIND[kind]}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"config: {name} must be a finite number, got {value}")
    if meta.get("choices") and value not in meta["choices"]:
        raise UsageError(
            f"config: {name} must be one of {', '.join(meta['choices'])}, got {value!r}"
            f"{nearest(str(value), meta['choices'])}"
        )
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = meta.get("low", -math.inf), meta.get("high", math.inf)
        if not low <= value <= high:
            bound = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise UsageError(f"config: {name} must be {bound}, got {value!r}")
    return value


_KIND: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}


def toml_value(value: Any) -> str:
    """One value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        escaped = "".join(c if ord(c) >= 32 and ord(c) != 127 else f"\\u{ord(c):04x}" for c in escaped)
        return f'"{escaped}"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    return repr(value)
