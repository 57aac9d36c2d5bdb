"""Options and arguments that several commands share."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from . import files
from . import settings as settings_module
from .errors import FastrexError, UsageError, explain

# What no command can make sense of, whatever it wants of the path.
NO_PATH = (errno.ELOOP, errno.ENAMETOOLONG)


def unusable(path: str) -> str | None:
    """Why no file can have this name, with the way out, or None."""
    if not path:
        return "a path must not be empty; name a file or a folder"
    if "\0" in path:
        return f"a path must not hold a NUL, got {path!r}; choose another name"
    try:
        os.stat(Path(path).expanduser())
    except OSError as error:
        return explain(error) if error.errno in NO_PATH else None
    except RuntimeError as error:  # ~nobody
        return f"{path!r}: {error}; write the whole path"
    return None


class PathType(click.Path):
    """A path that may be missing, but not impossible."""

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        reason = unusable(os.fsdecode(value))
        if reason is not None:
            self.fail(reason, param, context)
        return super().convert(value, param, context)


PLACE = PathType(path_type=Path)
SOURCE = PathType()
DEVICE = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
DATA = click.option(
    "--data",
    "data_path",
    type=SOURCE,
    metavar="PATH",
    help="Image folder, file list, tar shards, or 'synthetic'; sets data.path.",
)
SETTINGS = click.argument("settings", nargs=-1, metavar="[RECIPE] [section.key=value ...]")


def split(settings: tuple[str, ...]) -> tuple[str | None, list[str]]:
    """The recipe (a first word without '=') and the settings."""
    words = list(settings)
    recipe = words.pop(0) if words and "=" not in words[0] else None
    if recipe is not None and recipe.endswith(".toml") and (reason := unusable(recipe)):
        raise UsageError(f"config: recipe must be a TOML file: {reason}")
    return recipe, words


def located(path: str | None) -> list[str]:
    """``--data`` as a setting; paths are made absolute so that a run resumes from anywhere."""
    if path is None:
        return []
    place = path if path == "synthetic" else str(Path(path).expanduser().resolve())
    try:
        place.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"--data must be UTF-8, got {place!r}; rename the folder or give a link to it") from None
    return [f"data.path={settings_module.toml_value(place)}"]


def writable(path: Path | None, option: str) -> None:
    """Refuse an output that cannot be written before the work for it is done.

    Raises:
        FastrexError: a folder, or in one that is not there or admits no new file.
    """
    if path is None:
        return
    reason = ""
    if path.is_dir():
        reason = "it is a folder"
    elif not path.exists() and not path.parent.is_dir():
        reason = f"{str(path.parent)!r} is no folder"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        reason = "no permission, or a read-only file system"
    if reason:
        raise FastrexError(f"cannot write {str(path)!r} ({reason}); name another {option}")


def write_json(path: Path, content: Mapping[str, Any], option: str) -> None:
    """Write what a command found to where ``option`` says.

    Raises:
        FastrexError: it cannot be written.
    """
    try:
        files.write_output(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise FastrexError(f"cannot write {str(path)!r} ({error.strerror}); name another {option}") from None


class Progress:
    """A line on a terminal that is overwritten; nothing where the output is a file."""

    def __init__(self, word: str) -> None:
        self.word, self.shown = word, sys.stderr.isatty()

    def __enter__(self) -> Any:
        return self._tick if self.shown else None

    def _tick(self, done: int, total: int) -> None:
        click.echo(f"\r{self.word} {done}/{total}", err=True, nl=False)

    def __exit__(self, *_: object) -> None:
        if self.shown:
            click.echo("", err=True)
