"""``python -m benchmarks curve RUN --name NAME``: the training curve of a run as JSON and PNG."""

from __future__ import annotations

from pathlib import Path

import click

from . import curve as curve_module


@click.group()
def main() -> None:
    """Benchmarks of fastrex; each writes the JSON that its figures come from."""


@main.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--name", required=True, help="Stem of the files.")
@click.option("--command", default="", help="The command that made the run, to be kept with the figures.")
@click.option("--out", type=click.Path(path_type=Path), default=curve_module.RESULTS, show_default=True)
def curve(run: Path, name: str, command: str, out: Path) -> None:
    """Loss, accuracy and k-NN of RUN over its steps."""
    for path in curve_module.write(run, name, command, out):
        click.echo(str(path))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
