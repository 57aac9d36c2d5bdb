"""``fastrex bench probe``: the transfer probe beside scikit-learn with Optuna."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from fastrex.cli_options import PLACE

from . import files

RIVAL = "sklearn"
IMPLS = ("grid", "paper", RIVAL)
# Classes, training and test images of the small official sets that are quickest to fit.
SETS = {"pets": (37, 3680, 3669), "dtd": (47, 3760, 1880), "flowers102": (102, 2040, 6149)}
SEEDS = (22, 37, 45, 77, 93)


@click.command("probe")
@click.option(
    "--features", type=PLACE, metavar="FILE", help="safetensors: train, train_labels, test, test_labels; default: made."
)
@click.option("--set", "name", type=click.Choice(sorted(SETS)), default="pets", show_default=True, help="Size if made.")
@click.option("--features-dim", "width", type=click.IntRange(min=2), default=2048, show_default=True, help="If made.")
@click.option("--seeds", default=",".join(map(str, SEEDS)), show_default=True, help="With commas between.")
@click.option("--impl", multiple=True, type=click.Choice(IMPLS), help="Repeatable; default: all.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU cores of each; default: all.")
@click.option("--json", "json_path", type=PLACE, help="Write the records to this file, behind those already in it.")
@click.pass_context
def command(
    context: click.Context,
    features: Path | None,
    name: str,
    width: int,
    seeds: str,
    impl: tuple[str, ...],
    device: str,
    threads: int | None,
    json_path: Path | None,
) -> None:
    """Choosing C and fitting the transfer probe, beside scikit-learn with Optuna as published.

    30 trials and a last fit per seed, all on the same features, cores, seeds and validation rows, taking turns. Then
    the SGD probe's grid side by side and one after the other.

    \b
    fastrex bench probe --set pets --json probe.json
    fastrex bench probe --features FILE.safetensors --seeds 22,37
    """
    from . import probe_rounds
    from .__main__ import _command, _device, _one_line, _say, _threads

    try:
        numbers = tuple(int(word) for word in seeds.split(","))
    except ValueError:
        raise click.UsageError(f"--seeds must be whole numbers with commas between, got {seeds!r}") from None
    settings = probe_rounds.Settings(
        features, name, width, numbers, _device(device), _threads(threads), impl or IMPLS, _command(context)
    )
    with _one_line():
        records = probe_rounds.run(settings, _say)
        click.echo(probe_rounds.table(records))
        if json_path is not None:
            files.write_json(json_path, [*_before(json_path), *records])
            click.echo(f"records: {json_path}")


def _before(path: Path) -> list[dict[str, Any]]:
    """The records that are there: one file holds the figures of several sets."""
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, list):
        raise click.UsageError(f"--json must be a new file or one of this command's, got {path}")
    return content
