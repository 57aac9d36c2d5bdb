"""``fastrex data``: index a folder of images, check it, shard it, look at it."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from pathlib import Path

import click

from . import config as config_module
from .cli_options import DATA, PLACE, SETTINGS, Progress, located, split, writable, write_json
from .errors import UsageError


@click.group()
def data() -> None:
    """Index images, check and shard them, look at a batch, write the demo's images."""


@data.command("index")
@click.argument("path", type=PLACE)
@click.option("--empty-classes", type=click.Choice(["error", "skip"]), default="error", show_default=True)
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Reader threads (0 = four per core).")
def data_index(path: Path, empty_classes: str, threads: int) -> None:
    """Build the index of PATH, an image folder, a list (.csv, .tsv, .jsonl) or tar shards: sizes, labels, and which
    images cannot be read."""
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
    for notice in index.notices:
        click.echo(f"notice: {notice}")
    click.echo(f"index: {target}")


@data.command("shard")
@click.argument("path", type=PLACE)
@click.argument("out", type=PLACE)
@click.option("--size", type=click.IntRange(min=1), default=1000, show_default=True, help="Largest shard in MB.")
@click.option("--split", type=click.Choice(["all", "train", "val"]), default="all", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), help="Shuffle the images of a split (default: by class and path).")
@click.option("--empty-classes", type=click.Choice(["error", "skip"]), default="error", show_default=True)
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Shards written at a time (0 = four).")
def data_shard(
    path: Path, out: Path, size: int, split: str, seed: int | None, empty_classes: str, threads: int
) -> None:
    """Write the readable images of PATH as tar shards (WebDataset layout) into the new folder OUT."""
    from .data import index as index_module
    from .data import sharding

    sharding.find_target(path, out)
    with Progress("indexing") as tick:
        index_module.open_or_build(path, progress=tick, empty_classes=empty_classes)
    with Progress("writing") as tick:
        written = sharding.shard(
            path,
            out,
            max_bytes=size * 1_000_000,
            seed=seed,
            split=split,
            empty_classes=empty_classes,
            threads=threads,
            progress=tick,
        )
    for name, reason in written.left_out:
        click.echo(f"left out: {name!r} ({reason})")
    click.echo(f"{written.images} images in {len(written.shards)} shards: {out}")


@data.command("check")
@click.argument("path", type=PLACE)
@click.option("--empty-classes", type=click.Choice(["error", "skip"]), default="error", show_default=True)
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Reader and decoder threads (0 = all cores).")
@click.option("--json", "json_path", type=PLACE, help="Also write the result to this file.")
def data_check(path: Path, empty_classes: str, threads: int, json_path: Path | None) -> int:
    """Index PATH anew and decode every image as training does; training leaves the bad ones out from then on.

    Exit code 1 if there is a bad one.
    """
    from .data import check as check_module
    from .data import index as index_module
    from .data.scan import REASONS

    writable(json_path, "--json")
    with Progress("indexing") as tick:
        index = index_module.build(path, threads=threads, progress=tick, empty_classes=empty_classes)
    with check_module.quiet_decoder(), Progress("decoding") as tick:
        result = check_module.check(index, threads=threads, progress=tick)
    target = index_module.default_path(path)
    index_module.save(result.index, target)
    summary = {**result.summary(), "index": str(target)}
    for image in result.bad:
        click.echo(f"left out: {image.name!r} ({image.reason})")
    speed = f"{result.decoded} decoded, {result.size / 1e6:.1f} MB, {summary['images_per_s']:.0f} images/s"
    click.echo(f"{summary['good']} of {summary['images']} images are good; {speed}")
    for status, count in sorted(Counter(image.status for image in result.bad).items()):
        click.echo(f"{count} bad: {REASONS[status]}")
    click.echo(f"index: {target}")
    if result.bad:
        click.echo("training leaves the bad ones out; restore or remove them and run this again")
    if json_path is not None:
        write_json(json_path, summary, "--json")
    result.refuse(empty_classes)
    return int(bool(result.bad))


@data.command("demo")
@click.argument("path", type=PLACE, required=False)
def data_demo(path: Path | None) -> None:
    """Write scikit-learn's handwritten digits as a JPEG class-folder data set (default: the cache folder)."""
    from .data.demo import write_digits

    click.echo(str(write_digits(path)))


@data.command("show")
@SETTINGS
@DATA
@click.option("--epoch", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option("--step", type=click.IntRange(min=0), help="Step within the epoch (default: 0).")
@click.option("--rows", type=click.IntRange(min=1), help="Images shown of the batch (default: 8).")
@click.option("--sample", "names", multiple=True, metavar="NAME_OR_ROW", help="Show this image instead; repeatable.")
@click.option("--out", type=PLACE, default=Path("batch.html"), show_default=True)
def data_show(
    settings: tuple[str, ...],
    data_path: str | None,
    epoch: int,
    step: int | None,
    rows: int | None,
    names: tuple[str, ...],
    out: Path,
) -> None:
    """Show images of a batch with their crops as the model sees them: a page (.html) or a contact sheet (.png).

    A sample is named by its row number in the index, or by its path relative to the data set.
    """
    from . import standalone

    writable(out, "--out")
    if names and (step is not None or rows is not None):
        raise UsageError("data show: --sample chooses the images; leave out --step and --rows")
    recipe, words = split(settings)
    config = config_module.load(recipe, [*words, *located(data_path)])
    command = shlex.join(["fastrex", *sys.argv[1:]])
    standalone.show_batch(config, epoch, step or 0, rows or 8, out, names, command)
    click.echo(str(out))
