"""``fastrex data``: index a folder of images, check it, shard it, look at it."""

from __future__ import annotations

from pathlib import Path

import click

from . import config as config_module
from .cli_options import DATA, SETTINGS, Progress, located, split


@click.group()
def data() -> None:
    """Index a folder of images, write the demo images, look at a batch."""


@data.command("index")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--empty-classes", type=click.Choice(["error", "skip"]), default="error", show_default=True)
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Reader threads (0 = four per core).")
def data_index(path: Path, empty_classes: str, threads: int) -> None:
    """Build the index of an image folder: sizes, labels, and which files cannot be read."""
    from .data import index as index_module

    with Progress("indexing") as tick:
        index = index_module.build(path, threads=threads, progress=tick, empty_classes=empty_classes)
    target = index_module.default_path(path)
    index_module.save(index, target)
    bad = index.bad()
    click.echo(f"{len(index.labels) - len(bad)} images, {len(index.classes)} classes, layout {index.layout}")
    for name, reason in bad:
        click.echo(f"left out: {name!r} ({reason})")
    if index.skipped:
        click.echo(f"empty classes skipped: {', '.join(map(repr, index.skipped))}")
    if index.ignored:
        click.echo(f"{index.ignored} other files ignored")
    click.echo(f"index: {target}")


@data.command("demo")
@click.argument("path", type=click.Path(path_type=Path), required=False)
def data_demo(path: Path | None) -> None:
    """Write scikit-learn's handwritten digits as a JPEG class-folder data set (default: the cache folder)."""
    from .data.demo import write_digits

    click.echo(str(write_digits(path)))


@data.command("show")
@SETTINGS
@DATA
@click.option("--epoch", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--step", type=click.IntRange(min=0), default=0, show_default=True, help="Step within the epoch.")
@click.option("--rows", type=click.IntRange(min=1), default=8, show_default=True, help="Images shown.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("batch.png"), show_default=True)
def data_show(settings: tuple[str, ...], data_path: str | None, epoch: int, step: int, rows: int, out: Path) -> None:
    """Write a PNG contact sheet: the crops of a batch as the model sees them, with their draws."""
    from . import standalone

    recipe, words = split(settings)
    config = config_module.load(recipe, [*words, *located(data_path)])
    standalone.show_batch(config, epoch, step, rows, out)
    click.echo(str(out))
