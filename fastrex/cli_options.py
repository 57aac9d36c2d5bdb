"""Options and arguments that several commands share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from . import settings as settings_module

DEVICE = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
DATA = click.option(
    "--data", "data_path", metavar="PATH", help="Image folder, file list, tar shards, or 'synthetic'; sets data.path."
)
SETTINGS = click.argument("settings", nargs=-1, metavar="[RECIPE] [section.key=value ...]")


def split(settings: tuple[str, ...]) -> tuple[str | None, list[str]]:
    """The recipe (a first word without '=') and the settings."""
    words = list(settings)
    recipe = words.pop(0) if words and "=" not in words[0] else None
    return recipe, words


def located(path: str | None) -> list[str]:
    """``--data`` as a setting; paths are made absolute so that a run resumes from anywhere."""
    if path is None:
        return []
    place = path if path == "synthetic" else str(Path(path).expanduser().resolve())
    return [f"data.path={settings_module.toml_value(place)}"]


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
