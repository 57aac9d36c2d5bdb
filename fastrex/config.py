"""Configuration: frozen dataclasses, TOML recipes and ``section.key=value`` overrides. Imports no torch.

A recipe is a TOML file that names every field of every section; what the command line adds is checked against the same
dataclasses. The options of the objective belong to the objective's own file (its ``Options`` dataclass); here they
travel as a plain mapping and are checked by :func:`build` when the objective is looked up.
"""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import untrusted
from .errors import UsageError
from .sections import (
    STAGES,
    AugmentConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    ProjectorConfig,
    RunConfig,
)
from .settings import build, convert, nearest, parse, parse_override, toml_value

__all__ = [
    "STAGES",
    "AugmentConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "ProjectorConfig",
    "RunConfig",
]

MAX_BYTES = 1 << 16  # of a recipe or a stored configuration; the longest has four thousand
RECIPES = Path(__file__).parent / "recipes"
OBJECTIVE = "objective"
# What may be set when a run is resumed: none of it changes a batch of good files, or a weight.
RESUMABLE = {
    "data": ("on_bad_sample", "max_bad_samples", "threads", "prefetch"),
    "model": ("recompute",),
    "checkpoint": ("every_epochs", "every_steps", "keep_last", "keep_every", "background", "on_failure"),
    "run": ("log_every", "tensorboard", "wandb", "cuda_graph", "compile", "stall_s"),
}


def sections() -> dict[str, type[Any]]:
    """The sections of a configuration file and their dataclasses."""
    hints = typing.get_type_hints(Config)
    return {f.name: hints[f.name] for f in dataclasses.fields(Config) if f.name != "recipe"}


def recipes() -> list[str]:
    """Names of the recipes that come with fastrex."""
    return sorted(p.stem for p in RECIPES.glob("*.toml"))


def load(recipe: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe (a name, a TOML file, or None for ``demo``) and apply ``section.key=value`` overrides in order.

    Raises:
        UsageError: unknown recipe, section, key or value; the message names the nearest one that exists.
    """
    name = "demo" if recipe is None else str(recipe)
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not path.is_file():
        raise UsageError(
            f"train: recipe must be one of {', '.join(recipes())} or a TOML file, got {name!r}"
            f"{nearest(name, recipes())}"
        )
    table = parse(_text(path), str(path))
    table.setdefault("recipe", path.stem)
    return from_table(_merge(table, overrides))


def override(config: Config, overrides: Sequence[str]) -> Config:
    """Apply ``section.key=value`` overrides to a configuration."""
    return from_table(_merge(tomllib.loads(to_toml(config)), overrides))


def _merge(table: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply overrides in order. Another objective brings its own options: those of the recipe's objective are
    dropped."""
    parsed = [(text, *parse_override(text)) for text in overrides]
    for _, section, key, value in parsed:
        if (section, key) == (OBJECTIVE, "name") and table.get(OBJECTIVE, {}).get("name") != value:
            table[OBJECTIVE] = {"name": value}
    for text, section, key, value in parsed:
        if not isinstance(table.setdefault(section, {}), dict):
            raise UsageError(f"config: {section} is no section, got the setting {text!r}")
        table[section][key] = value
    return table


def read(path: Path) -> Config:
    """Read a configuration that a run stored."""
    table = parse(_text(path), str(path))
    if not table:
        raise UsageError(f"config: {path} must hold a run's configuration, it is empty; start a new --out")
    return from_table(table)


def from_toml(text: str, origin: str = "config") -> Config:
    """The inverse of :func:`to_toml`."""
    return from_table(parse(text, origin))


def _text(path: Path) -> str:
    try:
        return untrusted.read_text(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        raise UsageError(f"config: {path} must be a TOML file in UTF-8, it cannot be read ({error})") from None


def from_table(table: Mapping[str, Any]) -> Config:
    """Build a configuration from nested mappings; unknown names are errors that point to the nearest known one."""
    known = sections()
    values: dict[str, Any] = {}
    for name, content in table.items():
        if name == "recipe":
            values[name] = str(content)
        elif name not in known:
            raise UsageError(
                f"config: section must be one of {', '.join(known)}, got {name!r}{nearest(name, list(known))}"
            )
        elif not isinstance(content, Mapping):
            raise UsageError(f"config: {name} must be a section, got {content!r}; write {name}.key=value")
        elif name == OBJECTIVE:
            options = dict(content)
            chosen = options.pop("name", ObjectiveConfig.name)
            values[name] = ObjectiveConfig(name=convert(chosen, str, "objective.name", {}), options=options)
        else:
            values[name] = build(known[name], content, name)
    return Config(**values)


def items(config: Config) -> Iterator[tuple[str, str, Any, str]]:
    """Every setting as (section, key, value, help). The objective's options carry no help here; their ``Options``
    does."""
    for name, cls in sections().items():
        part = getattr(config, name)
        for f in dataclasses.fields(cls):
            if f.name != "options":
                yield name, f.name, getattr(part, f.name), f.metadata["help"]
        if name == OBJECTIVE:
            for key, value in part.options.items():
                yield name, key, value, ""


def to_toml(config: Config) -> str:
    """The configuration as TOML, every field named."""
    lines = [f"recipe = {toml_value(config.recipe)}"]
    current = ""
    for section, key, value, _ in items(config):
        if section != current:
            lines += ["", f"[{section}]"]
            current = section
        lines.append(f"{key} = {toml_value(value)}")
    return "\n".join(lines) + "\n"


def resumed(old: Config, new: Config) -> Config:
    """``old`` with those settings of ``new`` that change how a run works, not what it computes; see ``RESUMABLE``."""
    parts: dict[str, Any] = {}
    for section, keys in RESUMABLE.items():
        fresh = {key: getattr(getattr(new, section), key) for key in keys}
        parts[section] = dataclasses.replace(getattr(old, section), **fresh)
    return dataclasses.replace(old, **parts)


def diff(old: Config, new: Config) -> list[str]:
    """The settings that differ, as ``section.key: old -> new``."""
    before = {(s, k): v for s, k, v, _ in items(old)}
    after = {(s, k): v for s, k, v, _ in items(new)}
    keys = list(dict.fromkeys([*before, *after]))
    return [
        f"{s}.{k}: {toml_value(before.get((s, k), ''))} -> {toml_value(after.get((s, k), ''))}"
        for s, k in keys
        if before.get((s, k)) != after.get((s, k))
    ]
